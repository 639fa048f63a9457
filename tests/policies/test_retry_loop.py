from __future__ import annotations

import asyncio
import gc
import math
from contextlib import suppress

import pytest

from seawall import CallTimeoutError, use_clock
from seawall.core import ambient, gate
from seawall.policies.retry import Reason, Retry
from seawall.policies.retry_budget import RetryBudget
from seawall.testing import VirtualClock, run


def now():
    return asyncio.get_running_loop().time()


def retry(**settings):
    return Retry("r", **{"on": ConnectionError, "wait": 1.0, **settings})


def plain(policy, *errors):
    """The numbers of the attempts that a plain block made, and the pauses."""
    numbers, clock, outcomes = [], VirtualClock(), iter(errors)
    with use_clock(clock):
        for attempt in policy.loop():
            with attempt:
                numbers.append(attempt.number)
                error = next(outcomes, None)
                if error is not None:
                    raise error
    return numbers, clock.slept


async def asynchronous(policy, *errors, work=0.0):
    numbers, outcomes = [], iter(errors)
    async for attempt in policy.loop():
        with attempt:
            numbers.append(attempt.number)
            await asyncio.sleep(work)
            error = next(outcomes, None)
            if error is not None:
                raise error
    return numbers, now()


def test_a_block_is_run_again_until_it_goes_well():
    policy = retry()
    assert plain(policy, ConnectionError(), ConnectionError()) == ([1, 2, 3], [1.0, 1.0])
    assert plain(policy) == ([1], [])
    assert run(asynchronous(policy, ConnectionError())) == ([1, 2], 1.0)
    assert list(policy.counters().values()) == [1, 2, 0, 0]


def test_the_last_error_of_a_block_is_raised_as_it_was():
    errors = [ConnectionError(n) for n in range(3)]
    policy = retry()
    with pytest.raises(ConnectionError) as caught:
        plain(policy, *errors)
    assert caught.value is errors[-1]
    with pytest.raises(ConnectionError) as caught:
        run(asynchronous(policy, *errors))
    assert caught.value is errors[-1]
    assert [error.__context__ for error in errors] == [None] * 3
    assert list(policy.counters().values()) == [0, 0, 0, 2]


def test_a_block_ends_at_other_errors_and_at_what_is_none():
    for error in (ValueError, KeyboardInterrupt):
        numbers = []
        with pytest.raises(error):
            for attempt in retry().loop():
                with attempt:
                    numbers.append(attempt.number)
                    raise error
        assert numbers == [1]


def test_the_time_limit_bounds_a_block():
    async def main():
        began = now()
        with pytest.raises(ConnectionError):
            await asynchronous(retry(timeout=3.0), ConnectionError(), work=1.5)
        assert now() - began == pytest.approx(3.0)  # in the second attempt
        with pytest.raises(CallTimeoutError):
            await asynchronous(retry(timeout=3.0), work=60)
        assert now() - began == pytest.approx(6.0)
        assert asyncio.current_task().cancelling() == 0
        assert ambient.deadline.get() == math.inf

    run(main())


def test_the_time_limit_of_a_block_is_the_deadline_inside_and_nowhere_else():
    seen = []
    with use_clock(VirtualClock()):
        for attempt in retry(timeout=5.0).loop():
            seen.append(ambient.deadline.get())
            with attempt:
                seen.append(ambient.deadline.get())
                if attempt.number == 1:
                    raise ConnectionError
    assert seen == [math.inf, 5.0, math.inf, 5.0]
    assert ambient.deadline.get() == math.inf


def test_a_plain_block_on_a_thread_that_runs_a_loop_gives_up_instead_of_blocking_it():
    heard = []

    async def main():
        with pytest.raises(ConnectionError):
            for attempt in retry(listeners=[heard.append]).loop():
                with attempt:
                    raise ConnectionError

    run(main())
    assert [event.reason for event in heard] == [Reason.EVENT_LOOP]


@pytest.mark.parametrize("ending", ["well", "failure", "break", "return", "cancelled in a pause", "no with"])
def test_a_block_gives_everything_back_to_its_budget(ending):
    budget = RetryBudget("b", window=None)

    async def block():
        async for attempt in retry(budget=budget).loop():
            if ending == "no with":
                continue
            with attempt:
                if ending in {"break", "return"}:
                    if attempt.number == 2:
                        break
                elif ending == "well" and attempt.number == 2:
                    continue
                raise ConnectionError
            if ending == "return":
                return

    async def main():
        task = asyncio.create_task(block())
        await asyncio.sleep(0.5)
        if ending == "cancelled in a pause":
            assert budget.snapshot().extra_in_flight == 1
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or ending != "failure" or task.exception()

    run(main())
    gc.collect()
    assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_block_that_is_over_gives_everything_back_at_once(error):
    budget = RetryBudget("b", window=None)
    loop = retry(budget=budget, wait=0.0).loop()
    with use_clock(VirtualClock()), suppress(BaseException):
        for attempt in loop:
            with attempt:
                if attempt.number == 1:
                    raise ConnectionError
                assert budget.snapshot().extra_in_flight == 1
                if error:
                    raise error
    assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)


def test_a_block_that_is_cancelled_in_a_pause_gives_everything_back_at_once():
    budget = RetryBudget("b", window=None)
    loop = retry(budget=budget).loop()

    async def block():
        async for attempt in loop:
            with attempt:
                raise ConnectionError

    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await block()
        assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)

    run(main())


def test_a_loop_that_is_over_stays_over():
    loop = retry().loop()
    for attempt in loop:
        with attempt:
            pass
    assert list(loop) == []


@pytest.mark.parametrize("failures", [0, 1, 3])
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_b38_a_block_leaves_no_reference_cycle(failures, timeout):
    def block():
        for attempt in policy.loop():
            with attempt:
                if attempt.number <= failures:
                    raise ConnectionError

    async def asynchronous_block():
        async for attempt in policy.loop():
            with attempt:
                if attempt.number <= failures:
                    raise ConnectionError

    async def garbage():
        gc.collect()
        with suppress(ConnectionError):
            await asynchronous_block()
        return gc.collect()

    policy = retry(timeout=timeout)
    gc.disable()
    try:
        with use_clock(VirtualClock()), suppress(ConnectionError):
            gc.collect()
            block()
        assert gc.collect() == 0
        assert run(garbage()) == 0
    finally:
        gc.enable()


def test_a_block_works_on_trio():
    import trio
    import trio.testing

    async def main():
        tries = 0
        with pytest.raises(ConnectionError):
            async for attempt in retry(timeout=5.0).loop():
                with attempt:
                    tries += 1
                    if tries == 1:
                        raise ConnectionError
                    await trio.sleep(60)
        assert (tries, trio.current_time() - began) == (2, pytest.approx(5.0, abs=0.01))

    clock = trio.testing.MockClock(autojump_threshold=0)
    with use_clock(clock.current_time):
        began = clock.current_time()
        trio.run(main, clock=clock)


def test_on_trio_too_the_time_limit_of_a_block_is_the_deadline_inside_and_nowhere_else():
    trio = pytest.importorskip("trio")
    seen = []

    async def main():
        async for attempt in retry(timeout=5.0).loop():
            with attempt:
                seen.append(ambient.deadline.get() - gate.now())
        seen.append(ambient.deadline.get())

    trio.run(main)
    assert 4.0 < seen[0] <= 5.0
    assert seen[1] == math.inf
