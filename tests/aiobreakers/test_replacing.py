"""A breaker of ours where one of theirs was."""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import threading
from datetime import timedelta

import aiobreaker
import pytest
from aiobreaker.storage import CircuitMemoryStorage

from seawall import Bulkhead, CircuitBreaker, CircuitOpenError, Pipeline, State, live
from seawall.aiobreakers import BridgedBreaker, CircuitBreakerError, to_seawall
from seawall.core import gate
from seawall.testing import AsyncScript, Script, after, no_leaks, run
from tests.cancelling import CancelAt

Theirs = aiobreaker.CircuitBreakerState
DOWN = ConnectionError("down")


def ours(**settings):
    return CircuitBreaker("bank", **{"consecutive_failures": 1, "reset_timeout": 30, **settings})


def fail(policy, times=1):
    for _ in range(times):
        with pytest.raises(ConnectionError):
            policy(Script(DOWN))()


def succeed(policy):
    assert policy(Script("ok"))() == "ok"


def refuse(policy):
    with pytest.raises(CircuitBreakerError) as caught:
        policy(Script())()
    return caught.value


class Listener(aiobreaker.CircuitBreakerListener):
    def __init__(self):
        self.heard = []

    def before_call(self, breaker, func, *args, **kwargs):
        assert callable(func)
        self.heard.append(f"{breaker.name} is called, {breaker.current_state.name}")

    def success(self, breaker):
        self.heard.append("success")

    def failure(self, breaker, exception):
        self.heard.append(f"failure {exception} of {breaker.fail_max}")

    def state_change(self, breaker, old, new):
        self.heard.append(f"{old.state.name} -> {new.state.name}, {type(new).__name__}")


def test_listeners_hear_calls_outcomes_and_changes_of_state(clock):
    listener = Listener()
    bank = BridgedBreaker(ours(ignore=KeyError), listeners=[listener])
    succeed(bank)
    with pytest.raises(KeyError):
        bank(Script(KeyError("neither")))()
    fail(bank)
    refuse(bank)
    clock.advance(30)
    succeed(bank)
    assert listener.heard == [
        "bank is called, CLOSED",
        "success",
        "bank is called, CLOSED",
        "bank is called, CLOSED",
        "CLOSED -> OPEN, CircuitOpenState",
        "failure down of 1",
        "OPEN -> HALF_OPEN, CircuitHalfOpenState",
        "bank is called, HALF_OPEN",
        "HALF_OPEN -> CLOSED, CircuitClosedState",
        "success",
    ]


def test_a_listener_that_raises_hurts_neither_the_call_nor_the_other_listeners(caplog):
    class Broken(aiobreaker.CircuitBreakerListener):
        def _raise(self, *args, **kwargs):
            raise LookupError("mine")

        before_call = success = failure = state_change = _raise

    listener = Listener()
    bank = BridgedBreaker(ours(), listeners=[Broken(), listener])
    succeed(bank)
    fail(bank)
    assert len(listener.heard) == 5
    assert caplog.text.count("LookupError: mine") == 5


def test_s5_a_listener_may_call_the_breaker_and_close_it():
    answers = []

    class Impatient(aiobreaker.CircuitBreakerListener):
        def state_change(self, breaker, old, new):
            if new.state is Theirs.OPEN:
                answers.append(refuse(bank).policy)
                breaker.close()

    bank = BridgedBreaker(ours(), listeners=[Impatient()], storage=CircuitMemoryStorage(Theirs.CLOSED))
    fail(bank)
    assert answers == ["bank"]
    assert bank.breaker.state is State.CLOSED
    succeed(bank)


def test_handlers_of_aiobreakers_error_go_on_working(clock):
    bank = BridgedBreaker(ours())
    fail(bank)
    clock.advance(10)
    error = refuse(bank)
    assert isinstance(error, aiobreaker.CircuitBreakerError)
    assert isinstance(error, CircuitOpenError)
    assert (error.policy, error.retry_after, error.message) == ("bank", 20.0, str(error))
    assert abs(error.reopen_time - dt.datetime.now() - timedelta(seconds=20)) < timedelta(seconds=5)  # noqa: DTZ005
    clock.advance(5)
    assert error.time_remaining == timedelta(seconds=15)
    clock.advance(50)
    assert error.time_remaining == timedelta(0)


def test_its_sleep_until_open_sleeps_until_a_probe_would_pass():
    async def main():
        bank = BridgedBreaker(ours())
        backend = bank(AsyncScript(DOWN, "ok"))
        with pytest.raises(ConnectionError):
            await backend()
        with pytest.raises(aiobreaker.CircuitBreakerError) as caught:
            await backend()
        await caught.value.sleep_until_open()
        assert await backend() == "ok"
        return asyncio.get_running_loop().time()

    assert run(main(), start=1.0) == 31.0


@pytest.mark.parametrize("reset_timeout", [1e308, 1e-310])
def test_absurd_timeouts_raise_nothing_of_their_own(reset_timeout):
    bank = BridgedBreaker(
        ours(reset_timeout=reset_timeout), listeners=[Listener()], storage=CircuitMemoryStorage(Theirs.CLOSED)
    )
    fail(bank)
    if reset_timeout > 1:
        refuse(bank)
    assert bank.view.opens_at is None or isinstance(bank.view.opens_at, dt.datetime)


def test_an_isolated_breaker_refuses_with_the_same_error():
    bank = BridgedBreaker(ours())
    bank.breaker.isolate()
    error = refuse(bank)
    assert "isolated" in error.message
    assert error.time_remaining == timedelta(0)
    assert bank.view.current_state is Theirs.OPEN


def test_a_refusal_further_in_stays_as_it_is():
    inner, cause = ours(), OSError("no route")
    inner.force_open()

    def call():
        try:
            inner(Script())()
        except CircuitOpenError as error:
            raise error from cause

    with pytest.raises(CircuitOpenError) as caught:
        BridgedBreaker(ours())(call)()
    assert type(caught.value) is CircuitOpenError
    assert caught.value.__cause__ is cause


def test_the_view_is_a_breaker_of_theirs_that_shows_ours(clock):
    bank = BridgedBreaker(ours(consecutive_failures=3))
    view = bank.view
    assert isinstance(view, aiobreaker.CircuitBreaker)
    fail(bank, 2)
    assert (view.name, view.fail_max, view.fail_counter, view.current_state) == ("bank", 3, 2, Theirs.CLOSED)
    assert view.timeout_duration == timedelta(seconds=30)
    view.open()
    assert bank.breaker.state is State.OPEN
    clock.advance(10)
    assert view.time_until_open == timedelta(seconds=20)
    view.close()
    assert bank.breaker.state is State.CLOSED
    bank.update(consecutive_failures=7)
    assert bank.view.fail_max == 7


def shared(**settings):
    storage = CircuitMemoryStorage(Theirs.CLOSED)
    return storage, BridgedBreaker(ours(**settings), storage=storage)


def theirs_with(storage, **settings):
    return aiobreaker.CircuitBreaker(timeout_duration=timedelta(seconds=30), state_storage=storage, **settings)


def test_who_opens_the_circuit_opens_it_for_all(clock):
    storage, bank = shared()
    others = theirs_with(storage)
    fail(bank)
    with pytest.raises(aiobreaker.CircuitBreakerError):
        others.call(Script())
    clock.advance(30)
    assert others.call(Script("ok")) == "ok"  # their probe closes it
    succeed(bank)
    others.open()
    clock.advance(10)
    assert refuse(bank).retry_after == 20.0


def test_who_closes_the_circuit_closes_it_for_all(clock):
    storage, bank = shared()
    fail(bank)
    theirs_with(storage).close()
    succeed(bank)
    assert bank.breaker.state is State.CLOSED


def test_failures_in_a_row_add_up_and_a_success_of_anybody_ends_the_row(clock):
    storage, bank = shared(consecutive_failures=4)
    others = theirs_with(storage, fail_max=4)
    fail(bank, 2)
    with pytest.raises(ConnectionError):
        others.call(Script(DOWN))
    succeed(bank)
    assert storage.counter == 0
    for _ in range(2):
        with pytest.raises(ConnectionError):
            others.call(Script(DOWN))
    fail(bank)
    with pytest.raises(ConnectionError):
        asyncio.run(bank(AsyncScript(DOWN))())
    assert bank.breaker.state is State.OPEN
    assert storage.state is Theirs.OPEN


def test_a_breaker_that_starts_while_the_circuit_is_open_refuses_for_the_time_that_is_left(clock):
    storage, bank = shared()
    fail(bank)
    clock.advance(25)
    restarted = BridgedBreaker(ours(), storage=storage)
    assert refuse(restarted).retry_after == 5.0
    clock.advance(4)
    assert refuse(restarted).retry_after == 1.0, "what came from the storage is not told to it as news"


def test_b01_of_fifty_calls_that_find_the_open_time_over_one_probes(clock):
    storage, bank = shared()
    fail(bank)
    restarted = BridgedBreaker(ours(), storage=storage)
    clock.advance(30)
    backend = AsyncScript(then=after(0, "ok"))
    release = asyncio.Event()

    @restarted
    async def call():
        await release.wait()
        return await backend()

    async def main():
        tasks = [asyncio.ensure_future(call()) for _ in range(50)]
        await asyncio.sleep(0)
        release.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = asyncio.run(main())
    assert len(backend.calls) == 1
    assert sum(isinstance(end, CircuitBreakerError) for end in ends) == 49
    assert storage.state is Theirs.CLOSED


def test_a_probe_of_ours_leaves_the_others_out(clock):
    storage, bank = shared()
    fail(bank)
    clock.advance(30)

    def probe():
        assert bank.breaker.state is State.HALF_OPEN
        assert storage.state is Theirs.OPEN, "half open would let their herd in"

    bank(probe)()
    assert storage.state is Theirs.CLOSED


def test_b29_a_wall_clock_that_steps_back_keeps_it_open_no_longer_than_the_timeout(clock, monkeypatch):
    storage, bank = shared()
    fail(bank)
    storage.opened_at += timedelta(hours=1)  # as somebody writes whose clock is an hour ahead
    assert refuse(BridgedBreaker(ours(), storage=storage)).retry_after == 30.0


def test_b37_a_call_that_ends_in_a_later_round_changes_nothing_in_the_storage(clock):
    storage, bank = shared(consecutive_failures=2)
    slow = bank(AsyncScript(after(10, DOWN)))

    async def main():
        task = asyncio.ensure_future(slow())
        await asyncio.sleep(1)
        bank.breaker.force_open()
        bank.breaker.force_closed()
        with pytest.raises(ConnectionError):
            await task

    run(main(), start=1.0)
    assert storage.counter == 0


class Written(CircuitMemoryStorage):
    """Remembers the states that were written."""

    def __init__(self):
        super().__init__(Theirs.CLOSED)
        self.states = []

    @property
    def state(self):
        return self._state

    @state.setter
    def state(self, state):
        self._state = state
        self.states.append(state.name)


def test_only_what_is_news_to_the_others_is_written(clock):
    storage = Written()
    bank = BridgedBreaker(ours(), storage=storage)
    succeed(bank)
    fail(bank)
    assert storage.states == ["OPEN"]
    theirs_with(storage).close()
    succeed(bank)
    succeed(bank)
    assert storage.states == ["OPEN", "CLOSED"], "closed by them, not once more by us"
    bank.breaker.force_open()
    bank.breaker.force_closed()
    succeed(bank)
    assert storage.states == ["OPEN", "CLOSED"], "open and closed again before anybody could know"


@pytest.mark.parametrize("by_hand", ["isolate", "disable", "metrics_only"])
def test_what_was_chosen_by_hand_is_no_affair_of_the_others(clock, by_hand):
    storage = Written()
    bank, others = BridgedBreaker(ours(), storage=storage), theirs_with(storage, fail_max=1)
    succeed(bank)
    getattr(bank.breaker, by_hand)()
    for change in (others.open, others.close):
        change()
        (refuse if by_hand == "isolate" else succeed)(bank)
        assert bank.breaker.state.name.startswith(by_hand.upper())
    assert storage.states == ["OPEN", "CLOSED"]
    assert not bank._shared.trips(99)


def test_listeners_hear_of_no_change_where_aiobreaker_has_no_other_state():
    listener = Listener()
    bank = BridgedBreaker(ours(), listeners=[listener])
    bank.breaker.disable()
    bank.breaker.metrics_only()
    assert listener.heard == []
    bank.breaker.isolate()
    assert listener.heard == ["CLOSED -> OPEN, CircuitOpenState"]


class Elsewhere(CircuitMemoryStorage):
    """Not in memory, as far as the bridge can tell: looks at who calls it."""

    def __init__(self, *, broken=False):
        self.threads, self.broken = set(), broken
        super().__init__(Theirs.CLOSED)

    def __getattribute__(self, name):
        if name in {"state", "counter", "increment_counter", "reset_counter"}:
            self.threads.add(threading.current_thread())
            free = []
            other = threading.Thread(target=lambda: free.append(gate.lock.acquire(timeout=30)) or gate.lock.release())
            other.start()
            other.join()
            assert free == [True], "the lock was held over I/O"
            if self.broken:
                raise OSError("no route to the storage")
        return super().__getattribute__(name)


@pytest.fixture
def remote(monkeypatch):
    monkeypatch.setattr("aiobreaker.storage.CircuitMemoryStorage", type("InMemory", (), {}))
    return Elsewhere


def test_storage_elsewhere_is_reached_without_the_lock_and_off_the_event_loop(remote):
    storage = remote()
    bank = BridgedBreaker(ours(), storage=storage)

    async def main():
        with pytest.raises(ConnectionError):
            await bank(AsyncScript(DOWN))()
        with pytest.raises(CircuitBreakerError):
            await bank(AsyncScript())()

    asyncio.run(main())
    assert storage.threads
    assert threading.main_thread() not in storage.threads
    refuse(bank)
    assert threading.main_thread() in storage.threads


def test_on_trio_too(remote):
    import trio

    storage = remote()
    bank = BridgedBreaker(ours(), storage=storage)

    async def main():
        with pytest.raises(ConnectionError):
            await bank(AsyncScript(DOWN))()
        with pytest.raises(CircuitBreakerError):
            await bank(AsyncScript())()

    trio.run(main)
    assert storage._state is Theirs.OPEN


def test_storage_that_raises_is_logged_and_the_breaker_goes_on_alone(remote, caplog):
    bank = BridgedBreaker(ours(), storage=remote(broken=True))
    succeed(bank)
    fail(bank)
    refuse(bank)
    assert "no route to the storage" in caplog.text


@pytest.mark.parametrize("outcome", ["ok", DOWN])
def test_a_cancellation_at_every_await_in_turn_leaves_nothing_behind(remote, outcome):
    async def once(step):
        places, storage = Bulkhead("places", max_concurrent=1), remote()
        bank = BridgedBreaker(ours(), storage=storage)
        call = CancelAt(Pipeline(places, bank)(AsyncScript(after(1e-9, outcome), then="ok"))(), step)

        async def use():
            return await call

        await asyncio.wait([task := asyncio.ensure_future(use())])
        assert task.cancelled() or not call.reached
        if not task.cancelled() and task.exception():
            assert task.exception() is DOWN
        assert (places.snapshot().active, bank.snapshot().probes) == (0, 0)
        if bank.breaker.state is State.CLOSED:
            assert await bank(AsyncScript("ok"))() == "ok"
        else:
            with pytest.raises(CircuitBreakerError):
                await bank(AsyncScript())()
            assert storage._state is Theirs.OPEN, "told at the next call at the latest"
        return call.reached

    async def main():
        step = 0
        while await once(step):
            step += 1
        return step

    with no_leaks():
        assert asyncio.run(main()) >= 3
    gc.collect()


def test_to_seawall_takes_over_settings_listeners_storage_and_name(clock):
    listener = Listener()
    theirs = aiobreaker.CircuitBreaker(
        fail_max=2, timeout_duration=timedelta(seconds=7), exclude=[KeyError], listeners=[listener], name="bank"
    )
    bank = to_seawall(theirs)
    fail(bank)
    with pytest.raises(KeyError):
        bank(Script(KeyError("ignored")))()
    fail(bank)
    assert refuse(bank).retry_after == 7.0, "b06: an ignored error ends no row of failures"
    assert theirs.current_state is Theirs.OPEN, "code that looks at the old object sees it"
    assert "failure down of 2" in listener.heard


def test_exclusions_that_are_functions_work_and_may_be_added_later(clock):
    theirs = aiobreaker.CircuitBreaker(fail_max=1, exclude=[lambda exc: "quota" in str(exc)])
    bank = to_seawall(theirs)
    theirs.add_excluded_exception(TimeoutError)
    for error in (OSError("quota"), TimeoutError("late")):
        with pytest.raises(type(error)):
            bank(Script(error))()
    assert bank.breaker.state is State.CLOSED
    fail(bank)
    assert bank.breaker.state is State.OPEN


def test_no_rate_of_failures_opens_what_aiobreaker_would_keep_closed():
    bank = to_seawall(aiobreaker.CircuitBreaker(fail_max=3))
    for _ in range(60):
        fail(bank, 2)
        succeed(bank)
    assert bank.breaker.state is State.CLOSED


def test_the_bridge_tells_what_its_breaker_does():
    heard, bank = [], BridgedBreaker(ours())
    bank.listen(heard.append)
    fail(bank)
    assert [event.after for event in heard] == [State.OPEN]
    assert (bank.counters(), bank.snapshot().opened) == (bank.breaker.counters(), 1)
    assert bank.gauges()["state.open"] == 1.0
    assert bank not in set(live()), "exporters read the breaker"


def test_storage_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="storage must be one of aiobreaker's"):
        BridgedBreaker(ours(), storage={})


def test_results_that_count_as_failures_add_up_too(clock):
    storage, bank = shared(consecutive_failures=2, on_result=lambda result: result == "bad")
    assert bank(Script("bad"))() == "bad"
    assert storage.counter == 1
    assert bank(Script("bad"))() == "bad"
    assert storage.state is Theirs.OPEN
