"""Who gets a place when there are not enough: weights, priorities, deadlines, changes of the limit, dead waiters."""

from __future__ import annotations

import asyncio
import gc
import math
import threading

import pytest

from seawall import Bulkhead, BulkheadFullError, CallRejected, Pipeline, Wait, use_clock
from seawall.core.ambient import Priority, current_priority, deadline, priority
from seawall.testing import run


def queue_up(guard, now=0.0, cost=1, level=Priority.NORMAL):
    with priority(level), pytest.raises(Wait) as waiting:
        guard.enter_at(now, cost)
    if waiting.value.begin is not None:
        waiting.value.begin()  # as the gate does for a caller that will sleep
    return waiting.value


def full(**settings):
    """A bulkhead whose only place is taken, and the token of the call that has it."""
    guard = Bulkhead("k", **{"max_concurrent": 1, "max_queued": 10, "max_wait": 100.0, **settings})
    return guard, guard.enter_at(0.0, guard.max_concurrent)


def served(guard, waits, token, now):
    """In which order `waits` get a place, one call after the other from the end of the one with `token`."""
    order = []
    while len(order) < len(waits):
        guard.exit(token, now, None)
        (winner,) = [one for one in waits if one.granted and one not in order]
        order.append(winner)
        token = winner.token
    return [waits.index(wait) for wait in order]


class Gone:
    """The sleeper of a task whose event loop is closed."""

    alive = False

    def ring(self):
        return False


class Alive:
    alive = True

    def __init__(self):
        self.rings = 0

    def ring(self):
        self.rings += 1
        return True


# Weights


def test_b22_a_heavy_call_among_a_stream_of_light_ones_comes_in_its_turn():
    guard = Bulkhead("k", max_concurrent=10, max_queued=1000, max_wait=1000.0)
    began = {}

    async def work(name):
        began[name] = asyncio.get_running_loop().time()
        await asyncio.sleep(1.0)

    async def main():
        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(guard(work)(f"light {number}"))
            await asyncio.sleep(0)
            tasks.create_task(guard.costing(10)(work)("heavy"))
            for tick in range(50):  # a stream of light calls that never stops while the heavy one waits
                await asyncio.sleep(0.1)
                tasks.create_task(guard(work)(f"late {tick}"))

    run(main())
    assert began["heavy"] == 2.0  # when the ten and ten before it are through
    assert min(moment for name, moment in began.items() if "late" in name) == 3.0
    assert guard.snapshot().active == 0


def test_b22_a_light_newcomer_does_not_overtake_a_heavy_call_though_it_would_fit():
    guard = Bulkhead("k", max_concurrent=3, max_queued=10)
    one, two = guard.enter(0.0), guard.enter(0.0)
    heavy = queue_up(guard, cost=2)
    light = queue_up(guard)
    assert (heavy.granted, light.granted) == (False, False)
    guard.exit(one, 1.0, None)
    assert (heavy.granted, light.granted) == (True, False)
    guard.exit(two, 1.0, None)
    assert light.granted


def test_when_a_heavy_call_at_the_head_gives_up_those_behind_it_that_fit_go_in():
    guard = Bulkhead("k", max_concurrent=3, max_queued=10)
    guard.enter(0.0)
    heavy, light, other = queue_up(guard, cost=3), queue_up(guard), queue_up(guard)
    heavy.abandon(0.5)
    assert (light.granted, other.granted) == (True, True)
    assert guard.snapshot().active == 3


def test_when_a_heavy_call_at_the_head_waited_too_long_those_behind_it_that_fit_go_in():
    guard = Bulkhead("k", max_concurrent=3, max_queued=10, max_wait=1.0)
    guard.enter(0.0)
    heavy, light = queue_up(guard, cost=3), queue_up(guard, 0.5)
    with pytest.raises(BulkheadFullError):
        heavy.resume(1.0)
    assert light.granted


def test_a_call_gives_back_all_the_places_it_took_and_they_serve_as_many():
    guard = Bulkhead("k", max_concurrent=4, max_queued=10)
    heavy = guard.costing(3).enter(0.0)
    guard.enter(0.0)
    waits = [queue_up(guard) for _ in range(4)]
    guard.exit(heavy, 1.0, None)
    assert [wait.granted for wait in waits] == [True, True, True, False]
    assert guard.snapshot().active == 4


def test_a_waiter_for_several_places_that_is_cancelled_as_it_gets_them_passes_all_on():
    guard = Bulkhead("k", max_concurrent=3, max_queued=10)
    token = guard.enter_at(0.0, 3)
    heavy, *light = queue_up(guard, cost=3), queue_up(guard), queue_up(guard)
    guard.exit(token, 1.0, None)
    assert heavy.granted
    heavy.abandon(1.0)
    assert [wait.granted for wait in light] == [True, True]
    assert guard.snapshot().active == 2


def test_costs_are_reckoned_from_the_arguments_of_each_call():
    guard = Bulkhead("k", max_concurrent=5)
    seen = []

    @guard.costing(len)
    def answer(prompt):
        seen.append(guard.snapshot().active)

    answer("a")
    answer("abcde")
    assert (seen, guard.snapshot().active) == ([1, 5], 0)


def test_a_cost_above_the_limit_is_refused_with_both_numbers():
    guard = Bulkhead("k", max_concurrent=3)
    message = "'k' has 3 places, so a call can't cost more, got a cost of 4"
    with pytest.raises(ValueError, match=message):
        guard.costing(4)
    with pytest.raises(ValueError, match=message):
        guard.costing(len)(lambda text: None)("four")
    assert guard.snapshot().active == 0


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "2"])
def test_a_cost_that_is_no_count_is_refused(wrong):
    guard = Bulkhead("k", max_concurrent=3)
    for use in (lambda: guard.costing(wrong), guard.costing(lambda: wrong)(lambda: None)):
        with pytest.raises((ValueError, TypeError), match="cost must be"):
            use()


def test_blocks_and_permits_can_cost_several_places():
    guard = Bulkhead("k", max_concurrent=5)
    with guard.costing(3).scope():
        permit = guard.costing(2).admit()
        assert guard.snapshot().active == 5
        permit.success()
    assert guard.snapshot().active == 0


# Priorities


def test_of_those_who_wait_the_highest_priority_goes_first_and_within_one_the_first():
    guard, token = full(aging=100.0)
    levels = [Priority.LOW, Priority.NORMAL, Priority.CRITICAL, Priority.NORMAL, Priority.CRITICAL]
    waits = [queue_up(guard, 0.01 * number, level=level) for number, level in enumerate(levels)]
    assert served(guard, waits, token, 1.0) == [2, 4, 1, 3, 0]


def test_a_waiter_rises_by_one_level_for_each_aging_seconds_it_waited():
    guard, token = full(aging=2.0)
    low = queue_up(guard, 0.0, level=Priority.LOW)
    before = queue_up(guard, 3.9, level=Priority.HIGH)  # two levels are worth 4 s of waiting
    after = queue_up(guard, 4.1, level=Priority.HIGH)
    assert served(guard, [low, before, after], token, 5.0) == [1, 0, 2]


def test_no_priority_starves_under_a_stream_of_higher_ones():
    guard = Bulkhead("k", max_concurrent=1, max_queued=1000, max_wait=1e6, aging=1.0)
    began = {}

    async def work(name):
        began[name] = asyncio.get_running_loop().time()
        await asyncio.sleep(1.0)

    async def main():
        call = guard(work)
        async with asyncio.TaskGroup() as tasks:
            with priority(Priority.CRITICAL):
                for number in range(2):
                    tasks.create_task(call(f"critical {number}"))
            await asyncio.sleep(0)
            with priority(Priority.SHEDDABLE):
                tasks.create_task(call("sheddable"))
            with priority(Priority.CRITICAL):
                for number in range(100):  # as many as can be served: without aging it would wait for the last
                    await asyncio.sleep(1.0)
                    tasks.create_task(call(f"stream {number}"))

    run(main())
    assert began["sheddable"] <= 7.0


def test_without_aging_the_order_of_arrival_counts_and_nothing_else():
    guard, token = full(aging=0)
    waits = [queue_up(guard, 0.1 * n, level=level) for n, level in enumerate([Priority.LOW, Priority.CRITICAL])]
    assert served(guard, waits, token, 1.0) == [0, 1]


@pytest.mark.parametrize("aging", [math.inf, 1e308])
def test_with_endless_aging_priority_counts_and_nothing_else(aging):
    guard, token = full(aging=aging, max_wait=math.inf)
    low = queue_up(guard, 0.0, level=Priority.SHEDDABLE)
    others = [queue_up(guard, 1e9, level=level) for level in (Priority.LOW, Priority.NORMAL, Priority.CRITICAL)]
    guard.update(max_queued=4)
    with priority(Priority.SHEDDABLE), pytest.raises(BulkheadFullError):
        guard.enter(1e9)  # displaces nobody
    assert served(guard, [low, *others], token, 2e9) == [3, 2, 1, 0]


def test_a_newcomer_of_higher_priority_that_fits_goes_before_a_heavy_call_that_waits():
    guard = Bulkhead("k", max_concurrent=3, max_queued=1)
    guard.enter(0.0)
    heavy = queue_up(guard, cost=3)
    with priority(Priority.CRITICAL):
        token = guard.enter(0.0)  # the queue is full, but it needs none, so nobody is displaced
    assert (guard.snapshot().active, guard.snapshot().waiting, heavy.granted) == (2, 1, False)
    guard.exit(token, 1.0, None)
    newcomer = queue_up_or_refused(guard, 1.0)
    assert newcomer is None


def queue_up_or_refused(guard, now):
    try:
        return guard.enter(now)
    except BulkheadFullError:
        return None


def test_a_full_queue_gives_up_the_waiter_it_would_serve_last_for_one_of_higher_priority():
    guard, token = full(max_queued=3)
    waits = [queue_up(guard, level=level) for level in (Priority.LOW, Priority.NORMAL, Priority.LOW)]
    waits[2].sleeper = alarm = Alive()
    higher = queue_up(guard, 0.5, level=Priority.HIGH)
    assert (alarm.rings, guard.snapshot().waiting) == (1, 3)
    with pytest.raises(BulkheadFullError):
        waits[2].resume(0.5)
    assert guard.snapshot().rejections == 1
    with priority(Priority.LOW), pytest.raises(BulkheadFullError):
        guard.enter(0.6)
    assert served(guard, [*waits[:2], higher], token, 0.7) == [2, 1, 0]


def test_of_two_that_would_be_served_last_the_one_of_lower_priority_is_displaced():
    guard, _ = full(max_queued=2, aging=1.0)
    low = queue_up(guard, 0.0, level=Priority.LOW)
    normal = queue_up(guard, 1.0, level=Priority.NORMAL)  # its level is worth the second it came later
    queue_up(guard, 1.0, level=Priority.CRITICAL)
    assert (low.until, normal.until) == (1.0, 101.0)


def test_a_task_that_is_displaced_learns_it_at_once_and_so_do_the_listeners():
    heard = []
    guard = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=math.inf, listeners=[heard.append])

    async def call(level):
        with priority(level):
            return await guard(asyncio.sleep)(1.0, level)

    async def main():
        held = guard.admit()
        low = asyncio.create_task(call(Priority.LOW))
        await asyncio.sleep(3.0)
        high = asyncio.create_task(call(Priority.CRITICAL))
        with pytest.raises(BulkheadFullError) as refused:
            await low
        assert heard == [CallRejected("k", 3.0, refused.value)]
        held.success()
        assert await high == Priority.CRITICAL

    guard.update(aging=10.0)
    run(main())


def test_a_waiter_that_waited_long_enough_is_not_displaced_by_a_higher_priority():
    guard, token = full(max_queued=1, aging=1.0)
    low = queue_up(guard, 0.0, level=Priority.LOW)
    with priority(Priority.CRITICAL), pytest.raises(BulkheadFullError):
        guard.enter(3.0)
    guard.exit(token, 3.0, None)
    assert low.granted


def test_the_priority_is_read_only_where_a_call_has_to_queue():
    guard = Bulkhead("k", max_concurrent=1, max_queued=1)
    level = current_priority.set(None)  # would break whoever looks
    try:
        guard.exit(guard.enter(0.0), 0.0, None)
    finally:
        current_priority.reset(level)


# Deadlines


@pytest.mark.parametrize(("until", "wakes"), [(0.25, 0.25), (5.0, 1.0)])
def test_a_call_waits_for_max_wait_or_until_its_deadline_whichever_comes_first(until, wakes):
    guard, _ = full(max_wait=1.0)
    token = deadline.set(until)
    try:
        assert queue_up(guard).until == wakes
    finally:
        deadline.reset(token)


def test_a_call_whose_deadline_comes_while_it_waits_is_refused_then():
    guard = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=5.0)

    async def main():
        held = guard.admit()
        deadline.set(asyncio.get_running_loop().time() + 0.25)
        with pytest.raises(BulkheadFullError):
            await guard(asyncio.sleep)(0)
        assert asyncio.get_running_loop().time() == pytest.approx(0.25, abs=2e-6)
        held.success()

    run(main())
    assert guard.snapshot().waiting == 0


def test_a_call_whose_deadline_has_passed_is_refused_at_once_and_displaces_nobody():
    guard, _ = full(max_queued=1)
    queue_up(guard, level=Priority.LOW)
    token = deadline.set(1.0)
    try:
        with priority(Priority.CRITICAL), pytest.raises(BulkheadFullError):
            guard.enter(1.0)
    finally:
        deadline.reset(token)
    assert guard.snapshot().waiting == 1


# Changes of the limit


def test_s3_a_bulkhead_that_shrinks_while_full_returns_at_once_and_drains_by_itself():
    guard = Bulkhead("k", max_concurrent=4, max_queued=10)
    held = [guard.enter(0.0) for _ in range(4)]
    with use_clock(lambda: 1.0):
        guard.update(max_concurrent=2)
    wait = queue_up(guard, 1.0)
    seen = []
    for token in held:
        guard.exit(token, 2.0, None)
        seen.append((guard.snapshot().active, wait.granted))
    assert seen == [(3, False), (2, False), (2, True), (1, True)]
    guard.exit(wait.token, 3.0, None)
    assert guard.snapshot().active == 0


def test_a_bulkhead_that_grows_wakes_as_many_as_it_has_new_places_for():
    guard, _ = full()
    waits = [queue_up(guard) for _ in range(4)]
    with use_clock(lambda: 1.0):
        guard.update(max_concurrent=3)
    assert [wait.granted for wait in waits] == [True, True, False, False]
    assert (guard.snapshot().active, guard.snapshot().limit, guard.max_concurrent) == (3, 3, 3)


def test_growing_wakes_tasks_that_wait():
    guard = Bulkhead("k", max_concurrent=1, max_queued=5, max_wait=math.inf)

    async def main():
        held = guard.admit()
        tasks = [asyncio.create_task(guard(asyncio.sleep)(0, "in")) for _ in range(2)]
        await asyncio.sleep(1.0)
        guard.update(max_concurrent=3)
        assert await asyncio.gather(*tasks) == ["in", "in"]
        held.success()

    run(main())


def test_a_call_that_waits_for_more_places_than_are_left_runs_alone():
    guard = Bulkhead("k", max_concurrent=4, max_queued=10)
    costly = guard.costing(3)
    held = guard.enter_at(0.0, 2)
    other = queue_up(guard, cost=3)
    behind = queue_up(guard)
    with use_clock(lambda: 1.0):
        guard.update(max_concurrent=2)
    assert not other.granted
    guard.exit(held, 2.0, None)
    assert (other.granted, behind.granted) == (True, False)
    guard.exit(other.token, 3.0, None)
    guard.exit(behind.token, 3.0, None)
    token = costly.enter(4.0)  # made when there were more; nobody is in, so it need not wait
    with pytest.raises(Wait):
        guard.enter(4.0)
    guard.exit(token, 5.0, None)


def test_a_full_bulkhead_without_a_queue_runs_a_call_dearer_than_its_new_limit_when_it_is_empty():
    guard = Bulkhead("k", max_concurrent=4)
    costly = guard.costing(4)
    guard.update(max_concurrent=1)
    token = costly.enter(0.0)
    with pytest.raises(BulkheadFullError):
        guard.enter(0.0)
    guard.exit(token, 0.0, None)
    guard.exit(guard.enter(0.0), 0.0, None)


def test_a_live_change_is_all_or_nothing_and_keeps_the_object_its_counters_and_its_waiters():
    guard, token = full(max_wait=5.0)
    wait = queue_up(guard)
    with pytest.raises(ValueError, match="max_wait must be 0 or more, got -1 s"):
        guard.update(max_concurrent=7, max_wait=-1)
    with pytest.raises(TypeError, match="has no setting limit to change"):
        guard.update(limit=7)
    assert guard.max_concurrent == 1
    with use_clock(lambda: 1.0):
        guard.update(max_queued=0, max_wait=1.0, aging=9.0)
    assert (guard.max_queued, guard.max_wait, guard.aging, wait.until) == (0, 1.0, 9.0, 5.0)
    with pytest.raises(BulkheadFullError):
        guard.enter(1.0)
    guard.exit(token, 2.0, None)
    assert wait.granted
    assert guard.snapshot().finished == 1


def test_a_change_of_aging_holds_for_those_who_wait_already():
    guard, token = full(aging=1.0)
    critical = queue_up(guard, 0.0, level=Priority.CRITICAL)
    with use_clock(lambda: 1.0):
        guard.update(aging=math.inf)
    low = queue_up(guard, 2.0, level=Priority.LOW)
    assert served(guard, [low, critical], token, 3.0) == [1, 0]

    guard, token = full(aging=math.inf)
    high = queue_up(guard, 0.0, level=Priority.HIGH)
    with use_clock(lambda: 1.0):
        guard.update(aging=1.0)
    critical = queue_up(guard, 2.0, level=Priority.CRITICAL)
    assert served(guard, [critical, high], token, 3.0) == [1, 0]


# Many tasks


def test_b35_a_thousand_tasks_through_ten_places_are_served_equally_and_none_starves():
    guard = Bulkhead("k", max_concurrent=10, max_queued=1000, max_wait=math.inf)
    calls = [0] * 1000

    @guard
    async def call(number):
        calls[number] += 1
        await asyncio.sleep(0.01)

    async def client(number):
        while True:
            await call(number)

    async def main():
        tasks = [asyncio.create_task(client(number)) for number in range(1000)]
        await asyncio.sleep(4.995)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main())
    jain = sum(calls) ** 2 / (1000 * sum(one * one for one in calls))
    assert (jain, set(calls)) == (1.0, {5})  # 10 places x 500 turns of 10 ms
    assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)


def test_b34_no_place_is_lost_where_timeouts_and_releases_race():
    guard = Bulkhead("k", max_concurrent=3, max_queued=400, max_wait=0.003)

    @guard
    async def call():
        await asyncio.sleep(0.001)

    async def impatient(number):
        try:
            async with asyncio.timeout(0.0005 * (number % 9)):
                await call()
        except (TimeoutError, BulkheadFullError):
            return 0
        return 1

    async def main():
        for _ in range(3):
            done = await asyncio.gather(*(impatient(number) for number in range(400)))
            assert sum(done) > 0
            assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)

    run(main())
    assert len([guard.enter(0.0) for _ in range(3)]) == 3


def test_b26_one_task_may_enter_the_same_bulkhead_twice_and_policies_may_nest():
    guard = Bulkhead("k", max_concurrent=2)
    other = Bulkhead("other", max_concurrent=1)

    @Pipeline(guard, other, guard)
    def nested():
        return guard.snapshot().active, other.snapshot().active

    assert nested() == (2, 1)
    with guard.scope(), guard.scope():
        assert guard.snapshot().active == 2
    assert (guard.snapshot().active, other.snapshot().active) == (0, 0)


def test_b11_cancelled_waiters_leave_a_capacity_of_three_at_three():
    guard = Bulkhead("k", max_concurrent=3, max_queued=10, max_wait=math.inf)

    async def main():
        held = [guard.admit() for _ in range(3)]
        for _ in range(2):
            waiting = asyncio.create_task(guard(asyncio.sleep)(0))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        for permit in held:
            permit.success()
        again = [guard.admit() for _ in range(3)]
        with pytest.raises(BulkheadFullError):
            guard.admit()
        for permit in again:
            permit.success()

    run(main())


# Waiters that will never come


def test_dead_waiters_do_not_keep_a_queue_full():
    guard, token = full(max_queued=2)
    dead = [queue_up(guard), queue_up(guard)]
    for wait in dead:
        wait.sleeper = Gone()
    living = queue_up(guard, 1.0)
    assert guard.snapshot().waiting == 1
    dead[0].abandon(1.0)  # as the garbage collector closes its coroutine
    guard.exit(token, 2.0, None)
    assert living.granted
    assert (guard.snapshot().active, guard.snapshot().waiting) == (1, 0)


def test_a_full_queue_is_searched_for_dead_waiters_at_most_once_a_second():
    guard, _ = full(max_queued=2)
    first, second = queue_up(guard), queue_up(guard)
    with pytest.raises(BulkheadFullError):
        guard.enter(5.0)  # looks, and finds none
    first.sleeper = Gone()
    with pytest.raises(BulkheadFullError):
        guard.enter(5.9)
    queue_up(guard, 6.0)
    assert guard.snapshot().waiting == 2
    assert not second.granted


def test_a_dead_waiter_is_passed_over_when_a_place_comes_free():
    guard, token = full()
    dead, living = queue_up(guard), queue_up(guard)
    dead.sleeper = Gone()
    guard.exit(token, 1.0, None)
    assert (dead.granted, living.granted, guard.snapshot().active) == (False, True, 1)
    dead.abandon(2.0)
    assert guard.snapshot().active == 1


def test_a_bulkhead_whose_queue_died_with_its_loop_takes_new_waiters():
    guard = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=math.inf)

    async def begin():
        task = asyncio.ensure_future(guard(asyncio.sleep)(0))
        await asyncio.sleep(0)
        task._log_destroy_pending = False

    async def main():
        task = asyncio.create_task(guard(asyncio.sleep)(0, "in"))
        await asyncio.sleep(0)
        assert guard.snapshot().waiting == 1
        held.success()
        return await task

    held = guard.admit()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    assert asyncio.run(main()) == "in"
    gc.collect()
    assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)


def test_a_finaliser_that_gives_a_place_back_while_a_call_queues_is_not_missed(monkeypatch):
    guard = Bulkhead("k", max_concurrent=1, max_queued=2)
    token = guard.enter(0.0)
    new_line = guard._new_line

    def interrupted(level):
        guard.exit(token, 0.0, None)  # a dropped stream, found by the garbage collector just now
        return new_line(level)

    monkeypatch.setattr(Bulkhead, "_new_line", lambda self, level: interrupted(level))
    guard.exit(guard.enter(0.0), 0.0, None)  # has the place, though it was about to wait
    assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)


def test_a_place_that_a_finaliser_gives_back_before_a_call_has_lain_down_to_sleep_is_had_at_once():
    guard = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=100.0)

    async def main():
        loop, held = asyncio.get_running_loop(), guard.admit()
        create_future = loop.create_future

        def interrupted():
            loop.create_future = create_future
            held.success()  # the garbage collector closes a dropped stream, while this thread has the lock
            return create_future()

        loop.create_future = interrupted
        await guard(asyncio.sleep)(0)
        assert loop.time() == 0.0

    run(main())


def test_threads_that_wait_for_several_places_never_exceed_the_limit():
    guard = Bulkhead("k", max_concurrent=5, max_queued=100, max_wait=60)
    lock, inside, worst = threading.Lock(), 0, 0

    @guard.costing(lambda cost: cost)
    def work(cost):
        nonlocal inside, worst
        with lock:
            inside += cost
            worst = max(worst, inside)
        with lock:
            inside -= cost

    def job(number):
        with priority(number % 5):
            for step in range(50):
                work(1 + (number + step) % 5)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (inside, worst <= 5, guard.snapshot().active, guard.snapshot().finished) == (0, True, 0, 400)


def test_a_place_given_back_in_a_thread_wakes_the_waiter_on_its_loop():
    places = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=60.0)
    held = places.admit()

    @places
    async def call():
        return "in"

    async def main():
        waiting = asyncio.ensure_future(call())
        await asyncio.sleep(0)
        assert places.snapshot().waiting == 1
        await asyncio.to_thread(held.success)
        return await asyncio.wait_for(waiting, 5.0)

    assert asyncio.run(main()) == "in"


def test_a_thread_that_waits_sleeps_instead_of_asking_again_and_again():
    places = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=60.0)
    held, asked, inside = places.admit(), [], []

    def clock():
        asked.append(threading.get_ident())
        return 0.0

    def enter():
        with places.scope():
            inside.append(asked.count(threading.get_ident()))

    with use_clock(clock):
        thread = threading.Thread(target=enter)
        thread.start()
        while not places.snapshot().waiting:
            pass
        thread.join(0.05)  # long enough to ask a thousand times
        held.success()
        thread.join(5.0)
    assert len(inside) == 1
    assert inside[0] < 10


def test_a_call_that_is_cancelled_while_it_waits_is_no_success_to_the_guards_it_had_passed():
    class Watching:
        def __init__(self):
            self.heard = []

        def enter(self, now):
            return None

        def exit(self, token, now, exc):
            self.heard.append(type(exc))

    watch, places = Watching(), Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=60.0)
    inner = Bulkhead("inner", max_concurrent=1)

    @Pipeline(watch, places, inner)
    async def call(): ...

    async def main():
        with places.scope():
            waiting = asyncio.ensure_future(call())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    run(main())
    assert watch.heard == [asyncio.CancelledError]
    assert inner.snapshot().finished == 0


def test_an_interrupt_in_a_thread_that_waits_leaves_the_queue_and_the_guards_before_it():
    class Interrupted:
        def __call__(self):
            return 0.0

        def sleep(self, seconds):
            raise KeyboardInterrupt

    outer, places = Bulkhead("outer", max_concurrent=1), Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=60.0)
    with use_clock(Interrupted()), places.scope():
        with pytest.raises(KeyboardInterrupt), Pipeline(outer, places).scope():
            pass
        assert (places.snapshot().waiting, outer.snapshot().active) == (0, 0)


def test_a_call_that_has_waited_just_as_long_as_a_level_is_worth_comes_after_the_higher_one():
    places = Bulkhead("k", max_concurrent=1, max_queued=2, max_wait=60.0, aging=1.0)
    held = places.enter(0.0)
    waits = []
    for now, level in ((0.0, Priority.NORMAL), (1.0, Priority.HIGH)):
        with priority(level), pytest.raises(Wait) as waiting:
            places.enter(now)
        waits.append(waiting.value)
    places.exit(held, 2.0, None)
    assert [wait.granted for wait in waits] == [False, True]
