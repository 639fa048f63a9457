"""A deadline: seen by all a call does, armed once, and given back."""

from __future__ import annotations

import asyncio
import math

import anyio
import pytest
import trio

from seawall import Bulkhead, CallTimeoutError, CircuitBreaker, Pipeline, RateLimiter, Rejected, Timeout, use_clock
from seawall.core import ambient
from seawall.policies.deadline import Deadline, DeadlineExceeded, DeadlineExceededError, DeadlinePassedError, time_left
from seawall.testing import run


def test_b33_a_deadline_cancels_a_call_that_outlives_it():
    heard = []
    page = Deadline("page", 2.0, listeners=[heard.append])

    async def main():
        with pytest.raises(DeadlineExceededError, match="'page': the call took longer than 2 s"):
            await page(asyncio.sleep)(60)
        assert asyncio.current_task().cancelling() == 0
        return asyncio.get_running_loop().time()

    assert run(main()) == 2.0
    assert heard == [DeadlineExceeded("page", 2.0, 2.0)]
    assert (page.snapshot().finished, page.snapshot().exceeded) == (1, 1)


def test_everything_a_call_does_sees_what_is_left():
    async def inner():
        await asyncio.sleep(0.5)
        return time_left()

    @Deadline("page", 2.0)
    async def outer():
        return time_left(), await asyncio.create_task(inner())

    async def main():
        seen = await outer()
        return *seen, time_left()

    assert run(main()) == (2.0, 1.5, math.inf)


def test_an_inner_deadline_only_shortens():
    async def left(inner):
        return await Pipeline(Deadline("outer", 2.0))(Pipeline(Deadline("inner", inner))(in_time))()

    async def in_time():
        return time_left()

    async def main():
        return await left(1.0), await left(5.0), time_left()

    assert run(main()) == (1.0, 2.0, math.inf)


def test_the_outer_deadline_speaks_where_the_inner_one_is_later():
    call = Pipeline(Deadline("outer", 1.0), Deadline("inner", 5.0))(asyncio.sleep)

    async def main():
        with pytest.raises(DeadlineExceededError) as caught:
            await call(60)
        return caught.value.policy

    assert run(main()) == "outer"


def test_a_deadline_bounds_the_queues_further_in():
    places = Bulkhead("k", max_concurrent=1, max_queued=5, max_wait=60.0)
    call = Pipeline(Deadline("page", 2.0), places)(asyncio.sleep)

    async def main():
        with places.scope():
            with pytest.raises((DeadlineExceededError, Rejected)):
                await call(0)
            assert asyncio.get_running_loop().time() <= 2.0
        assert places.snapshot().waiting == 0

    run(main())


def test_a_call_that_begins_too_late_is_refused_and_counts_as_neither():
    breaker, page = CircuitBreaker("b", consecutive_failures=1), Deadline("page", 1.0)
    token = ambient.deadline.set(5.0)
    try:
        with use_clock(lambda: 5.0), pytest.raises(DeadlinePassedError, match="'page' has no time left"):
            Pipeline(breaker, page)(lambda: 1)()
    finally:
        ambient.deadline.reset(token)
    assert breaker.snapshot().neither == 1
    assert page.snapshot().rejections == 1


def test_on_a_stream_it_holds_for_the_whole_and_leaves_the_consumers_context_alone():
    @Deadline("page", 2.5)
    async def count():
        for number in range(10):
            await asyncio.sleep(1)
            yield number, time_left()

    async def main():
        seen = []
        with pytest.raises(DeadlineExceededError):
            async for item in count():
                seen.append(item)
                assert time_left() == math.inf
        return seen, asyncio.get_running_loop().time()

    assert run(main()) == ([(0, 1.5), (1, 0.5)], 2.5)


def test_a_slow_consumer_uses_the_time_up_too():
    @Deadline("page", 2.0)
    async def items():
        yield 1
        await asyncio.sleep(0.001)
        yield 2

    async def main():
        with pytest.raises(DeadlineExceededError):
            async for _ in items():
                await asyncio.sleep(3)

    run(main())


def test_a_step_that_is_late_but_never_waits_gives_its_item_and_cancels_nobody_later():
    @Deadline("page", 2.0)
    async def items():
        yield 1
        yield 2

    async def main():
        seen = []
        async for item in items():
            seen.append(item)
            await asyncio.sleep(3)
        await asyncio.sleep(1)
        return seen

    assert run(main()) == [1, 2]


def test_a_block_left_behind_in_a_context_holds_nobody_up_later():
    page = Deadline("page", 2.0)

    async def held():
        async with page:
            yield time_left()

    async def main():
        stream = held()
        assert await anext(stream) == 2.0
        await asyncio.create_task(stream.aclose())  # in another context, where nothing can be reset
        assert time_left() == math.inf
        await asyncio.sleep(5)
        return await page(asyncio.sleep)(0, "begins")

    assert run(main()) == "begins"


def test_of_blocks_that_do_not_nest_the_one_that_is_left_holds():
    async def main():
        first, second = Deadline("a", 5.0).scope(), Deadline("b", 3.0).scope()
        await first.__aenter__()
        await second.__aenter__()
        await first.__aexit__(None, None, None)
        seen = [time_left()]
        await second.__aexit__(None, None, None)
        return [*seen, time_left()]

    assert run(main()) == [3.0, math.inf]


def test_a_plain_function_sees_it_and_may_come_late():
    page = Deadline("page", 2.0)
    now = [0.0]

    @page
    def work():
        left = time_left()
        now[0] = 5.0
        return left, time_left()

    with use_clock(lambda: now[0]):
        assert work() == (2.0, 0.0)
        assert time_left() == math.inf
    assert page.snapshot().finished == 1


def test_a_plain_generator_is_refused_since_its_consumer_would_see_it():
    def numbers():
        yield 1

    for policy in (Deadline("page", 1.0), Timeout("t", 1.0)):
        with pytest.raises(TypeError, match=r"numbers"):
            policy(numbers)


@pytest.mark.parametrize("ending", ["return", "raise", "cancel", "expire"])
def test_a_block_gives_the_context_back_however_it_ends(ending):
    async def block():
        async with Deadline("page", 2.0).scope():
            assert time_left() == 2.0
            if ending == "raise":
                raise ConnectionError
            await asyncio.sleep({"cancel": 1, "expire": 5}.get(ending, 0))

    async def main():
        task = asyncio.current_task()
        if ending == "cancel":
            asyncio.get_running_loop().call_later(0.5, task.cancel)
        try:
            await block()
        except (ConnectionError, asyncio.CancelledError, DeadlineExceededError) as error:
            caught = type(error)
        else:
            caught = None
        assert time_left() == math.inf
        return caught

    expected = {"raise": ConnectionError, "cancel": asyncio.CancelledError, "expire": DeadlineExceededError}
    assert run(main()) is expected.get(ending)


def test_a_cancellation_from_outside_wins_over_a_deadline_at_the_same_moment():
    call = Deadline("page", 1.0)(asyncio.sleep)

    async def main():
        task = asyncio.create_task(call(5))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(1.0, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_it_holds_on_trio_too():
    page = Deadline("page", 2.0)

    async def left():
        await trio.sleep(0.5)
        return time_left()

    async def main():
        with use_clock(trio.current_time):
            assert await page(left)() == pytest.approx(1.5)
            with pytest.raises(DeadlineExceededError):
                await page(trio.sleep)(60)
            async with page.scope():
                assert time_left() == pytest.approx(2.0)
            with pytest.raises(DeadlineExceededError):
                async with page.scope():
                    await anyio.sleep(60)
            assert time_left() == math.inf

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_permit_cannot_carry_one():
    with pytest.raises(TypeError, match="Deadline can't cancel a call that is let in by hand"):
        Pipeline(RateLimiter("r", rate=1), Deadline("page", 1.0)).admit()


@pytest.mark.parametrize("after", [0, -1, math.inf, math.nan, "2", True, None])
def test_a_deadline_needs_a_positive_finite_time(after):
    with pytest.raises((ValueError, TypeError), match="after must be"):
        Deadline("page", after)


def test_it_changes_while_in_use():
    page = Deadline("page", 1.0)
    page.update(after=3.0)

    @page
    async def left():
        return time_left()

    async def main():
        return await left()

    assert run(main()) == 3.0


def test_its_error_is_a_timeout():
    assert issubclass(DeadlineExceededError, CallTimeoutError)
    assert issubclass(CallTimeoutError, TimeoutError)


def test_a_call_that_begins_when_its_time_is_up_is_an_event_with_its_moment():
    heard = []
    late = Pipeline(Deadline("outer", 1.0), Bulkhead("k", max_concurrent=1))
    inner = Deadline("inner", 5.0, listeners=[heard.append])

    async def main():
        with pytest.raises(CallTimeoutError):
            async with late.scope():
                try:
                    await asyncio.sleep(3.0)
                finally:
                    with pytest.raises(DeadlinePassedError), inner.scope():
                        pass

    run(main())
    assert [(event.policy, event.at) for event in heard] == [("inner", 1.0)]
