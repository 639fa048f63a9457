from __future__ import annotations

import asyncio
import threading
import time
from datetime import timedelta

import pytest

from seawall import CircuitBreaker, CircuitOpenError, RateLimiter, Timeout, use_clock
from seawall.core import gate
from seawall.testing import AsyncScript, VirtualClock, VirtualTimeLoop, after, run


def test_a_virtual_clock_stands_still_until_it_is_advanced():
    clock = VirtualClock(start=5.0)
    assert (clock(), clock()) == (5.0, 5.0)
    clock.advance(2.5)
    clock.advance(timedelta(seconds=2))
    assert clock() == 9.5
    assert clock.slept == []


def test_a_breaker_probes_when_the_virtual_clock_says_so():
    clock, bank = VirtualClock(), CircuitBreaker("bank", consecutive_failures=1, reset_timeout=30)
    with use_clock(clock):
        bank.admit().failure(OSError())
        clock.advance(29.9)
        with pytest.raises(CircuitOpenError):
            bank.admit()
        clock.advance(0.1)
        bank.admit().success()
    assert bank.state.value == "closed"


def test_pauses_of_plain_functions_pass_on_the_virtual_clock_and_are_remembered():
    clock, before = VirtualClock(), time.monotonic()
    with use_clock(clock):
        assert gate.pause_sync(3600)
        assert gate.pause_sync(60)
    assert clock() == 3660.0
    assert clock.slept == [3600.0, 60.0]
    assert time.monotonic() - before < 60


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize("method", ["advance", "sleep"])
def test_a_virtual_clock_never_goes_back_and_never_gets_lost(method, seconds):
    clock = VirtualClock()
    with pytest.raises((TypeError, ValueError), match="seconds must be"):
        getattr(clock, method)(seconds)
    assert (clock(), clock.slept) == (0.0, [])


def test_threads_that_advance_one_clock_lose_nothing():
    clock = VirtualClock()
    threads = [threading.Thread(target=lambda: [clock.advance(1) for _ in range(2000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock() == 16_000.0


def test_policies_are_told_the_loops_time_whichever_runner_made_the_loop_and_only_while_it_runs():
    limiter = RateLimiter("calls", rate=1, burst=1, max_wait=100)
    real = gate.clock

    async def main():
        for _ in range(11):
            async with limiter:
                pass
        assert gate.now() == asyncio.get_running_loop().time()
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(main()) == pytest.approx(10.0)
        assert gate.clock is real
        assert runner.run(asyncio.sleep(5, "rested")) == "rested"
        assert runner.get_loop().time() == pytest.approx(15.0)
    assert gate.clock is real


def test_a_run_that_fails_gives_the_real_clock_back():
    real = gate.clock

    async def main():
        raise OSError("down")

    with pytest.raises(OSError, match="down"):
        run(main())
    assert gate.clock is real


def test_on_trio_a_mock_clock_does_the_same():
    import trio
    import trio.testing

    bank = CircuitBreaker("bank", consecutive_failures=1, reset_timeout=3600)
    slow = bank(Timeout("bank", 2.0)(AsyncScript(after(60, "late"), "in time")))

    async def main():
        with use_clock(trio.current_time):
            begun = trio.current_time()
            with pytest.raises(TimeoutError):
                await slow()
            with pytest.raises(CircuitOpenError) as caught:
                await slow()
            await trio.sleep(caught.value.retry_after)
            return await slow(), trio.current_time() - begun

    answer, passed = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert (answer, passed) == ("in time", pytest.approx(3602.0))
