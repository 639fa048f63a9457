from __future__ import annotations

import asyncio
import math
import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import CallRejected, Deadline, RateLimitedError, RateLimiter, Wait, use_clock
from seawall.core.ambient import deadline
from seawall.testing import run


def ask(enter, now):
    try:
        return enter(now)
    except (RateLimitedError, Wait) as answer:
        return answer


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
    for rate, burst in ((10.9, 10), (0.5, 1)):
        limiter = RateLimiter("r", rate=rate)
        assert limiter.snapshot().available == burst
        assert len(admitted(limiter, [0.0] * 20)) == burst


def test_one_exhausted_limiter_delays_no_other():
    guards = [RateLimiter(f"key-{number}", rate=1) for number in range(2)]
    guards[0].enter(0.0)
    with pytest.raises(RateLimitedError):
        guards[0].enter(0.0)
    guards[1].enter(0.0)


def test_b24_it_costs_the_same_memory_after_twenty_thousand_calls_in_a_window():
    for algorithm in ("gcra", "fixed_window", "sliding_window"):
        guard = RateLimiter("r", rate=200_000, algorithm=algorithm)
        guard.enter(0.0)
        tracemalloc.start()
        try:
            guard.enter(1e-6)
            before = tracemalloc.get_traced_memory()[0]
            for number in range(20_000):
                guard.enter(number / 2e4)
            assert tracemalloc.get_traced_memory()[0] - before < 20_000  # of which a sliding window's groups are 5,000
        finally:
            tracemalloc.stop()


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


def test_each_in_the_queue_wakes_by_itself_when_its_turn_is_to_come():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=math.inf)
    guard.enter(0.0)
    assert [queued(guard, 0.0).until for _ in range(3)] == [1.0, 2.0, 3.0]


def queued(guard, now):
    with pytest.raises(Wait) as waiting:
        guard.enter(now)
    return waiting.value


def on_a_closed_loop(*waits):
    for wait in waits:
        wait.sleeper = type("Gone", (), {"ring": staticmethod(lambda: False)})


def test_those_behind_waiters_whose_event_loop_is_closed_go_on_by_themselves():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=60)
    guard.enter(0.0)
    waits = [queued(guard, 0.0) for _ in range(4)]
    on_a_closed_loop(*waits[:3])
    assert waits[3].resume(4.0) is None
    assert guard.snapshot().waiting == 0
    assert queued(guard, 4.0).until == 5.0


def test_a_newcomer_that_goes_past_a_closed_loop_calls_the_one_who_was_behind_it():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=60)
    guard.enter(0.0)
    gone, behind = queued(guard, 0.0), queued(guard, 0.0)
    on_a_closed_loop(gone)
    rung = []
    behind.sleeper = type("Bell", (), {"ring": staticmethod(lambda: rung.append(1) or True)})
    queued(guard, 1.5)
    assert rung == [1], "it would have slept until 2.0, and its turn is here"
    behind.resume(1.5)


def test_a_newcomer_is_told_its_time_behind_those_who_still_wait():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=60)
    guard.enter(0.0)
    waits = [queued(guard, 0.0) for _ in range(4)]
    assert queued(guard, 0.0).until == 5.0
    waits[2].abandon(0.0)
    assert queued(guard, 0.0).until == 5.0
    waits[0].abandon(0.0)
    assert queued(guard, 0.0).until == 5.0


def test_a_real_follower_starts_though_the_loop_of_the_head_was_closed():
    guard = RateLimiter("r", rate=20, burst=1, max_wait=60)
    started = []

    @guard
    async def call():
        started.append(1)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(call())
    task = loop.create_task(call())
    loop.run_until_complete(asyncio.sleep(0))
    follower = threading.Thread(target=guard(lambda: started.append(2)), daemon=True)
    follower.start()
    while guard.snapshot().waiting < 2:  # until it has queued; it takes no time of its own
        threading.Event().wait(0.001)
    loop.close()
    follower.join(30)
    assert started == [1, 2]
    assert guard.snapshot().waiting == 0
    task._log_destroy_pending = False


def test_a_head_on_a_loop_that_hangs_is_gone_past_after_a_second_and_first_again_when_it_comes():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=60)
    guard.enter(0.0)
    hangs, second, third, fourth = [queued(guard, 0.0) for _ in range(4)]
    for now in (1.9, 1.99):  # called by those who come, but not yet given up
        queued(guard, now).abandon(now)
    assert hangs.until == 1.0
    second.resume(2.0)
    with pytest.raises(Wait):
        third.resume(2.5)
    with pytest.raises(Wait):
        hangs.resume(2.6)  # too late for its turn, but before everybody else
    assert hangs.until == 3.0
    with pytest.raises(Wait):
        third.resume(3.0)
    hangs.resume(3.0)
    third.resume(4.0)
    fourth.resume(5.0)


def test_those_who_wake_out_of_order_still_start_in_order():
    guard = RateLimiter("r", rate=3, algorithm="fixed_window", max_wait=60)
    for _ in range(3):
        guard.enter(0.0)
    waits = [queued(guard, 0.0) for _ in range(3)]
    assert [wait.until for wait in waits] == [1.0, 1.0, 1.0]
    for wait in reversed(waits[1:]):
        with pytest.raises(Wait):
            wait.resume(1.0)
        assert wait.until > 1.0, "it would spin if it woke at once"
    rung = []
    for wait in waits:
        wait.sleeper = type("Bell", (), {"ring": lambda self, wait=wait: rung.append(wait) or True})()
    for number, wait in enumerate(waits):
        assert rung == waits[1 : number + 1]
        wait.resume(1.0)


def test_s1_a_wait_that_would_outlast_the_ambient_deadline_is_refused_at_once():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=60)
    guard.enter(0.0)
    queued(guard, 0.0)
    token = deadline.set(1.9)
    try:
        with pytest.raises(RateLimitedError) as refused:
            guard.enter(0.0)
        assert refused.value.retry_after == 2.0
        deadline.reset(token)
        token = deadline.set(2.0)
        assert queued(guard, 0.0).until == 2.0
    finally:
        deadline.reset(token)


def test_s1_a_waiter_whose_turn_moves_beyond_its_deadline_is_refused_when_that_is_known():
    guard = RateLimiter("r", rate=10, burst=1, max_wait=60)
    refused_at = []

    async def call():
        async with Deadline("d", 5.0):
            try:
                async with guard:
                    pass
            except RateLimitedError as error:
                refused_at.append((asyncio.get_running_loop().time(), error.retry_after))

    async def main():
        async with guard:
            pass
        waiting = asyncio.create_task(call())
        await asyncio.sleep(0.05)
        guard.drain(8.0)
        await waiting

    run(main())
    assert refused_at == [(0.05, pytest.approx(8.0))]
    assert guard.snapshot().waiting == 0


class Noting(RateLimiter):
    """Notes when each turn was taken."""

    taken = ()

    def enter(self, now):
        admitted, token = self._admitted, None
        token = super().enter(now)
        if len(self.taken) == admitted:
            self.taken = [*self.taken, now]
        return token

    def _take(self, now, cost, reserving):
        self.taken = [*self.taken, now]
        return super()._take(now, cost, reserving)


@pytest.mark.parametrize(
    ("kwargs", "most"),
    [
        ({"rate": 20, "burst": 5}, lambda seconds: 5 + 20 / 0.02 * seconds),
        ({"rate": 20, "algorithm": "sliding_window"}, lambda seconds: 20 if seconds < 0.02 - 2e-6 else math.inf),
    ],
)
def test_b23_a_limiter_shared_by_eight_threads_and_three_loops_never_exceeds_its_rate(kwargs, most):
    guard = Noting("r", per=0.02, max_wait=60, **kwargs)
    call = guard(lambda: None)

    @guard
    async def call_async():
        pass

    def thread():
        for _ in range(12):
            call()

    def loop():
        async def main():
            await asyncio.gather(*(call_async() for _ in range(30)))

        asyncio.run(main())

    threads = [threading.Thread(target=target) for target in [thread] * 8 + [loop] * 3]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    taken = guard.taken
    assert len(taken) == 8 * 12 + 3 * 30 == guard.snapshot().admitted
    assert taken == sorted(taken)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= most(taken[last] - taken[first]) + 0.01
    assert guard.snapshot().waiting == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "rule"),
    [
        ({"rate": 0}, ValueError, "rate must be more than 0 and finite, got 0"),
        ({"rate": math.inf}, ValueError, "rate must be more than 0 and finite, got inf"),
        ({"rate": "10/s"}, TypeError, "rate must be a number, got '10/s'"),
        ({"rate": 1, "per": 0}, ValueError, "per must be more than 0 and finite, got 0 s"),
        ({"rate": 1, "burst": 0.5}, ValueError, "burst must be 1 or more, or no call could ever start, got 0.5"),
        ({"rate": 1, "burst": -1}, ValueError, "burst must be more than 0 and finite, got -1"),
        (
            {"rate": 1e308},
            ValueError,
            "rate and per must make between 1e-9 and 1e9 calls a second, got 1e.308 per 1.0 s",
        ),
        ({"rate": 1, "per": 1e-310}, ValueError, "rate and per must make between"),
        ({"rate": 1e308, "per": 1e-10}, ValueError, "rate and per must make between"),
        ({"rate": 1e-310}, ValueError, "rate and per must make between"),
        ({"rate": 1e-10, "per": 1e308}, ValueError, "rate and per must make between"),
        ({"rate": 1e308, "per": 1e308}, ValueError, "burst must be at most 1e12, got 1e.308 from the rate"),
        ({"rate": 1, "burst": 1e13}, ValueError, "burst must be at most 1e12, got 1e.13$"),
        ({"rate": 1, "burst": math.nan}, ValueError, "burst must be more than 0 and finite, got nan"),
        ({"rate": True}, TypeError, "rate must be a number, got True"),
        ({"rate": 1, "algorithm": "leaky"}, ValueError, "algorithm must be 'gcra', 'fixed_window' or 'sliding_window'"),
        ({"rate": 1, "algorithm": None}, ValueError, "got None"),
        ({"rate": 1, "algorithm": []}, ValueError, r"got \[\]"),
        ({"rate": 5, "algorithm": "fixed_window", "burst": 2}, ValueError, "burst is for algorithm='gcra'"),
        ({"rate": 0.5, "algorithm": "sliding_window"}, ValueError, "rate must be in 1 to 1e12 for a window.*got 0.5"),
        ({"rate": 1, "drain_on": 429}, TypeError, "drain_on must be a function .* got 429"),
        ({"rate": 1, "max_block": math.inf}, ValueError, "max_block must be more than 0 and finite, got inf s"),
        ({"rate": 1, "max_block": 1e10}, ValueError, "max_block must be at most 1e9 s"),
        ({"rate": 1, "max_wait": math.nan}, ValueError, "max_wait must be 0 or more, got nan s"),
        ({"rate": 1, "max_wait": -0.1}, ValueError, "max_wait must be 0 or more, got -0.1 s"),
        ({"rate": 1, "max_wait": None}, TypeError, "max_wait must be a number of seconds or a timedelta, got None"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(kwargs, error, rule):
    with pytest.raises(error, match=rule):
        RateLimiter("r", **kwargs)


@pytest.mark.parametrize("algorithm", ["gcra", "fixed_window", "sliding_window"])
@settings(deadline=None, max_examples=60)
@given(
    rate=st.floats(1, 1e12),
    per=st.floats(1e-9, 1e12),
    max_wait=st.sampled_from([0.0, 1.0, 1e308, math.inf]),
    start=st.floats(0, 1e9),
    gaps=st.lists(st.floats(0, 1e9), max_size=5),
)
def test_whatever_settings_are_accepted_never_fail_in_a_call(algorithm, rate, per, max_wait, start, gaps):
    try:
        guard = RateLimiter("r", rate=rate, per=per, algorithm=algorithm, max_wait=max_wait)
    except ValueError:
        return
    now = start
    with use_clock(lambda: now):
        for gap in gaps:
            now += gap
            for _ in range(3):
                answer = ask(guard.enter, now)
                assert not isinstance(answer, RateLimitedError) or answer.retry_after > 0
                if isinstance(answer, Wait):
                    assert math.isfinite(answer.until)
                    answer.abandon(now)
            guard.snapshot()
            guard.drain()
            guard.drain(1e300)
            guard.snapshot()
            guard.update(rate=rate, per=per)
