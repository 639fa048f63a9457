"""The five guards on trio, on trio's own mock clock."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from seawall import (
    SLO,
    Bulkhead,
    BulkheadFullError,
    CallTimeoutError,
    CircuitBreaker,
    Pipeline,
    RateLimiter,
    State,
    Timeout,
    use_clock,
)


def run(main):
    clock = MockClock(autojump_threshold=0)

    async def outer():
        with use_clock(trio.current_time):
            await main()

    trio.run(outer, clock=clock)


def test_five_guards_around_a_call():
    guards = [
        SLO("s", target=0.9),
        CircuitBreaker("b"),
        Bulkhead("k", max_concurrent=1),
        RateLimiter("r", rate=100),
        Timeout("t", 1.0),
    ]

    @Pipeline(*guards)
    async def call(x):
        await trio.sleep(0.5)
        return x + 1

    async def main():
        assert await call(1) == 2

    run(main)
    assert guards[0].counters() == {"good": 1, "bad": 0, "neither": 0}
    assert guards[2].snapshot().finished == 1


def test_waiters_are_served_in_order_and_cancelled_ones_leave_nothing():
    guard, order = Bulkhead("k", max_concurrent=1, max_queued=10, max_wait=100), []

    @guard
    async def call(number):
        order.append(number)
        await trio.sleep(1)

    async def main():
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(call, number)
                await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.5) as scope:
                await call("cancelled")
            assert scope.cancelled_caught
            nursery.start_soon(call, 3)

    run(main)
    assert order == [0, 1, 2, 3]
    assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)


def test_a_wait_ends_when_it_must():
    guard = Bulkhead("k", max_concurrent=1, max_queued=10, max_wait=2)

    async def main():
        held = guard.admit()
        start = trio.current_time()
        with pytest.raises(BulkheadFullError):
            await guard(trio.sleep)(0)
        assert trio.current_time() - start == pytest.approx(2)
        held.success()

    run(main)


def test_a_limiter_spaces_calls():
    guard, starts = RateLimiter("r", rate=2, burst=1, max_wait=10), []

    @guard
    async def call():
        starts.append(trio.current_time())

    async def main():
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(call)

    run(main)
    assert [at - starts[0] for at in starts] == [pytest.approx(number / 2, abs=1e-5) for number in range(4)]


def test_a_timeout_cancels_a_function_a_block_and_an_item():
    guard = Timeout("t", 1.0)

    @guard
    async def stream():
        for seconds in (0.9, 0.9, 5.0):
            await trio.sleep(seconds)
            yield seconds

    async def main():
        with pytest.raises(CallTimeoutError):
            await guard(trio.sleep)(5)
        with pytest.raises(CallTimeoutError):
            async with guard:
                await trio.sleep(5)
        seen = []
        with pytest.raises(CallTimeoutError):
            async for item in stream():
                seen.append(item)
        assert seen == [0.9, 0.9]
        async with guard.scope():
            await trio.sleep(0.5)
        with pytest.raises(ZeroDivisionError):
            async with guard:
                raise ZeroDivisionError
        await trio.sleep(10)

    run(main)
    assert guard.counters()["timed_out"] == 3


def test_errors_of_a_nursery_come_out_of_a_timed_block_and_its_guards_exit():
    places = Bulkhead("k", max_concurrent=1)

    async def fail_later():
        await trio.sleep(0.5)
        raise ConnectionError

    async def main():
        with pytest.raises(ExceptionGroup):
            async with Pipeline(places, Timeout("t", 1.0)).scope(), trio.open_nursery() as nursery:
                nursery.start_soon(fail_later)
        with pytest.raises(ExceptionGroup):
            async with Pipeline(places, Timeout("t", 1.0)).scope(), trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, 50)
                try:
                    await trio.sleep(50)
                finally:
                    raise ConnectionError

    run(main)
    assert places.snapshot().active == 0


def test_a_cancelled_call_is_neither_and_stays_cancelled():
    guard = CircuitBreaker("b", consecutive_failures=1)

    async def main():
        with trio.move_on_after(1) as scope:
            await Pipeline(guard, Timeout("t", 5.0))(trio.sleep)(10)
        assert scope.cancelled_caught

    run(main)
    assert guard.snapshot().neither == 1
    assert guard.state is State.CLOSED


def test_a_plain_function_never_blocks_the_trio_thread():
    guard = Bulkhead("k", max_concurrent=1, max_queued=5, max_wait=100)

    async def main():
        held = guard.admit()
        with pytest.raises(BulkheadFullError):
            guard(lambda: None)()
        held.success()

    run(main)
