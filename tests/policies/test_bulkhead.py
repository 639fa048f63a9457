from __future__ import annotations

import asyncio
import math
import threading

import pytest

from seawall import Bulkhead, BulkheadFullError, CallRejected, Wait, use_clock
from seawall.testing import run


def queue_up(guard, now):
    with pytest.raises(Wait) as waiting:
        guard.enter(now)
    if waiting.value.begin is not None:
        waiting.value.begin()  # as the gate does for a caller that will sleep
    return waiting.value


def test_places_then_queue_then_refusal():
    guard = Bulkhead("k", max_concurrent=2, max_queued=1)
    guard.enter(0.0)
    guard.enter(0.0)
    wait = queue_up(guard, 0.0)
    assert wait.until == 1.0
    with pytest.raises(BulkheadFullError) as refused:
        guard.enter(0.0)
    assert str(refused.value) == "'k' is full"
    assert refused.value.retry_after is None
    seen = guard.snapshot()
    assert (seen.active, seen.waiting, seen.limit, seen.finished, seen.rejections) == (2, 1, 2, 0, 1)


def test_a_place_is_handed_to_the_one_that_waited_longest_and_no_newcomer_takes_it():
    guard = Bulkhead("k", max_concurrent=1, max_queued=2, max_wait=10)
    held = guard.enter(0.0)
    first, second = queue_up(guard, 0.0), queue_up(guard, 0.0)
    guard.exit(held, 1.0, None)
    assert (first.granted, second.granted) == (True, False)
    newcomer = queue_up(guard, 1.0)
    assert not newcomer.granted
    newcomer.abandon(1.0)
    with pytest.raises(Wait):
        second.resume(1.0)
    assert first.resume(1.0) == first.token  # the gate does not even ask
    assert guard.snapshot().active == 1
    guard.exit(first.token, 2.0, None)
    assert second.granted


def test_a_wait_that_lasts_too_long_ends_in_a_refusal():
    guard = Bulkhead("k", max_concurrent=1, max_queued=5, max_wait=2.0)
    guard.enter(0.0)
    wait = queue_up(guard, 0.0)
    with pytest.raises(Wait):
        wait.resume(1.9)
    with pytest.raises(BulkheadFullError):
        wait.resume(2.0)
    assert (guard.snapshot().waiting, guard.snapshot().rejections) == (0, 1)


def test_a_place_that_comes_in_the_last_instant_is_taken():
    guard = Bulkhead("k", max_concurrent=1, max_queued=5, max_wait=2.0)
    held = guard.enter(0.0)
    wait = queue_up(guard, 0.0)
    guard.exit(held, 2.0, None)
    assert wait.resume(2.5) == wait.token


@pytest.mark.parametrize("how", ["no queue", "no wait"])
def test_without_queue_or_wait_a_full_bulkhead_refuses_at_once(how):
    guard = Bulkhead(
        "k", max_concurrent=1, **({"max_queued": 0} if how == "no queue" else {"max_queued": 5, "max_wait": 0})
    )
    guard.enter(0.0)
    with pytest.raises(BulkheadFullError):
        guard.enter(0.0)


def test_a_call_may_wait_for_ever():
    guard = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=math.inf)

    async def main():
        held = guard.admit()
        task = asyncio.create_task(guard(asyncio.sleep)(0, "in"))
        await asyncio.sleep(1e6)
        assert guard.snapshot().waiting == 1
        held.success()
        assert await task == "in"

    run(main())


def test_max_wait_is_kept_to_the_microsecond():
    guard = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=0.25)

    async def main():
        held = guard.admit()
        with pytest.raises(BulkheadFullError):
            await guard(asyncio.sleep)(0)
        assert asyncio.get_running_loop().time() == pytest.approx(0.25, abs=2e-6)
        held.success()

    run(main())


def test_on_a_loop_a_plain_function_is_refused_instead_of_waiting_and_counted():
    heard = []
    guard = Bulkhead("k", max_concurrent=1, max_queued=5, listeners=[heard.append])

    async def main():
        held = guard.admit()
        with pytest.raises(BulkheadFullError) as refused:
            guard(lambda: None)()
        assert heard == [CallRejected("k", 0.0, refused.value)]
        assert (guard.snapshot().waiting, guard.snapshot().rejections) == (0, 1)
        held.success()

    run(main())


def test_eight_threads_and_three_loops_never_exceed_the_limit_of_one_object():
    guard = Bulkhead("k", max_concurrent=3, max_queued=10_000, max_wait=60)
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

    @guard.costing(2)
    async def heavy():
        step(+2)
        await asyncio.sleep(0)
        step(-2)

    async def many():
        await asyncio.gather(*(call() for _ in range(80)), *(heavy() for _ in range(20)))

    jobs = [lambda: [plain() for _ in range(100)]] * 8 + [lambda: asyncio.run(many())] * 3
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (worst <= 3, done, inside) == (True, 1100, 0)
    seen = guard.snapshot()
    assert (seen.active, seen.waiting, seen.finished) == (0, 0, 1100)


def test_no_lock_is_held_while_a_call_runs():
    guard = Bulkhead("k", max_concurrent=1)
    other = Bulkhead("other", max_concurrent=1)
    entered, go = threading.Event(), threading.Event()

    @guard
    def slow():
        entered.set()
        assert go.wait(30)

    thread = threading.Thread(target=slow)
    thread.start()
    assert entered.wait(30)
    with pytest.raises(BulkheadFullError):
        guard.admit()
    other.admit().success()  # would block for ever if the lock were held over the call
    go.set()
    thread.join(30)
    assert guard.snapshot().active == 0


def test_counters_and_gauges_tell_what_a_snapshot_tells():
    guard = Bulkhead("k", max_concurrent=2)
    with use_clock(lambda: 0.0), guard.scope():
        assert guard.gauges() == {"active": 1, "waiting": 0, "limit": 2}
    assert guard.counters() == {"finished": 1, "rejected": 0}


@pytest.mark.parametrize(
    ("kwargs", "error", "rule"),
    [
        ({"max_concurrent": 0}, ValueError, "max_concurrent must be 1 or more, got 0"),
        ({"max_concurrent": 10**400}, ValueError, "max_concurrent must be 1000000000000 or less, got 1000"),
        ({"max_concurrent": 2.0}, TypeError, "max_concurrent must be a whole number, got 2.0"),
        ({"max_concurrent": 1, "max_queued": -1}, ValueError, "max_queued must be 0 or more, got -1"),
        ({"max_concurrent": 1, "max_wait": -1}, ValueError, "max_wait must be 0 or more, got -1 s"),
        ({"max_concurrent": 1, "max_wait": math.nan}, ValueError, "max_wait must be 0 or more, got nan s"),
        ({"max_concurrent": True}, TypeError, "max_concurrent must be a whole number, got True"),
        ({"max_concurrent": "2"}, TypeError, "max_concurrent must be a whole number, got '2'"),
        ({"max_concurrent": 1, "aging": -1}, ValueError, "aging must be 0 or more, got -1 s"),
        ({"max_concurrent": 1, "aging": math.nan}, ValueError, "aging must be 0 or more, got nan s"),
        ({"max_concurrent": 1, "aging": None}, TypeError, "aging must be a number of seconds or a timedelta, got None"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(kwargs, error, rule):
    with pytest.raises(error, match=rule):
        Bulkhead("k", **kwargs)
