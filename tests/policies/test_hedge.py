from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import math
import random
import statistics
import sys
import threading
import weakref
from collections import Counter
from datetime import timedelta

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from seawall import Bulkhead, CallTimeoutError, Deadline, Pipeline, Timeout, use_clock
from seawall.core import tasks
from seawall.core.timers import running_timers
from seawall.policies.hedge import Estimate, Hedge, HedgeLost, HedgeStarted, HedgeWon, Quantile
from seawall.policies.retry_budget import RetryBudget
from seawall.testing import AsyncScript, run

variable = contextvars.ContextVar("variable", default="nothing")


def now():
    return asyncio.get_running_loop().time()


def others():
    """Tasks that run beside the current one."""
    return asyncio.all_tasks() - {asyncio.current_task()}


class Attempts:
    """A function whose n-th attempt takes so long and then returns or raises what it is told."""

    def __init__(self, *script):
        self.script = script
        self.began = []
        self.ended = []

    async def __call__(self):
        number = len(self.began)
        seconds, outcome = self.script[number]
        self.began.append(now())
        try:
            await asyncio.sleep(seconds)
        finally:
            self.ended.append((number + 1, now()))
        if isinstance(outcome, (BaseException, type)):
            raise outcome
        return outcome


def is_good(result):
    return result != "bad"


# When attempts start, and which one wins


def test_a_quick_first_attempt_is_the_only_one():
    attempts = Attempts((0.99, "first"))
    hedge = Hedge("h", delay=1.0)

    async def main():
        assert await hedge(attempts)() == "first"
        assert now() == 0.99
        assert not others()

    run(main())
    assert attempts.began == [0.0]
    assert hedge.counters() == {
        "first_won": 1,
        "extra_won": 0,
        "failed": 0,
        "cancelled": 0,
        "extra": 0,
        "suppressed": 0,
    }


def test_another_attempt_starts_after_the_delay_and_the_first_good_answer_wins():
    heard = []
    attempts = Attempts((9.0, "first"), (2.0, "second"))
    hedge = Hedge("h", delay=1.0, listeners=[heard.append])

    async def main():
        assert await hedge(attempts)() == "second"
        assert now() == 3.0
        await asyncio.sleep(0)
        assert not others()

    run(main())
    assert attempts.began == [0.0, 1.0]
    assert attempts.ended == [(2, 3.0), (1, 3.0)]
    assert heard[:2] == [HedgeStarted("h", 1.0, 2, 1.0, None), HedgeWon("h", 3.0, 2, 3.0)]
    lost = heard[2]
    assert (lost.attempt, lost.after) == (1, 3.0)
    assert isinstance(lost.error, asyncio.CancelledError)
    assert len(heard) == 3
    assert hedge.snapshot().extra_won == 1
    assert hedge.snapshot().losing == 0


def test_each_further_attempt_waits_for_the_delay_again():
    attempts = Attempts((9.0, 1), (9.0, 2), (9.0, 3), (9.0, 4))
    hedge = Hedge("h", delay=timedelta(seconds=2), attempts=4)

    async def main():
        assert await hedge(attempts)() == 1

    run(main())
    assert attempts.began == [0.0, 2.0, 4.0, 6.0]
    assert hedge.snapshot().first_won == 1
    assert hedge.snapshot().extras == 3


def test_a_failed_attempt_is_followed_at_once_and_the_delay_begins_again():
    attempts = Attempts((0.5, ConnectionError()), (9.0, 2), (1.0, 3))

    async def main():
        assert await Hedge("h", delay=2.0, attempts=3)(attempts)() == 3

    run(main())
    assert attempts.began == [0.0, 0.5, 2.5]


def test_with_an_infinite_delay_attempts_come_one_after_another():
    heard, errors = [], [ConnectionError("1"), ConnectionError("2")]
    attempts = Attempts((1.0, errors[0]), (1.0, errors[1]), (5.0, "third"))

    async def main():
        assert await Hedge("h", delay=math.inf, attempts=3, listeners=[heard.append])(attempts)() == "third"

    run(main())
    assert attempts.began == [0.0, 1.0, 2.0]
    assert [event.error for event in heard if isinstance(event, HedgeStarted)] == errors


def test_without_delay_all_attempts_start_at_once():
    attempts = Attempts((5.0, 1), (4.0, 2), (3.0, 3))

    async def main():
        assert await Hedge("h", delay=0, attempts=3)(attempts)() == 3
        assert now() == 3.0

    run(main())
    assert attempts.began == [0.0, 0.0, 0.0]


def test_s6_the_first_completion_is_a_failure_and_the_call_waits_for_an_acceptable_one():
    attempts = Attempts((5.0, "first"), (0.5, ConnectionError()))

    async def main():
        assert await Hedge("h", delay=1.0)(attempts)() == "first"
        assert now() == 5.0

    run(main())


def test_a_result_that_is_not_acceptable_is_treated_like_a_failure():
    attempts = Attempts((1.0, "bad"), (1.0, "good"))

    async def main():
        assert await Hedge("h", delay=5.0, acceptable=is_good)(attempts)() == "good"
        assert now() == 2.0

    run(main())
    assert attempts.began == [0.0, 1.0]


def test_an_exception_that_is_not_listed_is_the_answer_at_once():
    heard = []
    attempts = Attempts((3.0, KeyError("k")), (9.0, "second"))
    hedge = Hedge("h", delay=1.0, on=ConnectionError, listeners=[heard.append])

    async def main():
        with pytest.raises(KeyError):
            await hedge(attempts)()
        assert now() == 3.0

    run(main())
    assert hedge.snapshot().failures == 1
    assert [type(event) for event in heard] == [HedgeStarted, HedgeLost]


@pytest.mark.parametrize("outcome", [ConnectionError("first"), "bad"])
def test_when_all_fail_the_caller_gets_the_first_ones_failure(outcome):
    heard = []
    attempts = Attempts((3.0, outcome), (0.5, ConnectionError("second")), (1.0, "bad"))
    hedge = Hedge("h", delay=1.0, attempts=3, acceptable=is_good, listeners=[heard.append])

    async def main():
        if outcome == "bad":
            assert await hedge(attempts)() == "bad"
        else:
            with pytest.raises(ConnectionError) as caught:
                await hedge(attempts)()
            assert caught.value is outcome
        assert now() == 3.0

    run(main())
    assert hedge.counters()["failed"] == 1
    assert [type(event) for event in heard] == [HedgeStarted, HedgeStarted]


def test_a_single_attempt_is_a_plain_call():
    hedge = Hedge("h", delay=1.0)
    hedge.update(attempts=1)

    async def main():
        assert await hedge(Attempts((9.0, "first")))() == "first"

    run(main())


def test_a_predicate_that_fails_takes_the_result(caplog):
    hedge = Hedge("h", delay=1.0, acceptable=lambda result: 1 / 0)

    async def main():
        assert await hedge(Attempts((0.5, "first")))() == "first"

    run(main())
    assert hedge.snapshot().first_won == 1
    assert "predicate" in caplog.text


@settings(max_examples=200, deadline=None)
@example(script=[(7, "bad"), (0, "bad"), (2, "fatal"), (0, "good")], delay=5, count=4)
@given(
    script=st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from(["good", "bad", "error", "fatal"])), min_size=4, max_size=4
    ),
    delay=st.integers(1, 5),
    count=st.integers(1, 4),
)
def test_it_agrees_with_a_plain_simulation(script, delay, count):
    # Each attempt takes another power of two besides, so that no two moments coincide, whose order would be luck.
    script = [(seconds + 2**index / 64, outcome) for index, (seconds, outcome) in enumerate(script)]
    began, at, answer = [0.0], 0.0, None
    failed = set()
    while answer is None:
        ends = {began[n] + script[n][0]: n for n in range(len(began)) if n not in failed}
        due = began[-1] + delay if len(began) < count else math.inf
        if not ends and due == math.inf:
            answer = 0
            break
        end = min(ends, default=math.inf)
        if end < due:
            at = end
            if script[ends[end]][1] in {"good", "fatal"}:
                answer = ends[end]
            else:
                failed.add(ends[end])
                if len(began) < count:
                    began.append(at)
        else:
            at = due
            began.append(at)
    outcomes = {"good": "good", "bad": "bad", "error": ConnectionError(), "fatal": KeyError()}
    expected = outcomes[script[answer][1]]
    attempts = Attempts(*[(seconds, outcomes[outcome]) for seconds, outcome in script])

    async def main():
        hedge = Hedge("h", delay=delay, attempts=count, on=ConnectionError, acceptable=is_good)
        (outcome,) = await asyncio.gather(hedge(attempts)(), return_exceptions=True)
        assert outcome is expected
        assert now() == pytest.approx(at, abs=1e-5)
        await asyncio.sleep(0)
        assert not others()

    run(main())
    assert attempts.began == [pytest.approx(moment, abs=1e-5) for moment in began]


# Losers


def test_b32_a_loser_that_resists_its_cancellation_delays_nobody():
    ends, heard = [], []
    hedge = Hedge("h", delay=1.0, listeners=[heard.append])
    first = True

    @hedge
    async def call():
        nonlocal first
        if not first:
            return "second"
        first = False
        while now() < 60:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60 - now())
        ends.append(now())
        return "too late"

    async def main():
        assert await call() == "second"
        assert now() == 1.0
        assert hedge.snapshot().losing == hedge.gauges()["losing"] == 1
        await asyncio.sleep(100)
        assert hedge.snapshot().losing == 0
        assert not others()

    run(main())
    assert ends == [pytest.approx(60)]
    assert heard[-1] == HedgeLost("h", pytest.approx(60), 1, pytest.approx(60), None)
    assert not tasks._kept


def test_a_loser_is_held_until_it_ends_though_nobody_waits_for_it():
    waits_for = []

    @Hedge("h", delay=1.0)
    async def call():
        if now() >= 1.0:
            return "second"
        try:
            await asyncio.sleep(50)
        finally:
            future = asyncio.get_running_loop().create_future()
            waits_for.append(weakref.ref(future))
            await future
        return "first"

    async def main():
        await call()
        await asyncio.sleep(1)
        gc.collect()
        assert waits_for[0]() is not None

    run(main())


def test_two_good_answers_at_once_are_one_winner_and_one_loser():
    heard = []
    hedge = Hedge("h", delay=0.0, listeners=[heard.append])

    async def main():
        assert await hedge(Attempts((1.0, "first"), (1.0, "second")))() == "first"
        assert hedge.snapshot().losing == 0

    run(main())
    assert [type(event) for event in heard] == [HedgeStarted, HedgeLost, HedgeWon]
    assert (heard[1].attempt, heard[1].error) == (2, None)


def test_a_quick_call_leaves_no_timer_behind():
    async def main():
        await Hedge("h", delay=1000.0)(Attempts((1.0, "first")))()
        queues = running_timers()._queues() or {}
        assert not any(queues.values())

    run(main())


def test_what_losers_raise_is_an_event_and_nothing_else(caplog):
    heard = []
    error = ConnectionError("while it was cancelled")

    @Hedge("h", delay=1.0, listeners=[heard.append])
    async def call():
        if now() >= 1.0:
            return "second"
        try:
            await asyncio.sleep(50)
        finally:
            raise error

    async def main():
        assert await call() == "second"
        await asyncio.sleep(10)

    with caplog.at_level(logging.DEBUG):
        run(main())
        gc.collect()
    assert [event.error for event in heard if isinstance(event, HedgeLost)] == [error]
    assert "never retrieved" not in caplog.text


def test_a_loser_ends_with_its_loop_at_the_latest():
    ended = []

    @Hedge("h", delay=1.0)
    async def call():
        if now() >= 1.0:
            return "second"
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            await asyncio.sleep(1e6)
        finally:
            ended.append(now())
        return None

    async def main():
        assert await call() == "second"
        await asyncio.sleep(10)
        assert len(others()) == 1

    run(main())
    assert ended == [11.0]
    assert not tasks._kept


def test_a_loop_that_is_closed_over_a_loser_is_not_held():
    async def hang():
        event = asyncio.Event()
        hedge = Hedge("h", delay=0.0)
        first = []

        @hedge
        async def call():
            if first:
                return "second"
            first.append(1)
            try:
                await event.wait()
            except asyncio.CancelledError:
                await event.wait()
            return "never"

        assert await call() == "second"
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending", as it says of any task
    loop.run_until_complete(hang())
    loop.close()
    assert len(tasks._kept) == 1
    gone = weakref.ref(loop)
    del loop
    run(hang())
    gc.collect()
    assert gone() is None
    assert not tasks._kept


def test_the_winners_resources_outlive_its_attempt():
    class Response:
        open = True

        async def pump(self):
            try:
                await asyncio.sleep(1e6)
            finally:
                self.open = False

    made = []

    @Hedge("h", delay=1.0)
    async def call():
        response = Response()
        response.pumping = asyncio.create_task(response.pump())
        made.append(response)
        await asyncio.sleep(3.0 if len(made) == 1 else 1.0)
        return response

    async def main():
        response = await call()
        assert response is made[1]
        await asyncio.sleep(100)
        assert response.open
        for one in made:
            one.pumping.cancel()
        await asyncio.sleep(0)

    run(main())


# Context


def test_contextvars_set_inside_the_call_are_kept_those_of_the_winner():  # B39
    unset = contextvars.ContextVar("unset")
    attempt = iter("ab")

    @Hedge("h", delay=1.0)
    async def call():
        assert variable.get() == "caller's"
        name = next(attempt)
        variable.set(name)
        unset.set(name)
        await asyncio.sleep({"a": 9.0, "b": 1.0}[name])
        variable.set(variable.get() + "!")

    async def main():
        variable.set("caller's")
        await call()
        assert variable.get() == "b!"
        assert unset.get() == "b"

    run(main())


def test_what_failed_attempts_set_is_lost():
    @Hedge("h", delay=1.0)
    async def call():
        variable.set("changed")
        raise ConnectionError

    async def main():
        variable.set("caller's")
        with pytest.raises(ConnectionError):
            await call()
        assert variable.get() == "caller's"

    run(main())


# The caller is cancelled


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_a_cancelled_caller_cancels_its_attempts_and_waits_for_their_end(at, delay):
    guard = Bulkhead("b", max_concurrent=9)
    budget = RetryBudget("r", window=None)
    hedge = Hedge("h", delay=delay, attempts=3, budget=budget)
    entered, cleaned = [], []

    @Pipeline(hedge, guard)
    async def call():
        entered.append(now())
        try:
            await asyncio.sleep(50)
        finally:
            await asyncio.sleep(0.25)
            cleaned.append(now())

    async def main():
        task = asyncio.create_task(call())
        await asyncio.sleep(at)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert cleaned == [at + 0.25] * len(entered)
        assert now() == (at + 0.25 if entered else at)
        assert guard.snapshot().active == 0
        assert not others()

    run(main())
    assert hedge.counters()["cancelled"] in {0, 1}  # 0: before its first step
    assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)


def test_a_caller_cancelled_at_every_step_of_the_loop_leaves_nothing():
    async def main():
        loop = asyncio.get_running_loop()
        for steps in range(30):
            guard, budget = Bulkhead("b", max_concurrent=9), RetryBudget("r", window=None)

            async def call():
                for _ in range(5):
                    await asyncio.sleep(0)

            hedge = Hedge("h", delay=0.0, attempts=3, budget=budget)
            task = loop.create_task(Pipeline(hedge, guard)(call)())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not others()
            assert guard.snapshot().active == hedge.snapshot().losing == 0
            assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)

    run(main())


def test_each_cancellation_of_the_caller_reaches_a_stubborn_attempt():
    caught = []

    @Hedge("h", delay=math.inf)
    async def call():
        while len(caught) < 3:
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                caught.append(now())

    async def main():
        task = asyncio.create_task(call())
        for _ in range(3):
            await asyncio.sleep(1.0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 3

    run(main())
    assert caught == [1.0, 2.0, 3.0]


def test_timeouts_around_and_inside_work():
    attempts = Attempts((50.0, 1), (50.0, 2))

    async def main():
        with pytest.raises(CallTimeoutError):
            await Pipeline(Timeout("t", 3.0), Hedge("h", delay=1.0))(attempts)()
        assert now() == pytest.approx(3.0, abs=1e-5)
        assert not others()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await Hedge("h", delay=1.0)(asyncio.sleep)(50)
        assert asyncio.current_task().cancelling() == 0
        with pytest.raises(CallTimeoutError):  # of the first attempt; the second had one too
            await Pipeline(Hedge("h", delay=1.0), Timeout("t", 3.0))(asyncio.sleep)(50)

    run(main())
    assert attempts.began == [0.0, 1.0]


def test_a_cancellation_in_the_moment_of_the_answer_wins():
    answered = []

    @Hedge("h", delay=1.0)
    async def call():
        await asyncio.sleep(0.5)
        answered.append(asyncio.get_running_loop().call_soon(caller.cancel))
        return "answer"

    async def main():
        nonlocal caller
        caller = asyncio.create_task(call())
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert answered
        assert not others()

    caller = None
    run(main())


def test_an_attempt_that_somebody_else_cancels_ends_the_call_even_before_its_first_step():
    async def main():
        for steps in (1, 2, 3):
            call = asyncio.create_task(Hedge("h", delay=math.inf)(asyncio.sleep)(50))
            for _ in range(steps):
                await asyncio.sleep(0)
            attempts = others() - {call}
            assert len(attempts) == 1
            attempts.pop().cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert call.cancelling() == 0

    run(main())


def test_a_caller_that_is_dropped_cancels_its_attempts():
    async def main():
        ended = []

        async def work():
            try:
                await asyncio.sleep(1e6)
            finally:
                ended.append(now())

        call = Hedge("h", delay=1.0)(work)()
        call.send(None)
        await asyncio.sleep(0.5)
        assert len(others()) == 1
        call.close()
        await asyncio.sleep(0)
        assert ended == [0.5]
        assert not others()

    run(main())


def test_a_caller_that_is_dropped_when_its_loop_is_closed_harms_nobody():
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    calls = []

    async def main():
        calls.append(Hedge("h", delay=1.0)(asyncio.Event().wait)())
        calls[0].send(None)

    loop.run_until_complete(main())
    loop.close()
    calls.pop().close()


def test_an_exit_of_the_program_in_an_attempt_is_the_callers():
    async def leave():
        raise SystemExit(3)

    async def main():
        with pytest.raises(SystemExit):
            await Hedge("h", delay=1.0)(leave)()

    run(main())


# Budget and deadline


def test_an_exhausted_budget_suppresses_the_new_attempt_only():
    budget = RetryBudget("r", ratio=0.2, floor=1, window=None)
    hedge = Hedge("h", delay=1.0, budget=budget)

    async def main():
        calls = [asyncio.create_task(hedge(Attempts((9.0, "first"), (3.0, "second")))()) for _ in range(3)]
        await asyncio.sleep(2.0)
        assert budget.snapshot().extra_in_flight == 1
        assert budget.snapshot().in_flight == 3
        assert await asyncio.gather(*calls) == ["second", "first", "first"]

    run(main())
    assert hedge.counters()["extra"] == 1
    assert hedge.counters()["suppressed"] == 2
    assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)


def test_an_extra_attempt_weighs_on_the_budget_until_it_has_ended_even_if_it_lost():
    budget = RetryBudget("r", window=None)
    count = 0

    @Hedge("h", delay=1.0, budget=budget)
    async def call():
        nonlocal count
        count += 1
        if count == 1:
            await asyncio.sleep(2.0)
            return "first"
        try:
            await asyncio.sleep(50)
        finally:
            await asyncio.sleep(7.0)

    async def main():
        assert await call() == "first"
        assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 1)
        await asyncio.sleep(7.5)
        assert budget.snapshot().extra_in_flight == 0

    run(main())


def test_no_attempt_starts_after_the_deadline_of_the_call_around_it():
    attempts = Attempts((1.5, ConnectionError("first")), (50.0, 2))

    # The first failed in time: another attempt may start.
    async def in_time():
        with pytest.raises(TimeoutError):
            await Pipeline(Deadline("d", 2.0), Hedge("h", delay=2.5))(attempts)()

    run(in_time())
    assert attempts.began == [0.0, 1.5]
    attempts = Attempts((5.0, "first"), (1.0, "second"))

    async def ignores_its_deadline():
        @Hedge("h", delay=3.0)
        async def call():
            return await attempts()

        with Deadline("d", 2.0).scope():  # of plain code, so it cancels nothing
            assert await call() == "first"

    run(ignores_its_deadline())
    assert attempts.began == [0.0]
    attempts = Attempts((2.5, ConnectionError("too late for another")))

    async def fails_after_its_deadline():
        @Hedge("h", delay=3.0)
        async def call():
            return await attempts()

        with Deadline("d", 2.0).scope(), pytest.raises(ConnectionError):
            await call()

    run(fails_after_its_deadline())
    assert attempts.began == [0.0]


# The delay that follows the latencies


def exact(numbers, quantile):
    return sorted(numbers)[math.floor(quantile * len(numbers))]


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("draw", ["uniform", "gauss", "exponential"])
def test_the_estimate_is_the_exact_quantile_of_a_stream(quantile, draw):
    rng = random.Random(7)
    one = {
        "uniform": lambda: rng.uniform(1, 2),
        "gauss": lambda: abs(rng.gauss(5, 1)),
        "exponential": lambda: rng.expovariate(1),
    }
    numbers = [one[draw]() for _ in range(20_000)]
    estimate, seen, below = Estimate(quantile, age=100), [], 0
    for count, number in enumerate(numbers):
        if count >= 2_000:
            seen.append(estimate.value)
            below += number < estimate.value
        estimate.add(number)
    spread = statistics.pstdev(numbers)
    assert below / len(seen) == pytest.approx(quantile, abs=0.01)
    assert statistics.fmean(seen) == pytest.approx(exact(numbers, quantile), abs=0.2 * spread)
    assert statistics.pstdev(seen) < 0.4 * spread


def test_the_estimate_follows_a_change_in_both_directions():
    rng = random.Random(7)
    estimate = Estimate(0.9, age=100)
    for low, high in ((1, 2), (10, 20), (0.1, 0.2)):
        for _ in range(3_000):
            estimate.add(rng.uniform(low, high))
        assert low < estimate.value < high


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.95])
def test_the_estimate_follows_a_jump_to_latencies_that_hardly_vary(quantile):
    rng = random.Random(7)
    estimate = Estimate(quantile, age=100)
    for mean in (1.0, 1000.0, 1.0):
        for _ in range(2_000):
            estimate.add(rng.gauss(mean, 0.01))
        assert estimate.value == pytest.approx(mean, abs=1.0)


def test_that_a_number_is_at_least_so_much_is_all_the_estimate_needs_above_its_value():
    rng = random.Random(7)
    estimate, below, count = Estimate(0.9, age=100), 0, 0
    for round_ in range(30_000):
        number = rng.expovariate(1)
        if round_ > 3_000:
            count += 1
            below += number < estimate.value
        if round_ and number > estimate.value:
            estimate.add_at_least(estimate.value * 1.01)  # it was cancelled then
        else:
            estimate.add(number)
    assert below / count == pytest.approx(0.9, abs=0.02)
    before = estimate.value
    estimate.add_at_least(before / 2)
    assert before == estimate.value


@given(
    numbers=st.lists(st.floats(0, 1e300), max_size=50),
    quantile=st.floats(0, 1, exclude_min=True, exclude_max=True),
    age=st.integers(1, 10**30),
)
@example(numbers=[1.0, 1.0, 0.5], quantile=5e-324, age=1)
@example(numbers=[1.0, 1.0, 2.0], quantile=1 - 1e-16, age=1)
def test_no_number_breaks_the_estimate(numbers, quantile, age):
    estimate = Estimate(quantile, age=age)
    for number in numbers:
        estimate.add(number)
        assert 0 <= estimate.value < math.inf
    assert len(numbers) == estimate.count


def test_the_delay_follows_the_latencies_once_enough_were_seen():
    hedge = Hedge("h", delay=Quantile(0.9, initial=7.0, minimum_calls=50))
    rng = random.Random(7)

    async def main():
        call = hedge(asyncio.sleep)
        for number in range(2_000):
            assert (hedge.current_delay == 7.0) == (number < 50)
            await call(rng.uniform(1.0, 2.0))
        assert hedge.current_delay == hedge.snapshot().delay == hedge.gauges()["delay"]
        assert hedge.current_delay == pytest.approx(1.9, abs=0.15)
        assert hedge.counters()["extra"] == pytest.approx(200, abs=60)

    run(main())


def test_first_attempts_that_lost_or_were_cancelled_count_as_slow():
    hedge = Hedge("h", delay=Quantile(0.5, initial=1.0, minimum_calls=1, least=0.5))

    async def main():
        for _ in range(20):
            assert await hedge(Attempts((1.0, "first"), (1.0, "second")))() == "first"
        before = hedge.current_delay
        for _ in range(200):
            assert await hedge(Attempts((60.0, "first"), (1.0, "second")))() == "second"
        assert hedge.current_delay > before
        learned = hedge.current_delay
        for _ in range(20):
            with pytest.raises(CallTimeoutError):
                await Pipeline(Timeout("t", 10.0), hedge)(Attempts((60.0, "first"), (60.0, "second")))()
        assert hedge.current_delay > learned
        learned = hedge.current_delay
        with pytest.raises(CallTimeoutError):  # too early to say anything
            await Pipeline(Timeout("t", 0.1), hedge)(Attempts((60.0, "first")))()
        await asyncio.gather(hedge(Attempts((0.01, ValueError()), (1.0, "second")))())  # a failure is no latency
        assert learned == hedge.current_delay

    run(main())


def test_an_error_that_is_the_answer_is_no_latency_either():
    hedge = Hedge("h", delay=Quantile(0.5, initial=7.0, minimum_calls=1), on=ConnectionError)

    async def main():
        with pytest.raises(KeyError):
            await hedge(Attempts((1.0, KeyError())))()
        assert hedge.current_delay == 7.0

    run(main())


def test_the_delay_never_falls_below_its_least():
    hedge = Hedge("h", delay=Quantile(0.5, minimum_calls=1, least=0.5))

    async def main():
        for _ in range(10):
            await hedge(asyncio.sleep)(0.01)
        assert hedge.current_delay == 0.5

    run(main())


def test_nearly_equal_delays_are_one_so_that_calls_share_a_timer():
    hedge = Hedge("h", delay=Quantile(0.95, minimum_calls=1, least=0))
    rng = random.Random(7)
    delays = Counter()

    async def main():
        for _ in range(2_000):
            await hedge(asyncio.sleep)(rng.gauss(1.0, 0.05))
            delays[hedge.current_delay] += 1

    run(main())
    assert len(delays) < 10


# What it refuses, and settings


def test_plain_functions_and_generators_are_refused_with_the_reason():
    hedge = Hedge("h", delay=1.0)
    with pytest.raises(TypeError, match="Hedge needs an event loop"):

        @hedge
        def plain(): ...

    with pytest.raises(TypeError, match="Hedge needs an event loop"):

        @hedge
        def numbers():
            yield 1

    with pytest.raises(TypeError, match="Hedge runs whole calls"):

        @hedge
        async def stream():
            yield 1


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"delay": -1.0}, ValueError, "delay must be 0 or more, got -1.0 s"),
        ({"delay": math.nan}, ValueError, "got nan s"),
        ({"delay": "1"}, TypeError, "delay must be a number of seconds or a timedelta, got '1'"),
        ({"delay": True}, TypeError, "got True"),
        ({"delay": None}, TypeError, "got None"),
        ({"delay": 1.0, "attempts": 0}, ValueError, "attempts must be 1 or more, got 0"),
        ({"delay": 1.0, "attempts": 11}, ValueError, "attempts must be 10 or fewer, got 11"),
        ({"delay": 1.0, "attempts": 2.0}, TypeError, "attempts must be a whole number"),
        ({"delay": 1.0, "on": ValueError()}, TypeError, "on must be an exception class"),
        ({"delay": 1.0, "acceptable": 1}, TypeError, "acceptable must be a plain function of the result, got 1"),
        ({"delay": 1.0, "acceptable": asyncio.sleep}, TypeError, "acceptable must be a plain function"),
        ({"delay": 1.0, "acceptable": AsyncScript()}, TypeError, "acceptable must be a plain function"),
        ({"delay": 1.0, "budget": 0.2}, TypeError, "budget must be a RetryBudget or do what one does, got 0.2"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(setting, error, message):
    with pytest.raises(error, match=message):
        Hedge("h", **setting)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"quantile": 1}, r"quantile must be in \(0, 1\), got 1"),
        ({"quantile": 95}, "for 95 % write 0.95"),
        ({"initial": -1}, "initial must be 0 or more"),
        ({"minimum_calls": 0}, "minimum_calls must be 1 or more"),
        ({"age": 0}, "age must be 1 or more"),
        ({"least": math.inf}, "least must be 0 or more and finite"),
    ],
)
def test_a_bad_quantile_is_refused_with_its_value_and_the_rule(settings_, message):
    with pytest.raises(ValueError, match=message):
        Quantile(**settings_)


@pytest.mark.parametrize("delay", [1e308, 1e-310, math.inf, 5e-324, 0])
def test_absurd_delays_work(delay):
    async def main():
        assert await Hedge("h", delay=delay)(Attempts((1.0, "first"), (2.0, "second")))() == "first"
        hedge = Hedge("h", delay=Quantile(1e-310, initial=delay, minimum_calls=1, age=10**400, least=1e308))
        for _ in range(3):
            assert await hedge(Attempts((1.0, "first"), (2.0, "second")))() == "first"

    run(main())


def test_settings_change_while_calls_are_in_flight():
    hedge = Hedge("h", delay=1.0)

    async def main():
        attempts = Attempts((9.0, 1), (9.0, 2), (1.0, 3))
        call = asyncio.create_task(hedge(attempts)())
        await asyncio.sleep(0.5)
        hedge.update(attempts=3, delay=timedelta(seconds=4))
        assert await call == 3  # it keeps its delay
        assert attempts.began == [0.0, 1.0, 2.0]
        slow = Attempts((9.0, 1), (1.0, 2))
        assert await hedge(slow)() == 2
        assert slow.began[1] - slow.began[0] == 4.0

    run(main())
    with pytest.raises(ValueError, match="got 0"):
        hedge.update(attempts=0)
    assert (hedge.attempts, hedge.delay) == (3, 4.0)


def test_a_quantile_that_stays_keeps_what_it_learned():
    hedge = Hedge("h", delay=Quantile(0.9, initial=9.0, minimum_calls=1))

    async def main():
        await hedge(asyncio.sleep)(1.0)
        assert hedge.current_delay == 1.0
        hedge.update(attempts=3)
        assert hedge.current_delay == 1.0
        hedge.update(delay=Quantile(0.5, initial=9.0, minimum_calls=1))
        assert hedge.current_delay == 9.0

    run(main())


# Leaks, threads, loops


@pytest.mark.parametrize("outcome", ["good", "error", "hedged", "both fail", "cancelled"])
def test_a_call_leaves_no_reference_cycle(outcome):
    script = {
        "good": [(0.1, "x")],
        "error": [(0.1, KeyError)],  # classes: a frame that holds the error it raised would be a cycle of its own
        "hedged": [(9.0, "x"), (0.1, "y")],
        "both fail": [(1.5, ConnectionError), (0.1, ConnectionError)],
        "cancelled": [(9.0, "x"), (9.0, "y")],
    }[outcome]
    hedge = Hedge("h", delay=1.0, on=ConnectionError)

    async def scene():
        with contextlib.suppress(KeyError, ConnectionError, TimeoutError):
            async with asyncio.timeout(5):
                await hedge(Attempts(*script))()
        await asyncio.sleep(0)

    async def main():
        await scene()
        gc.collect()
        gc.disable()
        try:
            await scene()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            ours = [one for one in gc.garbage if "seawall" in type(one).__module__ or "Error" in type(one).__name__]
            assert ours == []
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    run(main())


def test_one_hedge_serves_several_loops_in_several_threads():
    hedge = Hedge("h", delay=0.002, budget=RetryBudget("r", ratio=1.0, floor=1000, window=None))
    slow = contextvars.ContextVar("slow")

    @hedge
    async def call(number):
        first = slow.get() == []
        slow.get().append(1)
        await asyncio.sleep(0.01 if first and number % 2 else 0)
        return number

    async def one(number):
        slow.set([])
        return await call(number)

    async def main():
        for _ in range(10):
            assert await asyncio.gather(*(one(number) for number in range(20))) == list(range(20))

    errors = []

    def work():
        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    snapshot = hedge.snapshot()
    assert snapshot.first_won + snapshot.extra_won == 3 * 200
    assert snapshot.losing == 0


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_eager_tasks_change_nothing():
    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)

        async def at_once():
            return "at once"

        assert await Hedge("h", delay=1.0)(at_once)() == "at once"
        assert await Hedge("h", delay=1.0)(Attempts((9.0, 1), (1.0, 2)))() == 2

    run(main())


def test_a_loop_that_makes_no_tasks_is_reported_and_leaves_nothing():
    def broken(loop, coro, **kwargs):
        raise RuntimeError("no tasks today")

    budget = RetryBudget("r", window=None)

    async def main():
        asyncio.get_running_loop().set_task_factory(broken)
        with pytest.raises(RuntimeError, match="no tasks today"):
            await Hedge("h", delay=1.0, budget=budget)(asyncio.sleep)(1)
        asyncio.get_running_loop().set_task_factory(None)

    run(main())
    assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)


# trio


def run_trio(main):
    async def outer():
        with use_clock(trio.current_time):
            return await main()

    return trio.run(outer, clock=MockClock(autojump_threshold=0))


class TrioAttempts(Attempts):
    async def __call__(self):
        number = len(self.began)
        seconds, outcome = self.script[number]
        self.began.append(trio.current_time())
        try:
            await trio.sleep(seconds)
        finally:
            self.ended.append((number + 1, trio.current_time()))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def test_on_trio_the_first_good_answer_wins_and_losers_are_cancelled():
    hedge = Hedge("h", delay=1.0, attempts=3)
    attempts = TrioAttempts((9.0, 1), (0.5, ConnectionError()), (1.0, 3))

    async def main():
        start = trio.current_time()
        assert await hedge(attempts)() == 3
        assert trio.current_time() - start == pytest.approx(2.5)
        await trio.testing.wait_all_tasks_blocked()
        assert {number for number, _ in attempts.ended} == {1, 2, 3}
        assert hedge.snapshot().losing == 0

    run_trio(main)


def test_on_trio_a_stubborn_loser_delays_nobody_and_ends_with_the_loop():
    ended = []
    count = 0

    @Hedge("h", delay=1.0)
    async def call():
        nonlocal count
        count += 1
        if count == 2:
            return "second"
        try:
            with trio.CancelScope(shield=True):
                await trio.sleep(60)
        finally:
            ended.append(trio.current_time())

    async def main():
        start = trio.current_time()
        assert await call() == "second"
        assert trio.current_time() - start == pytest.approx(1.0)

    run_trio(main)
    assert len(ended) == 1


def test_on_trio_the_winners_context_is_kept():
    count = iter("ab")

    @Hedge("h", delay=1.0)
    async def call():
        name = next(count)
        variable.set(name)
        await trio.sleep({"a": 9.0, "b": 1.0}[name])

    async def main():
        await call()
        assert variable.get() == "b"

    run_trio(main)


def test_on_trio_a_cancelled_caller_waits_for_the_end_of_its_attempts():
    hedge = Hedge("h", delay=1.0)
    ended = []

    @hedge
    async def call():
        try:
            await trio.sleep(50)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.25)
            ended.append(trio.current_time())

    async def main():
        start = trio.current_time()
        with trio.move_on_after(2) as scope:
            await call()
        assert scope.cancelled_caught
        assert trio.current_time() - start == pytest.approx(2.25)
        assert len(ended) == 2

    run_trio(main)
    assert hedge.snapshot().cancelled == 1


def test_on_trio_where_no_task_can_be_made_it_is_reported_and_leaves_nothing(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no tasks today")

    budget = RetryBudget("r", window=None)

    async def call():
        monkeypatch.setattr(trio.lowlevel, "spawn_system_task", broken)
        await trio.sleep(9)

    async def main():
        with pytest.raises(RuntimeError, match="no tasks today"):
            await Hedge("h", delay=1.0, budget=budget)(call)()

    run_trio(main)
    assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)


def test_on_trio_when_all_fail_the_caller_gets_the_first_ones_failure():
    attempts = TrioAttempts((3.0, ConnectionError("first")), (0.5, ConnectionError("second")))

    async def main():
        with pytest.raises(ConnectionError, match="first"):
            await Hedge("h", delay=1.0)(attempts)()

    run_trio(main)


def test_a_budget_that_looks_back_over_time_allows_another_attempt_when_the_last_is_forgotten():
    budget = RetryBudget("r", ratio=0.2, floor=0.1, window=10.0)  # one attempt in ten seconds, and a fifth of the calls
    call = Hedge("h", delay=1.0, budget=budget)(asyncio.sleep)

    async def main():
        await call(2)
        await call(2)
        assert (budget.snapshot().extras, budget.snapshot().refused) == (1, 1)
        await asyncio.sleep(30)
        await call(2)
        assert (budget.snapshot().extras, budget.snapshot().refused) == (2, 1)

    run(main())
