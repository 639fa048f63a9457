"""What goes wrong elsewhere, proven absent here. The ids are those of our list of peers' defects."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import threading
import weakref
from asyncio import CancelledError

import pytest

from seawall import (
    SLO,
    Bulkhead,
    BulkheadFullError,
    CallTimeoutError,
    CircuitBreaker,
    CircuitOpenError,
    Pipeline,
    RateLimitedError,
    RateLimiter,
    State,
    Timeout,
    Wait,
    listen,
    live,
    use_clock,
)


def breaker(**settings):
    return CircuitBreaker("b", **{"consecutive_failures": 3, "reset_timeout": 30.0, **settings})


def fail(guard, now, error=None):
    guard.exit(guard.enter(now), now, error or ConnectionError())


def opened(**settings):
    guard = breaker(**settings)
    for _ in range(3):
        fail(guard, 0.0)
    assert guard.state is State.OPEN
    return guard


def test_b01_of_fifty_calls_when_the_open_time_ends_one_probes():
    guard = opened()
    guard.enter(30.0)
    for _ in range(49):
        with pytest.raises(CircuitOpenError):
            guard.enter(30.0)


def test_b01_as_many_probe_as_were_permitted_and_as_many_must_succeed():
    guard = opened(probes=2, success_threshold=3)
    first, second = guard.enter(30.0), guard.enter(30.0)
    with pytest.raises(CircuitOpenError):
        guard.enter(30.0)
    guard.exit(first, 30.1, None)
    guard.exit(second, 30.1, None)
    assert guard.state is State.HALF_OPEN
    guard.exit(guard.enter(30.2), 30.3, None)
    assert guard.state is State.CLOSED


def test_b02_cancelled_calls_are_neither_failures_nor_successes():
    guard = breaker()
    fail(guard, 0.0)
    fail(guard, 0.0)
    for _ in range(3):
        fail(guard, 0.0, CancelledError())
    assert guard.state is State.CLOSED
    assert guard.snapshot().neither == 3
    fail(guard, 0.0)
    assert guard.state is State.OPEN


@pytest.mark.parametrize("ending", [CancelledError(), BulkheadFullError("inner"), KeyboardInterrupt(), GeneratorExit()])
def test_b03_a_probe_that_ends_as_neither_gives_its_slot_back(ending):
    guard = opened()
    fail(guard, 30.0, ending)
    assert guard.state is State.HALF_OPEN
    guard.exit(guard.enter(30.1), 30.2, None)
    assert guard.state is State.CLOSED


def test_b04_a_hanging_probe_keeps_the_next_one_out_until_its_lease_ends():
    guard = opened(probe_timeout=5.0)
    hanging = guard.enter(30.0)
    with pytest.raises(CircuitOpenError) as refused:
        guard.enter(34.0)
    assert refused.value.retry_after == pytest.approx(1.0)
    second = guard.enter(35.0)
    guard.exit(hanging, 36.0, ConnectionError())  # its lease ran out: it proves nothing
    assert guard.state is State.HALF_OPEN
    guard.exit(second, 36.0, None)
    assert guard.state is State.CLOSED


@pytest.mark.parametrize("late", [None, ConnectionError()])
def test_b05_a_result_from_before_a_transition_changes_nothing(late):
    guard = breaker()
    old = guard.enter(0.0)
    for _ in range(3):
        fail(guard, 0.0)
    probe = guard.enter(30.0)
    guard.exit(old, 30.1, late)
    assert guard.state is State.HALF_OPEN
    guard.exit(probe, 30.2, None)
    assert guard.state is State.CLOSED


def test_b05_stale_failures_do_not_weigh_in_the_rate_of_a_closed_breaker():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=2, reset_timeout=1.0)
    old = [guard.enter(0.0) for _ in range(50)]
    fail(guard, 0.0)
    fail(guard, 0.0)
    guard.exit(guard.enter(1.0), 1.0, None)
    for token in old:
        guard.exit(token, 1.1, ConnectionError())
    guard.exit(guard.enter(1.2), 1.2, None)
    guard.exit(guard.enter(1.2), 1.2, None)
    fail(guard, 1.3)
    assert guard.state is State.CLOSED  # one of three failed, not 51 of 53
    assert guard.snapshot().failures == 53


def test_b06_an_ignored_error_does_not_wipe_the_failures_before_it():
    guard = breaker(ignore=ValueError)
    fail(guard, 0.0)
    fail(guard, 0.0)
    fail(guard, 0.0, ValueError())
    fail(guard, 0.0)
    assert guard.state is State.OPEN


@pytest.mark.asyncio
async def test_b07_an_async_generator_that_fails_midway_three_times_opens_the_breaker():
    guard = breaker()

    @guard
    async def stream():
        yield 1
        raise ConnectionError

    for _ in range(3):
        with pytest.raises(ConnectionError):
            [item async for item in stream()]
    assert guard.state is State.OPEN


@pytest.mark.asyncio
async def test_b08_failures_of_coroutines_are_seen():
    guard = breaker()

    @guard
    async def call():
        raise ConnectionError

    for _ in range(3):
        with pytest.raises(ConnectionError):
            await call()
    with pytest.raises(CircuitOpenError):
        await call()


def test_b09_threads_run_in_parallel_behind_one_breaker():
    together = threading.Barrier(8, timeout=30)
    guarded = breaker()(together.wait)
    threads = [threading.Thread(target=guarded) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not together.broken  # all eight were inside at once


@pytest.mark.asyncio
async def test_b11_waiters_cancelled_in_the_queue_cost_no_capacity():
    guard = Bulkhead("k", max_concurrent=1, max_queued=10, max_wait=60)
    held = guard.admit()

    @guard
    async def call():
        return "in"

    waiting = [asyncio.create_task(call()) for _ in range(5)]
    await asyncio.sleep(0)
    assert guard.snapshot().waiting == 5
    for task in waiting[:4]:
        task.cancel()
    await asyncio.gather(*waiting[:4], return_exceptions=True)
    held.success()
    assert await waiting[4] == "in"
    assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)


@pytest.mark.asyncio
async def test_b11_a_waiter_cancelled_while_it_is_handed_a_place_passes_it_on():
    guard = Bulkhead("k", max_concurrent=1, max_queued=10, max_wait=60)
    held = guard.admit()

    @guard
    async def call():
        return "in"

    first, second = asyncio.create_task(call()), asyncio.create_task(call())
    await asyncio.sleep(0)
    held.success()  # hands the place to the first ...
    first.cancel()  # ... which is cancelled before it runs
    assert await second == "in"
    assert first.cancelled() or isinstance((await asyncio.gather(first, return_exceptions=True))[0], CancelledError)
    assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)


@pytest.mark.asyncio
async def test_b12_one_timeout_entered_twice_at_once_keeps_both_deadlines():
    guard = Timeout("t", 0.01)

    @guard
    async def hang():
        await asyncio.Event().wait()

    results = await asyncio.gather(hang(), hang(), return_exceptions=True)
    assert [type(result) for result in results] == [CallTimeoutError, CallTimeoutError]


def test_b13_policies_are_built_without_a_loop_and_serve_many():
    guard = Pipeline(
        SLO("a", target=0.9),
        breaker(),
        Bulkhead("k", max_concurrent=1),
        RateLimiter("r", rate=1e6),
        Timeout("t", 5.0),
    )

    @guard
    async def call():
        return 1

    assert [asyncio.run(call()) for _ in range(3)] == [1, 1, 1]


def test_b14_after_a_pause_a_limiter_admits_its_burst_and_no_more():
    guard = RateLimiter("r", rate=10)
    for now in (2.0, 100.0):
        for _ in range(10):
            guard.enter(now)
        with pytest.raises(RateLimitedError) as refused:
            guard.enter(now)
        assert refused.value.retry_after == pytest.approx(0.1)


def test_b15_each_rejection_is_a_fresh_exception_and_nothing_of_it_is_kept():
    guard = opened()
    call = guard(lambda: None)
    with use_clock(lambda: 0.0):
        errors = []
        for _ in range(3):
            with pytest.raises(CircuitOpenError) as refused:
                call()
            errors.append(weakref.ref(refused.value))
            depth, trace = 0, refused.value.__traceback__
            while trace is not None:
                depth, trace = depth + 1, trace.tb_next
            assert depth < 10
            del refused, trace
    gc.collect()
    assert [error() for error in errors] == [None] * 3


def test_b16_two_breakers_that_share_a_name_share_nothing_else():
    one, two = breaker(ignore=ValueError), breaker()
    for _ in range(3):
        fail(one, 0.0, ValueError())
        fail(two, 0.0, ValueError())
    assert (one.state, two.state) == (State.CLOSED, State.OPEN)


def test_b22_a_limiter_serves_in_order_and_newcomers_do_not_barge():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=60)
    guard.enter(0.0)
    waits = []
    for _ in range(3):
        with pytest.raises(Wait) as waiting:
            guard.enter(0.0)
        waits.append(waiting.value)
    assert [wait.until for wait in waits] == [1.0, 2.0, 3.0]
    with pytest.raises(Wait):
        guard.enter(1.0)  # a turn is free, but three were first
    waits[0].resume(1.0)
    for now, wait in ((1.0, waits[1]), (1.5, waits[1])):
        with pytest.raises(Wait):
            wait.resume(now)
    assert waits[1].until == 2.0
    waits[1].abandon(1.5)
    with pytest.raises(Wait):
        waits[2].resume(1.5)
    assert waits[2].until == 2.0  # moved up


def test_b23_one_row_serves_three_loops_in_three_threads_within_its_limit():
    guard = Bulkhead("k", max_concurrent=2, max_queued=1000, max_wait=60)
    limiter = RateLimiter("r", rate=1e6, max_wait=60)
    inside, worst, done = [], [], []

    @Pipeline(guard, limiter, Timeout("t", 60))
    async def call():
        inside.append(1)
        worst.append(len(inside))
        await asyncio.sleep(0)
        inside.pop()
        done.append(1)

    async def main():
        await asyncio.gather(*(call() for _ in range(100)))

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 300
    assert max(worst) <= 2
    assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)


def test_b23_a_waiter_whose_loop_is_gone_does_not_swallow_the_place():
    guard = Bulkhead("k", max_concurrent=1, max_queued=2, max_wait=60)
    held = guard.admit()

    @guard
    async def call():
        """Never runs: its loop is closed while it waits."""

    loop = asyncio.new_event_loop()
    task = loop.create_task(call())
    loop.run_until_complete(asyncio.sleep(0))
    assert guard.snapshot().waiting == 1
    loop.close()
    held.success()
    assert guard.snapshot().active == 0
    task._log_destroy_pending = False


@pytest.mark.asyncio
async def test_b26_a_task_may_enter_a_bulkhead_twice():
    guard = Bulkhead("k", max_concurrent=2)
    async with guard, guard:
        assert guard.snapshot().active == 2
    assert guard.snapshot().active == 0


def test_b30_the_call_that_trips_the_breaker_raises_its_own_exception():
    error = ConnectionError("the real one")

    @breaker(consecutive_failures=1)
    def call():
        raise error

    with pytest.raises(ConnectionError) as caught:
        call()
    assert caught.value is error
    assert caught.value.__cause__ is None


def test_b31_dropped_policies_are_gone_without_a_collection():
    gc.disable()
    try:
        before = sum(1 for _ in live())
        for number in range(1000):
            CircuitBreaker(f"b{number}")
        assert sum(1 for _ in live()) == before
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_b34_every_permit_survives_a_storm_of_cancellations():
    guard = Bulkhead("k", max_concurrent=3, max_queued=500, max_wait=60)

    @guard
    async def call():
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    for round_ in range(60):
        tasks = [asyncio.create_task(call()) for _ in range(40)]
        for step in range(6):
            await asyncio.sleep(0)
            tasks[(round_ * 7 + step * 11) % 40].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)


@pytest.mark.asyncio
async def test_b35_a_thousand_tasks_through_ten_places_are_all_served_in_turn():
    guard = Bulkhead("k", max_concurrent=10, max_queued=1000, max_wait=60)
    order = []

    @guard
    async def call(number):
        order.append(number)
        await asyncio.sleep(0)

    await asyncio.gather(*(call(number) for number in range(1000)))
    assert order == list(range(1000))


def test_b36_callable_objects_and_partials_are_guarded_as_what_they_are():
    class Client:
        async def __call__(self):
            raise ConnectionError

    async def call(number):
        raise ConnectionError

    for target in (Client(), functools.partial(call, 1), functools.partial(Client())):
        guard = breaker(consecutive_failures=1)
        with pytest.raises(ConnectionError):
            asyncio.run(guard(target)())
        assert guard.state is State.OPEN


def test_b36_a_plain_function_that_returns_a_coroutine_is_refused():
    async def work(number): ...

    with pytest.raises(TypeError, match="decorate the `async def` itself"):
        breaker()(lambda: work(1))()


def test_b37_a_probe_of_one_round_does_not_settle_the_next():
    guard = opened(probes=2)
    old, failing = guard.enter(30.0), guard.enter(30.0)
    guard.exit(failing, 30.1, ConnectionError())
    assert guard.state is State.OPEN
    guard.enter(60.1)
    guard.exit(old, 60.2, None)
    assert guard.state is State.HALF_OPEN


@pytest.mark.asyncio
@pytest.mark.parametrize("ending", [None, ConnectionError, CircuitOpenError])
async def test_b38_a_call_leaves_no_reference_cycle(ending):
    row = Pipeline(SLO("a", target=0.9), breaker(), Bulkhead("k", max_concurrent=1), Timeout("t", 5.0))
    if ending is CircuitOpenError:
        row = Pipeline(opened(reset_timeout=1e9))

    @row
    async def call():
        if ending:
            raise ending

    async def once():
        try:
            await call()
        except Exception:
            return

    await once()
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            await once()
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_b39_context_variables_set_inside_the_call_stay():
    seen = contextvars.ContextVar("seen", default=0)

    @Timeout("t", 5.0)
    async def call():
        seen.set(1)

    await call()
    assert seen.get() == 1


def test_s1_a_wait_that_can_not_be_met_is_refused_at_once():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=1.5)
    guard.enter(0.0)
    with pytest.raises(Wait):
        guard.enter(0.0)
    with pytest.raises(RateLimitedError) as refused:
        guard.enter(0.0)
    assert refused.value.retry_after == pytest.approx(2.0)


def test_s5_a_listener_may_call_the_breaker_and_a_broken_one_hurts_nobody(caplog):
    guard = breaker(consecutive_failures=1)
    heard = []

    def ask_back(event):
        heard.append((event, guard.state, guard.snapshot().failures))

    def broken(event):
        raise RuntimeError("listener")

    guard.listen(broken)
    guard.listen(ask_back)
    stop = listen(heard.append)
    with pytest.raises(ZeroDivisionError):
        guard(lambda: 1 / 0)()
    stop()
    (event, state, failures), again = heard
    assert (event.before, event.after, state, failures) == (State.CLOSED, State.OPEN, State.OPEN, 1)
    assert again is event
    assert "listener" in caplog.text


@pytest.mark.asyncio
async def test_the_users_own_timeout_error_is_not_relabelled():
    @Timeout("t", 5.0)
    async def call():
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine") as caught:
        await call()
    assert not isinstance(caught.value, CallTimeoutError)


@pytest.mark.asyncio
async def test_a_cancellation_from_outside_wins_over_a_timeout():
    entered = asyncio.Event()

    @Timeout("t", 0.0001)
    async def call():
        entered.set()
        try:
            await asyncio.Event().wait()
        except CancelledError:
            task.cancel()  # arrives while the timeout is being handled
            raise

    task = asyncio.create_task(call())
    with pytest.raises(CancelledError):
        await task


@pytest.mark.asyncio
async def test_a_finished_call_leaves_no_deadline_behind_that_could_cancel_its_task():
    guard = Timeout("t", 0.005)

    @guard
    async def call():
        return 1

    @guard
    async def stream():
        yield 1

    await call()
    assert [item async for item in stream()] == [1]
    async with guard:
        pass
    await asyncio.sleep(0.02)  # longer than the timeout: a forgotten deadline would cancel us here


def test_a_stream_abandoned_on_a_closed_loop_gives_its_place_back():
    guard = Bulkhead("k", max_concurrent=1)

    @guard
    async def stream():
        yield 1
        yield 2

    async def begin():
        items = stream()
        await anext(items)
        return items

    loop = asyncio.new_event_loop()
    items = loop.run_until_complete(begin())
    loop.close()
    assert guard.snapshot().active == 1
    del items
    gc.collect()
    assert guard.snapshot().active == 0


def test_a_limiter_whose_head_waits_on_a_closed_loop_still_serves_others():
    guard = RateLimiter("r", rate=20, burst=1, max_wait=60)

    @guard
    async def call():
        return 1

    loop = asyncio.new_event_loop()
    loop.run_until_complete(call())
    task = loop.create_task(call())
    loop.run_until_complete(asyncio.sleep(0))
    assert guard.snapshot().waiting == 1
    loop.close()
    with use_clock(lambda: 1e12):  # long overdue
        assert asyncio.run(call()) == 1
        assert guard.snapshot().waiting == 0
    task._log_destroy_pending = False
