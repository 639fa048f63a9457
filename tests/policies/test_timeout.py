from __future__ import annotations

import asyncio
import contextvars
import gc
import math
from contextlib import aclosing
from datetime import timedelta

import pytest

from seawall import Bulkhead, CallTimedOut, CallTimeoutError, Pipeline, Timeout
from seawall.core.timers import running_timers
from seawall.testing import run


def now():
    return asyncio.get_running_loop().time()


async def hang():
    await asyncio.sleep(1e6)


def test_a_call_is_cancelled_when_its_time_is_up_and_not_before():
    guard = Timeout("t", 2.0)
    seen = []

    @guard
    async def call(seconds):
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            seen.append(now())
            raise
        return "done"

    async def main():
        assert await call(1.999) == "done"
        start = now()
        with pytest.raises(CallTimeoutError) as caught:
            await call(3)
        assert seen == [pytest.approx(start + 2.0, abs=1e-5)]
        assert asyncio.current_task().cancelling() == 0
        assert str(caught.value) == "'t': the call took longer than 2 s"
        assert (caught.value.policy, caught.value.after) == ("t", 2.0)
        assert isinstance(caught.value, TimeoutError)

    run(main())
    assert guard.counters() == {"finished": 2, "timed_out": 1}


def test_a_timeout_is_an_event():
    heard = []

    async def main():
        with pytest.raises(CallTimeoutError):
            await Timeout("t", timedelta(seconds=2), listeners=[heard.append])(hang)()

    run(main())
    assert heard == [CallTimedOut("t", 2.0, 2.0)]


def test_many_calls_share_one_timer_of_the_loop():
    async def main():
        loop = asyncio.get_running_loop()
        guard = Timeout("t", 5.0)
        tasks = [asyncio.create_task(guard(asyncio.sleep)(1)) for _ in range(500)]
        before = len(loop._scheduled)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(loop._scheduled) - before == 500 + 1  # each sleep has its own, all deadlines have one
        await asyncio.gather(*tasks)
        await asyncio.sleep(10)
        assert not loop._scheduled
        assert not running_timers()._queues()

    run(main())


def test_different_timeouts_expire_each_at_its_own_time():
    ends = {}

    async def one(after, start):
        await asyncio.sleep(start)
        began = now()
        with pytest.raises(CallTimeoutError):
            await Timeout("t", after)(hang)()
        ends[after, start] = now() - began

    async def main():
        await asyncio.gather(*(one(after, start) for after in (5.0, 1.0, 3.0) for start in (0.0, 2.5, 0.5)))

    run(main())
    assert {key: pytest.approx(key[0], abs=1e-5) for key in ends} == ends
    assert len(ends) == 9


def test_a_call_that_swallows_its_cancellation_and_returns_has_succeeded():
    @Timeout("t", 1.0)
    async def call():
        try:
            await hang()
        except asyncio.CancelledError:
            return "a part"

    async def main():
        assert await call() == "a part"
        assert asyncio.current_task().cancelling() == 0
        await asyncio.sleep(5)

    run(main())


def test_an_error_raised_while_timing_out_is_not_masked():
    @Timeout("t", 1.0)
    async def call():
        try:
            await hang()
        finally:
            raise ConnectionError("while cleaning up")

    async def main():
        with pytest.raises(ConnectionError, match="while cleaning up"):
            await call()
        assert asyncio.current_task().cancelling() == 0

    run(main())


@pytest.mark.parametrize("cleanup", [0.0, 5.0])
def test_a_cancellation_from_outside_wins_whichever_came_first(cleanup):
    @Timeout("t", 1.0)
    async def call():
        try:
            await hang()
        finally:
            await asyncio.sleep(cleanup)

    async def main():
        for cancel_at in (0.5, 1.0, 1.5):
            if cancel_at > 1.0 and not cleanup:
                continue
            task = asyncio.create_task(call())
            asyncio.get_running_loop().call_later(cancel_at, task.cancel)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()

    run(main())


@pytest.mark.parametrize(("outer", "inner", "winner"), [(1.0, 2.0, "outer"), (2.0, 1.0, "inner"), (1.0, 1.0, "outer")])
@pytest.mark.parametrize("cleanup", [0.0, 10.0])
def test_of_two_timeouts_in_one_row_the_error_and_the_counts_are_right(outer, inner, winner, cleanup):
    guards = {"outer": Timeout("outer", outer), "inner": Timeout("inner", inner)}

    @Pipeline(*guards.values())
    async def call():
        try:
            await hang()
        finally:
            await asyncio.sleep(cleanup)

    async def main():
        with pytest.raises(CallTimeoutError) as caught:
            await call()
        assert asyncio.current_task().cancelling() == 0
        if not cleanup:  # with both expired, the outer one has the last word
            assert caught.value.policy == winner
        assert sum(guard.counters()["timed_out"] for guard in guards.values()) == 1
        await asyncio.sleep(100)

    run(main())


def test_a_stack_agrees_with_nested_asyncio_timeouts():
    async def ours(outer, inner, cleanup):
        @Timeout("outer", outer)
        @Timeout("inner", inner)
        async def call():
            try:
                await hang()
            finally:
                await asyncio.sleep(cleanup)

        try:
            await call()
        except CallTimeoutError as error:
            return error.policy

    async def theirs(outer, inner, cleanup):
        try:
            async with asyncio.timeout(outer):
                try:
                    async with asyncio.timeout(inner):
                        try:
                            await hang()
                        finally:
                            await asyncio.sleep(cleanup)
                except TimeoutError:
                    return "inner"
        except TimeoutError:
            return "outer"

    async def main():
        for times in [(1, 2, 0), (2, 1, 0), (1, 2, 0.5), (2, 1, 0.5)]:
            assert await ours(*times) == await theirs(*times), times

    run(main())


def test_on_a_stream_it_holds_for_each_item_and_the_consumers_time_is_free():
    guard = Timeout("t", 1.0)

    @guard
    async def stream():
        for seconds in (0.9, 0.9, 0.9, 5.0):
            await asyncio.sleep(seconds)
            yield seconds

    async def main():
        seen = []
        with pytest.raises(CallTimeoutError):
            async for item in stream():
                seen.append(item)
                await asyncio.sleep(10)
        assert seen == [0.9, 0.9, 0.9]

    run(main())


def test_each_item_of_a_stream_may_be_asked_for_by_another_task():
    @Timeout("t", 1.0)
    async def stream():
        yield 1
        yield 2
        await hang()

    async def main():
        items = stream()
        assert await asyncio.create_task(anext(items)) == 1
        assert await asyncio.create_task(anext(items)) == 2
        with pytest.raises(CallTimeoutError):
            await asyncio.create_task(anext(items))

    run(main())


def test_a_stream_that_swallows_one_timeout_is_cancelled_from_outside_all_the_same():
    @Timeout("t", 1.0)
    async def stream():
        try:
            await hang()
        except asyncio.CancelledError:
            yield "late"
        await asyncio.sleep(0.5)
        yield "in time"
        await hang()

    async def main():
        async def consume():
            async with aclosing(stream()) as items:
                assert await anext(items) == "late"
                assert await anext(items) == "in time"
                await anext(items)

        task = asyncio.create_task(consume())
        asyncio.get_running_loop().call_later(1.7, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_the_call_stays_in_its_own_task_and_context():
    variable = contextvars.ContextVar("variable", default=0)

    async def main():
        @Timeout("t", 1.0)
        async def call():
            variable.set(1)
            return asyncio.current_task()

        assert await call() is asyncio.current_task()
        assert variable.get() == 1

    run(main())


def test_a_block_may_be_timed_too():
    guard = Timeout("t", 1.0)

    async def main():
        with pytest.raises(CallTimeoutError):
            async with guard:
                await hang()
        async with guard.scope():
            await asyncio.sleep(0.9)
        with pytest.raises(ZeroDivisionError):
            async with guard:
                raise ZeroDivisionError
        await asyncio.sleep(5)

    run(main())


@pytest.mark.parametrize("use", ["def", "generator", "with", "scope", "admit", "call_sync"])
def test_where_no_loop_can_cancel_it_is_refused(use):
    guard = Timeout("t", 1.0)
    with pytest.raises(TypeError, match=r"Timeout (needs an event loop|can't cancel)"):
        if use == "def":

            @guard
            def plain(): ...

        elif use == "generator":

            @guard
            def numbers():
                yield 1

        elif use == "with":
            with guard:
                pass
        elif use == "scope":
            with guard.scope():
                pass
        elif use == "admit":
            guard.admit()
        else:
            Pipeline(guard).call_sync(len, "")


def test_outside_a_task_there_is_nothing_to_cancel_and_it_says_so():
    async def main():
        coroutine = Timeout("t", 1.0)(asyncio.sleep)(0)
        errors = []

        def in_a_callback():
            try:
                coroutine.send(None)
            except RuntimeError as error:
                errors.append(str(error))

        asyncio.get_running_loop().call_soon(in_a_callback)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert errors == ["a timeout needs a task to cancel: run the call inside a task, not a loop callback"]

    run(main())


@pytest.mark.parametrize(
    ("after", "error", "rule"),
    [
        (0, ValueError, "after must be more than 0 and finite, got 0 s"),
        (-2.0, ValueError, "got -2.0 s"),
        (math.inf, ValueError, "more than 0 and finite, got inf s"),
        ("2s", TypeError, "after must be a number of seconds or a timedelta, got '2s'"),
        (None, TypeError, "got None"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(after, error, rule):
    with pytest.raises(error, match=rule):
        Timeout("t", after)


def test_an_update_does_not_change_what_is_said_of_the_calls_before():
    guard = Timeout("t", 1.0)

    async def main():
        task = asyncio.create_task(guard(asyncio.sleep)(5))
        await asyncio.sleep(0)
        guard.update(after=10.0)
        with pytest.raises(CallTimeoutError) as caught:
            await task
        return caught.value.after

    assert run(main()) == 1.0


def test_a_closed_loop_takes_the_calls_it_left_behind_with_it():
    places = Bulkhead("k", max_concurrent=1)

    @Pipeline(places, Timeout("t", 60.0))
    async def hang():
        await asyncio.Event().wait()

    async def main():
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().stop)
        task = asyncio.create_task(hang())
        task._log_destroy_pending = False

    loop = asyncio.new_event_loop()
    main_task = loop.create_task(main())
    loop.run_forever()
    assert places.snapshot().active == 1
    loop.close()
    del loop, main_task
    gc.collect()
    assert places.snapshot().active == 0
