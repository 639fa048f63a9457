"""Policies that choose by a call's arguments, judge its result, cost more than one, or change while in use."""

from __future__ import annotations

import asyncio
import logging

import pytest

from seawall import (
    Bulkhead,
    CircuitBreaker,
    Pipeline,
    RateLimiter,
    Rejected,
    State,
    Timeout,
    policies_of,
    use_clock,
)
from seawall.core.ambient import Priority, current_priority, priority
from seawall.core.costing import costing
from seawall.core.events import ask
from seawall.testing import run


class PerTenant:
    """One bulkhead a tenant, which is the first argument."""

    def __init__(self):
        self.places = {}

    def guard_for(self, args, kwargs):
        tenant = args[0] if args else kwargs["tenant"]
        return self.places.setdefault(tenant, Bulkhead(tenant, max_concurrent=1))


class Judging:
    """A guard that looks at results."""

    judges = True

    def __init__(self):
        self.seen = []

    def enter(self, now):
        return {}

    def judge(self, token, result, exc):
        token["judged"] = result if exc is None else type(exc)

    def exit(self, token, now, exc):
        self.seen.append(token["judged"])


def each_kind(policy):
    @Pipeline(policy)
    def plain(tenant):
        return tenant

    @Pipeline(policy)
    async def coroutine(tenant):
        return tenant

    @Pipeline(policy)
    def generator(tenant):
        yield tenant

    @Pipeline(policy)
    async def stream(tenant):
        yield tenant

    async def main():
        return [
            plain("a"),
            await coroutine("a"),
            next(generator("a")),
            *[item async for item in stream("a")],
        ]

    return main()


def test_a_guard_is_chosen_by_the_arguments_of_every_kind_of_call():
    per_tenant = PerTenant()
    assert asyncio.run(each_kind(per_tenant)) == ["a"] * 4
    assert per_tenant.places["a"].snapshot().finished == 4
    assert per_tenant.places["a"].snapshot().active == 0


def test_one_tenants_calls_never_meet_anothers():
    per_tenant = PerTenant()

    @Pipeline(per_tenant)
    async def hold(tenant):
        await asyncio.sleep(1)
        return tenant

    async def main():
        return await asyncio.gather(hold("a"), hold("b"), hold("a"), return_exceptions=True)

    a, b, refused = run(main())
    assert (a, b) == ("a", "b")
    assert isinstance(refused, Rejected)
    assert refused.policy == "a"


def test_an_error_in_the_choice_reaches_the_caller_and_nothing_was_entered():
    places = Bulkhead("k", max_concurrent=1)
    call = Pipeline(places, PerTenant())(lambda tenant=None: tenant)
    with pytest.raises(KeyError):
        call()
    assert places.snapshot().active == places.snapshot().finished == 0


def test_a_block_has_no_arguments_to_choose_by():
    with pytest.raises(TypeError, match="PerTenant chooses by a call's arguments, which a block has not"):
        Pipeline(PerTenant()).scope()


def test_a_judge_sees_the_result_of_a_call_and_what_the_guards_further_in_made_of_its_error():
    judge = Judging()

    @Pipeline(judge, Timeout("t", 1.0))
    async def call(seconds):
        await asyncio.sleep(seconds)
        return "value"

    async def main():
        await call(0.5)
        with pytest.raises(TimeoutError):
            await call(5)

    run(main())
    first, second = judge.seen
    assert first == "value"
    assert issubclass(second, TimeoutError)


def test_a_judge_hears_of_a_permit_that_ended_by_hand():
    judge = Judging()
    Pipeline(judge).admit().success("by hand")
    assert judge.seen == ["by hand"]


def test_an_interrupt_in_a_judge_still_lets_every_guard_exit():
    class Interrupted(Judging):
        def judge(self, token, result, exc):
            raise KeyboardInterrupt

        def exit(self, token, now, exc):
            self.seen.append(type(exc))

    judge, places = Interrupted(), Bulkhead("k", max_concurrent=1)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(places, judge)(lambda: 1)()
    assert judge.seen == [KeyboardInterrupt]
    assert places.snapshot().active == 0


def test_a_predicate_that_raises_is_logged_and_harms_nobody(caplog):
    with caplog.at_level(logging.ERROR, logger="seawall"):
        assert ask(lambda value: 1 / value, 0, otherwise=7.0) == 7.0
    assert "the call goes on" in caplog.text


class Priced(Bulkhead):
    """Writes down the costs it is asked for."""

    def check_cost(self, cost):
        if cost > 4:
            raise ValueError(f"cost must be at most 4, got {cost}")
        return cost

    def enter_at(self, now, cost):
        self.asked = [*getattr(self, "asked", []), cost]
        return self.enter(now)


def test_a_call_costs_what_it_was_told_or_what_its_arguments_say():
    places = Priced("k", max_concurrent=9)
    fixed = costing(places, 3)(lambda: "fixed")
    reckoned = costing(places, len)(lambda text: text)
    assert (fixed(), reckoned("ab")) == ("fixed", "ab")
    with costing(places, 4).scope():
        assert places.snapshot().active == 1
    costing(places, 1).admit().success()
    assert places.asked == [3, 2, 4, 1]
    assert places.snapshot().active == 0


@pytest.mark.parametrize("cost", [0, -1, 5, 1.5, True, "2"])
def test_a_cost_that_no_call_can_pay_is_refused_where_it_is_given(cost):
    with pytest.raises((ValueError, TypeError), match=r"cost must be"):
        costing(Priced("k", max_concurrent=9), cost)


def test_settings_change_while_in_use_and_the_handle_stays():
    guard = Timeout("t", 1.0)
    call = guard(asyncio.sleep)

    async def main():
        with pytest.raises(TimeoutError):
            await call(1.5)
        guard.update(after=2.0)
        await call(1.5)

    run(main())
    assert policies_of(call) == (guard,)


def test_a_wrong_setting_changes_nothing_and_an_unknown_one_is_named():
    guard = Timeout("t", 1.0)
    with pytest.raises(ValueError, match="after must be more than 0"):
        guard.update(after=-1)
    with pytest.raises(TypeError, match="Timeout 't' has no setting afterr to change; it has after"):
        guard.update(afterr=3)
    assert guard.after == 1.0


def test_a_priority_holds_for_a_block_and_the_tasks_it_starts():
    async def seen():
        return current_priority.get()

    async def main():
        with priority(Priority.HIGH):
            task = asyncio.create_task(seen())
        return await task, await seen()

    assert asyncio.run(main()) == (Priority.HIGH, Priority.NORMAL)


def test_a_priority_is_one_of_five():
    with pytest.raises(ValueError, match="7 is not a valid Priority"), priority(7):
        pass


def test_a_limiter_and_a_chosen_guard_share_one_row():
    per_tenant = PerTenant()
    call = Pipeline(RateLimiter("r", rate=1, burst=1), per_tenant)(lambda tenant: tenant)
    call("a")
    with pytest.raises(Rejected):
        call("b")
    assert "b" in per_tenant.places  # chosen, for the choice is made before the row is entered
    assert per_tenant.places["b"].snapshot().finished == 0


class Counting:
    """Runs the calls of one tenant, and counts them."""

    streams = True

    def __init__(self):
        self.calls = 0

    async def around(self, call):
        self.calls += 1
        return await call()

    def around_sync(self, call):
        self.calls += 1
        return call()

    async def open_stream(self, call):
        self.calls += 1
        return call(), []


class AroundPerTenant:
    """A `Counting` a tenant."""

    streams = True

    def __init__(self):
        self.tenants = {"a": Counting(), "b": Counting()}

    def around_for(self, args, kwargs):
        return self.tenants[kwargs["tenant"]]


def test_an_around_chosen_by_the_arguments_passes_them_all_on():
    per_tenant = AroundPerTenant()

    @Pipeline(per_tenant)
    def plain(text, *, tenant):
        return text + tenant

    @Pipeline(per_tenant)
    async def coroutine(text, *, tenant):
        return text + tenant

    @Pipeline(per_tenant)
    async def stream(text, *, tenant):
        yield text + tenant

    async def main():
        return [await coroutine("2", tenant="b"), *[item async for item in stream("3", tenant="b")]]

    assert [plain("1", tenant="a"), *asyncio.run(main())] == ["1a", "2b", "3b"]
    assert [one.calls for one in per_tenant.tenants.values()] == [1, 2]


def test_an_interrupt_in_a_listener_gives_back_what_a_permit_had_entered():
    def interrupt(event):
        if event.after is State.HALF_OPEN:
            raise KeyboardInterrupt

    places = Bulkhead("k", max_concurrent=1)
    watch = CircuitBreaker("b", reset_timeout=1.0, listeners=[interrupt])
    with use_clock(lambda: 0.0):
        watch.force_open()
    with use_clock(lambda: 60.0), pytest.raises(KeyboardInterrupt):
        Pipeline(places, watch).admit()  # the first probe, which is an event
    assert places.snapshot().active == 0
