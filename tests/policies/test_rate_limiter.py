from __future__ import annotations

import asyncio
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import CallRejected, RateLimitedError, RateLimiter, Wait, use_clock
from seawall.testing import run


def admitted(guard, moments):
    inside = []
    for now in moments:
        try:
            guard.enter(now)
        except RateLimitedError:
            continue
        inside.append(now)
    return inside


@settings(deadline=None)
@given(
    gaps=st.lists(st.floats(0, 2), min_size=1, max_size=80),
    rate=st.floats(0.2, 50),
    burst=st.floats(1, 20),
    start=st.floats(0, 1e7),
)
def test_over_no_interval_does_it_admit_more_than_burst_and_rate(gaps, rate, burst, start):
    moments = [start]
    for gap in gaps:
        moments.append(moments[-1] + gap)
    inside = admitted(RateLimiter("r", rate=rate, burst=burst), moments)
    for first in range(len(inside)):
        for last in range(first, len(inside)):
            assert last - first + 1 <= burst + rate * (inside[last] - inside[first] + 1e-5)


@given(
    rate=st.floats(0.01, 1e5),
    burst=st.integers(1, 10),
    start=st.floats(0, 1e8),
    used=st.integers(0, 30),
)
def test_a_call_after_retry_after_gets_in_and_one_just_before_does_not(rate, burst, start, used):
    guard = RateLimiter("r", rate=rate, burst=burst)
    for _ in range(burst):
        guard.enter(start)
    for _ in range(used):
        with pytest.raises(RateLimitedError) as refused:
            guard.enter(start)
        now = start + refused.value.retry_after
        if refused.value.retry_after > 1e-3:
            with pytest.raises(RateLimitedError):
                guard.enter(now - 1e-5)
        guard.enter(now)
        start = now


def test_calls_on_the_dot_all_get_in():
    guard = RateLimiter("r", rate=3, burst=1)
    assert len(admitted(guard, [number / 3 for number in range(1000)])) == 1000


def test_unused_time_is_saved_up_to_the_burst_only():
    guard = RateLimiter("r", rate=10, per=1.0, burst=4)
    assert len(admitted(guard, [0.0] * 10)) == 4
    assert len(admitted(guard, [0.2] * 10)) == 2
    assert len(admitted(guard, [1000.0] * 10)) == 4


def test_the_burst_is_the_rate_rounded_down_unless_told():
    assert RateLimiter("r", rate=10.9).burst == 10
    assert RateLimiter("r", rate=0.5).burst == 1


def test_one_exhausted_limiter_delays_no_other():
    guards = [RateLimiter(f"key-{number}", rate=1) for number in range(2)]
    guards[0].enter(0.0)
    with pytest.raises(RateLimitedError):
        guards[0].enter(0.0)
    guards[1].enter(0.0)


def test_it_costs_the_same_memory_after_a_hundred_thousand_calls():
    guard = RateLimiter("r", rate=1e6)
    guard.enter(0.0)
    before = dict(vars(guard))
    for number in range(100_000):
        guard.enter(number / 1e5)
    changed = {key for key, value in vars(guard).items() if before[key] != value}
    assert changed == {"_arrival", "_admitted"}


def test_waiting_calls_start_in_order_and_exactly_on_time():
    guard = RateLimiter("r", rate=2, burst=2, max_wait=10)
    starts = []

    @guard
    async def call(number):
        starts.append((number, round(asyncio.get_running_loop().time(), 6)))

    async def main():
        await asyncio.gather(*(call(number) for number in range(8)))

    run(main())
    assert starts == [(0, 0), (1, 0), (2, 0.5), (3, 1), (4, 1.5), (5, 2), (6, 2.5), (7, 3)]


def test_a_newcomer_never_overtakes_one_that_waits():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=10)
    order = []

    @guard
    async def call(name):
        order.append(name)

    async def main():
        await call("first")
        waiting = asyncio.create_task(call("waits"))
        await asyncio.sleep(1.0)  # its turn has come in this very instant
        await asyncio.gather(call("newcomer"), waiting)

    run(main())
    assert order == ["first", "waits", "newcomer"]


@settings(deadline=None, max_examples=60)
@given(
    calls=st.lists(st.tuples(st.floats(0, 3), st.one_of(st.none(), st.floats(0, 3))), min_size=1, max_size=25),
    burst=st.integers(1, 3),
)
def test_whoever_may_wait_is_served_in_time_in_order_and_cancelled_turns_go_to_the_next(calls, burst):
    guard = RateLimiter("r", rate=1, burst=burst, max_wait=4)
    started, refused = [], []

    async def one(number, at):
        loop = asyncio.get_running_loop()
        try:
            async with guard:
                started.append((loop.time(), number))
                assert loop.time() - at <= 4 + 1e-5
        except RateLimitedError as error:
            assert loop.time() == at, "refused at once, not after the wait"
            refused.append(error.retry_after)

    async def main():
        tasks = []
        for number, (gap, patience) in enumerate(calls):
            await asyncio.sleep(gap)
            task = asyncio.create_task(one(number, asyncio.get_running_loop().time()))
            if patience is not None:
                asyncio.get_running_loop().call_later(patience, task.cancel)
            tasks.append(task)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [result for result in results if isinstance(result, Exception)]

    run(main())
    assert guard.snapshot().waiting == 0
    assert all(retry_after > 4 for retry_after in refused)
    assert [number for _, number in started] == sorted(number for _, number in started)
    times = [at for at, _ in started]
    for first in range(len(times)):
        for last in range(first, len(times)):
            assert last - first + 1 <= burst + times[last] - times[first] + 1e-5


def test_s2_a_waiter_that_is_cancelled_gives_its_turn_back():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=10)
    starts = []

    @guard
    async def call(name):
        starts.append((name, round(asyncio.get_running_loop().time(), 6)))

    async def main():
        await call("first")
        tasks = [asyncio.create_task(call(name)) for name in "abc"]
        await asyncio.sleep(0.5)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main())
    assert starts == [("first", 0), ("b", 1), ("c", 2)]


def test_on_a_loop_a_plain_function_is_refused_and_told_when_to_come_back():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=10)

    async def main():
        guard(lambda: None)()
        with pytest.raises(RateLimitedError) as refused:
            guard(lambda: None)()
        assert refused.value.retry_after == 1.0
        with pytest.raises(RateLimitedError) as by_hand:
            guard.admit()
        assert by_hand.value.retry_after == 1.0
        assert (guard.snapshot().waiting, guard.snapshot().rejections) == (0, 2)

    run(main())


def test_plain_functions_wait_in_threads_without_a_loop():
    guard = RateLimiter("r", rate=1000, burst=1, max_wait=10)
    done = []
    threads = [threading.Thread(target=guard(lambda: done.append(1))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(done) == 20
    assert guard.snapshot().waiting == 0


def test_snapshot_events_and_message():
    heard = []
    guard = RateLimiter("search", rate=2, burst=3, listeners=[heard.append])
    with use_clock(lambda: 50.0):
        assert guard.snapshot().available == 3
        for _ in range(3):
            guard.admit().success()
        with pytest.raises(RateLimitedError) as refused:
            guard.admit()
        assert guard.counters() == {"admitted": 3, "rejected": 1}
        assert guard.gauges() == {"available": 0, "waiting": 0}
    assert heard == [CallRejected("search", 50.0, refused.value)]
    assert str(refused.value) == "'search' is over its rate; try again in 0.5 s"
    with use_clock(lambda: 51.0):
        assert guard.snapshot().available == 2


def test_only_the_first_in_the_queue_has_a_time_to_wake_at():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=math.inf)
    guard.enter(0.0)
    waits = []
    for _ in range(3):
        with pytest.raises(Wait) as waiting:
            guard.enter(0.0)
        waits.append(waiting.value.until)
    assert waits == [1.0, math.inf, math.inf]


@pytest.mark.parametrize(
    ("kwargs", "error", "rule"),
    [
        ({"rate": 0}, ValueError, "rate must be more than 0 and finite, got 0"),
        ({"rate": math.inf}, ValueError, "rate must be more than 0 and finite, got inf"),
        ({"rate": "10/s"}, TypeError, "rate must be a number, got '10/s'"),
        ({"rate": 1, "per": 0}, ValueError, "per must be more than 0 and finite, got 0 s"),
        ({"rate": 1, "burst": 0.5}, ValueError, "burst must be 1 or more, or no call could ever start, got 0.5"),
        ({"rate": 1, "burst": -1}, ValueError, "burst must be more than 0 and finite, got -1"),
        ({"rate": 1, "max_wait": -0.1}, ValueError, "max_wait must be 0 or more, got -0.1 s"),
        ({"rate": 1, "max_wait": None}, TypeError, "max_wait must be a number of seconds or a timedelta, got None"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(kwargs, error, rule):
    with pytest.raises(error, match=rule):
        RateLimiter("r", **kwargs)
