from __future__ import annotations

import asyncio
import math
import random
import statistics
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks import _servers as servers
from seawall import (
    AdaptiveBulkhead,
    AIMDLimit,
    BulkheadFullError,
    CallRejected,
    GradientLimit,
    LimitChanged,
    Pipeline,
    Priority,
    Timeout,
    Wait,
    adaptive_bulkhead,
    policies_of,
    priority,
    use_clock,
)
from seawall.testing import run


class Fixed:
    """A limit that stays, and remembers what it was told."""

    def __init__(self, initial_limit=2, min_limit=1, max_limit=1000):
        self.limit = initial_limit
        self.told = []

    def observe(self, now, latency, inflight, dropped):
        self.told.append((now, latency, inflight, dropped))


def bulkhead(limit=2, **settings):
    return AdaptiveBulkhead(
        "a", **{"algorithm": Fixed, "initial_limit": limit, "rng": random.Random(1), "max_wait": 10, **settings}
    )


def queue_up(guard, level=Priority.NORMAL, now=0.0):
    with priority(level), pytest.raises(Wait) as waiting:
        guard.enter(now)
    if waiting.value.begin is not None:
        waiting.value.begin()  # as the gate does for a caller that will sleep
    return waiting.value


def fill(guard, waiting=0, level=Priority.NORMAL):
    tokens = [guard.enter(0.0) for _ in range(guard.limit - guard.snapshot().active)]
    return tokens, [queue_up(guard, level) for _ in range(waiting)]


# What the algorithm hears


def test_a_success_tells_its_latency_and_how_many_were_inside():
    guard = bulkhead()
    first, second = guard.enter(1.0), guard.enter(2.0)
    guard.exit(first, 4.0, None)
    guard.exit(second, 4.5, None)
    assert guard._estimator.told == [(4.0, 3.0, 1, False), (4.5, 2.5, 2, False)]


def test_the_wait_in_our_own_queue_is_no_latency_of_the_callee():
    guard = bulkhead(1)
    held = guard.enter(0.0)
    wait = queue_up(guard)
    guard.exit(held, 5.0, None)
    guard.exit(wait.resume(5.0), 6.0, None)
    assert guard._estimator.told[-1] == (6.0, 1.0, 1, False)


def test_a_timeout_is_a_drop_and_any_other_end_tells_nothing():
    guard = bulkhead()
    for error in (asyncio.CancelledError(), ConnectionError(), BulkheadFullError("inner"), GeneratorExit()):
        guard.exit(guard.enter(0.0), 1.0, error)
    assert guard._estimator.told == []
    guard.exit(guard.enter(0.0), 1.0, TimeoutError())
    assert guard._estimator.told == [(1.0, 1.0, 1, True)]
    assert guard.counters() == {"finished": 4, "dropped": 1, "rejected": 0}


def test_an_exception_of_yours_may_be_a_drop_too():
    guard = bulkhead(drops=(TimeoutError, ConnectionError))
    guard.exit(guard.enter(0.0), 1.0, ConnectionError())
    assert guard.snapshot().dropped == 1


def test_the_timeout_inside_is_heard_and_the_one_outside_only_cancels():
    guard = bulkhead()

    async def main():
        for stack in (Pipeline(guard, Timeout("t", 1.0)), Pipeline(Timeout("t", 1.0), guard)):
            with pytest.raises(TimeoutError):
                await stack(asyncio.sleep)(5)

    run(main())
    assert [dropped for *_, dropped in guard._estimator.told] == [True]


# The limit


def test_a_new_limit_is_an_event_and_wakes_who_waits():
    heard = []
    guard = bulkhead(1, listeners=[heard.append])
    held = guard.enter(0.0)
    first, second = queue_up(guard), queue_up(guard)
    guard._estimator.limit = 3
    with use_clock(lambda: 1.0):
        guard.exit(held, 1.0, None)
        guard.admit().success()  # whatever enters delivers events
    assert [first.resume(1.0)[2], second.resume(1.0)[2]] == [1, 1]
    assert heard == [LimitChanged("a", 1.0, 1, 3)]


def test_a_limit_that_falls_below_the_calls_inside_drains_without_refusing_any_of_them():
    guard = bulkhead(3)
    tokens, _ = fill(guard)
    guard._estimator.limit = 1
    guard.exit(tokens[0], 1.0, None)
    assert (guard.snapshot().active, guard.snapshot().limit) == (2, 1)
    wait = queue_up(guard)
    guard.exit(tokens[1], 2.0, None)
    with pytest.raises(Wait):
        wait.resume(2.0)
    guard.exit(tokens[2], 3.0, None)
    assert wait.resume(3.0)
    assert guard.snapshot().active == 1


def test_the_queue_grows_and_shrinks_with_the_limit():
    guard = bulkhead(2)
    assert guard.max_queued == 6
    guard._estimator.limit = 5
    guard.exit(guard.enter(0.0), 1.0, None)
    assert guard.max_queued == 15


@pytest.mark.parametrize("algorithm", ["gradient", "vegas", "aimd"])
def test_an_algorithm_goes_by_its_name(algorithm):
    assert AdaptiveBulkhead("a", algorithm=algorithm, initial_limit=30).limit in {22, 30}


def test_an_algorithm_may_bring_its_own_settings():
    guard = AdaptiveBulkhead("a", algorithm=partial(AIMDLimit, max_latency=0.5), initial_limit=10)
    guard.exit(guard.enter(0.0), 0.6, None)
    assert guard.limit == 9


# The queue: its ramp and who is shed


def test_the_chance_to_be_refused_rises_from_none_to_certainty_as_the_queue_grows():
    guard = bulkhead(100, max_wait=1e6)
    fill(guard)
    joined = []
    for _ in range(3000):
        try:
            guard.enter(0.0)
        except Wait:
            joined.append(True)
        except BulkheadFullError:
            joined.append(False)
    assert all(joined[:200])
    assert 200 < guard.snapshot().waiting <= 300
    assert not all(joined[:300])  # some are refused long before the queue is full
    middle = joined[200:400]
    assert 0.3 < statistics.mean(middle) < 0.95
    assert not any(joined[-200:])


def test_the_ramp_is_linear():
    guard = bulkhead(100)
    fill(guard, waiting=200)
    refused = []
    for more in range(0, 100, 25):
        refused.append(statistics.mean(guard._refuses(Priority.NORMAL) for _ in range(4000)))
        fill_to = 200 + more + 25
        while guard.snapshot().waiting < fill_to:
            try:
                guard.enter(0.0)
            except (Wait, BulkheadFullError):
                continue
    assert refused == [pytest.approx(share, abs=0.03) for share in (0.0, 0.25, 0.5, 0.75)]


def test_two_runs_with_the_same_seed_refuse_the_same_calls():
    def refusals():
        guard = bulkhead(10)
        fill(guard, waiting=20)
        found = []
        for _ in range(30):
            try:
                guard.enter(0.0)
            except Wait:
                found.append(0)
            except BulkheadFullError:
                found.append(1)
        return found

    assert refusals() == refusals()


def test_a_call_of_low_priority_is_refused_first():
    guard = bulkhead(10, ramp_start=2.0, ramp_end=2.0, aging=math.inf)
    fill(guard, waiting=20)
    with priority(Priority.LOW), pytest.raises(BulkheadFullError):
        guard.enter(0.0)
    queue_up(guard, Priority.HIGH)  # nobody is ahead of it


def test_a_waiter_of_low_priority_gives_way_when_the_queue_is_full():
    guard = bulkhead(10, ramp_start=2.0, ramp_end=2.0)
    _, waits = fill(guard, waiting=20, level=Priority.SHEDDABLE)
    assert guard.snapshot().waiting == 20
    queue_up(guard, Priority.HIGH)
    assert guard.snapshot().waiting == 20
    with pytest.raises(BulkheadFullError):
        waits[-1].resume(0.0)


def test_a_call_of_high_priority_is_served_first():
    guard = bulkhead(1)
    held = guard.enter(0.0)
    low, high = queue_up(guard, Priority.LOW), queue_up(guard, Priority.HIGH)
    guard.exit(held, 0.1, None)
    assert high.resume(0.1)
    with pytest.raises(Wait):
        low.resume(0.1)


def test_no_queue_refuses_at_once():
    guard = bulkhead(1, ramp_start=0, ramp_end=0)
    guard.enter(0.0)
    with pytest.raises(BulkheadFullError):
        guard.enter(0.0)


def test_a_call_may_cost_several_places():
    guard = bulkhead(4)
    with use_clock(lambda: 0.0), guard.costing(3).scope():
        assert guard.snapshot().active == 3
    assert guard.snapshot().active == 0
    assert guard._estimator.told == [(0.0, 0.0, 3, False)]


def test_a_cost_is_bounded_by_max_limit_and_above_the_limit_of_the_moment_a_call_runs_alone():
    guard = AdaptiveBulkhead("a", algorithm=Fixed, initial_limit=2, max_limit=8)
    ask = guard.costing(lambda places: places)(lambda places: guard.snapshot().active)
    with use_clock(lambda: 0.0):
        assert [ask(1), ask(2), ask(8)] == [1, 2, 8]
    with pytest.raises(ValueError, match=r"'a' never has more than max_limit=8 places.* got a cost of 9"):
        ask(9)


def test_an_algorithm_that_raises_is_heard_by_its_call_and_keeps_nobody_waiting():
    class Broken(Fixed):
        def observe(self, now, latency, inflight, dropped):
            raise ZeroDivisionError("a bug")

    guard = bulkhead(1, algorithm=Broken)
    (token,), (first, second) = fill(guard, waiting=2)
    with pytest.raises(ZeroDivisionError):
        guard.exit(token, 1.0, None)
    assert (first.granted, second.granted, guard.snapshot().active) == (True, False, 1)


@pytest.mark.parametrize(("limit", "error"), [(0, ValueError), (math.nan, TypeError)])
def test_a_limit_that_no_call_could_run_under_is_heard_by_its_call_and_not_taken(limit, error):
    guard = bulkhead(1)
    (token,), (first,) = fill(guard, waiting=1)
    guard._estimator.limit = limit
    with pytest.raises(error, match="the algorithm's limit must be"):
        guard.exit(token, 1.0, None)
    assert (first.granted, guard.limit) == (True, 1)


# Around calls


def test_every_place_comes_back_from_cancellation_at_every_await():
    async def main(cancel_after):
        guard = bulkhead(2)

        @guard
        async def call():
            await asyncio.sleep(1)

        tasks = [asyncio.create_task(call()) for _ in range(5)]
        for _ in range(cancel_after):
            await asyncio.sleep(0.25)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)
        await call()

    for cancel_after in range(12):
        run(main(cancel_after))


def test_b11_a_cancelled_waiter_takes_no_capacity_with_it():
    async def main():
        guard = bulkhead(1)
        held = guard.admit()
        waiters = [asyncio.create_task(guard(asyncio.sleep)(0)) for _ in range(2)]
        await asyncio.sleep(0)
        held.success()  # the first is granted its place
        waiters[0].cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        assert guard.snapshot().active == 0

    run(main())


def test_eight_threads_and_three_loops_never_exceed_the_limit_of_one_object():
    guard = bulkhead(3, ramp_start=1e6, ramp_end=1e6, max_wait=60)
    lock, inside, worst, done = threading.Lock(), 0, 0, 0

    def step(change):
        nonlocal inside, worst, done
        with lock:
            inside += change
            worst = max(worst, inside)
            done += change < 0

    @guard
    def plain():
        step(+1)
        step(-1)

    @guard
    async def call():
        step(+1)
        await asyncio.sleep(0)
        step(-1)

    async def many():
        await asyncio.gather(*(call() for _ in range(50)))

    jobs = [lambda: [plain() for _ in range(50)]] * 8 + [lambda: asyncio.run(many())] * 3
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (worst <= 3, done, inside) == (True, 550, 0)
    assert (guard.snapshot().active, guard.snapshot().waiting, len(guard._estimator.told)) == (0, 0, 550)


def test_a_stream_holds_its_place_to_its_end():
    guard = bulkhead()

    @guard
    async def stream():
        yield 1
        yield 2

    async def main():
        async for _ in stream():
            assert guard.snapshot().active == 1

    run(main())
    assert guard.snapshot().active == 0


def test_a_refusal_is_an_event_and_counted():
    heard = []
    guard = bulkhead(1, ramp_start=0, ramp_end=0, listeners=[heard.append])
    with use_clock(lambda: 3.0):
        held = guard.admit()
        with pytest.raises(BulkheadFullError) as refused:
            guard.admit()
        held.success()
    assert heard == [CallRejected("a", 3.0, refused.value)]
    assert guard.counters()["rejected"] == 1


def test_as_a_decorator_each_use_has_a_limit_of_its_own():
    settings = adaptive_bulkhead(initial_limit=10)

    @settings
    async def one(): ...

    @settings
    async def other(): ...

    @adaptive_bulkhead
    def bare(): ...

    bulkheads = [policies_of(fn)[0] for fn in (one, other, bare)]
    assert len({id(guard._estimator) for guard in bulkheads}) == 3
    assert bulkheads[2].name.endswith("bare")
    assert adaptive_bulkhead("named")(bare).__wrapped__


# Change while it runs


def test_an_update_keeps_what_was_learnt_unless_it_concerns_the_algorithm():
    guard = AdaptiveBulkhead("a", initial_limit=20)
    learnt = guard._estimator
    guard.update(max_wait=3.0, ramp_end=5.0, aging=2.0)
    assert (guard._estimator, guard.max_wait, guard.max_queued, guard.aging) == (learnt, 3.0, 75, 2.0)
    guard.update(initial_limit=10)
    assert guard._estimator is not learnt
    assert (guard.limit, guard.max_queued) == (7, 35)


def test_an_update_drops_neither_calls_nor_waiters():
    guard = bulkhead(1)
    held = guard.enter(0.0)
    wait = queue_up(guard)
    guard.update(initial_limit=2)
    token = wait.resume(0.0)
    guard.exit(token, 1.0, None)
    guard.exit(held, 1.0, None)
    assert guard.snapshot().active == 0


def test_a_bad_update_changes_nothing():
    guard = bulkhead(2)
    with pytest.raises(ValueError, match="ramp_start must be ramp_end or less"):
        guard.update(max_wait=1.0, ramp_start=9.0)
    assert (guard.max_wait, guard.ramp_start) == (10.0, 2.0)


@pytest.mark.parametrize(
    ("settings", "error", "rule"),
    [
        (
            {"algorithm": "fast"},
            ValueError,
            "algorithm must be one of gradient, vegas, aimd or make a Limit, got 'fast'",
        ),
        ({"algorithm": 5}, TypeError, "algorithm must be one of"),
        ({"algorithm": lambda *limits: 1}, TypeError, r"must make a Limit \(limit, observe\), but .* made 1"),
        ({"algorithm": lambda *limits: SimpleNamespace(limit=3)}, TypeError, "must make a Limit"),
        ({"algorithm": lambda *limits: Fixed(2.5)}, TypeError, "the algorithm's limit must be a whole number, got 2.5"),
        ({"initial_limit": 0}, ValueError, "initial_limit must be 1 or more, got 0"),
        ({"min_limit": 30}, ValueError, "must lie between min_limit and max_limit"),
        ({"ramp_start": -1.0}, ValueError, "ramp_start must be more than 0 and finite, got -1.0"),
        ({"ramp_end": math.inf}, ValueError, "ramp_end must be more than 0 and finite"),
        ({"ramp_end": 1e308}, ValueError, "ramp_end must be 1000000 or less"),
        ({"ramp_start": False}, TypeError, "ramp_start must be a number, got False"),
        ({"ramp_start": 4.0}, ValueError, "ramp_start must be ramp_end or less, got 4.0 > 3.0"),
        ({"max_wait": math.nan}, ValueError, "max_wait must be 0 or more"),
        ({"drops": "timeout"}, TypeError, "drops must be an exception class"),
        ({"rng": 7}, TypeError, "rng must be a random.Random, got 7"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(settings, error, rule):
    with pytest.raises(error, match=rule):
        AdaptiveBulkhead("a", **settings)


@pytest.mark.parametrize(
    "settings", [{"ramp_start": 1e-310, "ramp_end": 1e-310}, {"ramp_end": 1e6}, {"max_wait": 1e308}]
)
def test_settings_that_make_no_sense_still_work(settings):
    guard = AdaptiveBulkhead("a", initial_limit=1, **settings)
    held = guard.enter(0.0)
    for _ in range(3):
        with pytest.raises((Wait, BulkheadFullError)):
            guard.enter(0.0)
    guard.exit(held, 1.0, None)


# Against scripted servers


def mean_limit(seconds, start, end):
    return statistics.mean(second.limit for second in seconds[start:end])


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("scene", servers.SCENES)
def test_the_limit_is_within_a_fifth_of_the_best_fixed_one(scene, seed):
    server = servers.SCENES[scene]
    guard = AdaptiveBulkhead("a", rng=random.Random(seed))
    seconds = servers.Simulation(guard, server, seed=seed).run(180)
    for start in (20, 40, 80, 100, 140, 160):  # 20 s after each step, at 60 and 120, it must be there
        if server.load(start) * server.service(start) < server.workers(start):
            assert sum(second.refused for second in seconds[start : start + 20]) == 0  # not in the way of a light load
            continue
        if scene.startswith("drift") and start not in {20, 100, 160}:
            continue  # each moment is another server, and its best limit a search
        best = servers.best_at(server, start + 10)
        assert mean_limit(seconds, start, start + 20) == pytest.approx(best, rel=0.2), start


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("workers", [10, 20, 60])
def test_it_serves_nearly_what_the_best_fixed_limit_serves_whatever_the_size_and_the_start(workers, seed):
    server = servers.Server(servers.always(workers), servers.always(0.1), servers.always(15 * workers))
    guard = AdaptiveBulkhead("a", initial_limit=20, rng=random.Random(seed))
    seconds = servers.Simulation(guard, server, seed=seed).run(70)
    served = statistics.mean(second.finished for second in seconds[30:])
    assert served >= 0.95 * servers.goodput(servers.best_at(server, 0), server)
    assert mean_limit(seconds, 30, 70) == pytest.approx(workers, rel=0.2)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_for_a_small_server_it_settles_within_about_a_place(seed):
    server = servers.Server(servers.always(4), servers.always(0.1), servers.always(60))
    guard = AdaptiveBulkhead("a", initial_limit=4, rng=random.Random(seed))
    seconds = servers.Simulation(guard, server, seed=seed).run(120)
    assert 4 <= mean_limit(seconds, 30, 120) <= 5.5


def test_service_times_may_scatter_widely():
    seconds = servers.Simulation(
        AdaptiveBulkhead("a", rng=random.Random(1)), servers.STEADY._replace(spread=1.5), seed=1
    ).run(120)
    assert mean_limit(seconds, 20, 120) == pytest.approx(20, rel=0.2)


def test_an_overload_of_ten_minutes_does_not_let_the_limit_drift_up():
    server = servers.Server(servers.always(10), servers.always(0.2), servers.always(100))
    seconds = servers.Simulation(AdaptiveBulkhead("a", rng=random.Random(1)), server, seed=1).run(600)
    assert mean_limit(seconds, 500, 600) == pytest.approx(10, rel=0.2)


def test_a_server_that_times_out_all_calls_is_left_alone_and_found_again():
    server = servers.STEADY._replace(service=lambda t: 30.0 if 40 <= t < 80 else 0.1)
    guard = AdaptiveBulkhead("a", rng=random.Random(1))
    seconds = servers.Simulation(guard, server, seed=1, timeout=1.0).run(200)
    assert seconds[79].limit <= 8
    assert mean_limit(seconds, 150, 200) == pytest.approx(20, rel=0.2)


def test_where_a_fixed_limit_is_too_high_latency_suffers_and_here_it_does_not():
    seconds = servers.Simulation(AdaptiveBulkhead("a", rng=random.Random(1)), servers.STEADY, seed=1).run(60)
    too_high = servers.Simulation(servers.fixed(60), servers.STEADY, seed=1).run(60)
    assert statistics.mean(second.latency for second in seconds[20:]) < 0.12
    assert statistics.mean(second.latency for second in too_high[20:]) > 0.25


def test_no_reference_cycle_and_little_memory():
    guard = AdaptiveBulkhead("a")
    for number in range(10_000):
        guard.exit(guard.enter(number * 0.01), number * 0.01 + 0.005, None)
    assert not hasattr(guard._estimator._seen, "__dict__")
    assert sys.getsizeof(guard._estimator._seen) < 120
    assert isinstance(guard._estimator, GradientLimit)


@pytest.mark.parametrize("setting", ["max_wait", "aging"])
@pytest.mark.parametrize("seconds", [0, math.inf])
def test_waits_and_aging_may_be_none_at_all_or_for_ever(setting, seconds):
    assert getattr(AdaptiveBulkhead("a", **{setting: seconds}), setting) == seconds


def test_a_call_that_got_its_place_from_one_that_left_is_measured_from_then_on():
    guard = bulkhead(1)
    held = guard.enter(0.0)
    leaving, next_one = queue_up(guard), queue_up(guard)
    guard.exit(held, 0.1, None)
    leaving.abandon(0.2)  # cancelled after it was served and before it ran
    guard.exit(next_one.resume(0.25), 0.5, None)
    assert [latency for _, latency, _, _ in guard._estimator.told] == pytest.approx([0.1, 0.3])
