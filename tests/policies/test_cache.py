from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import math
import threading
import traceback
import weakref
from datetime import timedelta

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from seawall import (
    Bulkhead,
    CallTimeoutError,
    CircuitBreaker,
    Deadline,
    Pipeline,
    Timeout,
    policies_of,
    single_flight,
    use_clock,
)
from seawall.core import ambient, tasks
from seawall.policies.cache import Cache, RefreshFailed, StaleAnswered
from seawall.policies.cache.flight import _aboard
from seawall.testing import AsyncScript, VirtualClock, run


def now():
    return asyncio.get_running_loop().time()


def others():
    return asyncio.all_tasks() - {asyncio.current_task()}


class Slow:
    """A coroutine function that takes a second, counts its runs, and fails while it is told to."""

    def __init__(self, seconds=1.0):
        self.seconds = seconds
        self.runs = []
        self.ended = []
        self.error = None

    async def __call__(self, *args):
        self.runs.append((now(), *args))
        number = len(self.runs)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.ended.append(now())
        if self.error is not None:
            raise self.error
        return number


# Remembering


def test_a_value_is_good_for_its_ttl_and_no_longer():
    cache, slow = Cache("c", ttl=10), Slow()

    async def main():
        get = cache(slow)
        assert await get("a") == 1
        assert await get("b") == 2
        await asyncio.sleep(8.9)
        assert await get("a") == 1
        await asyncio.sleep(0.1)
        assert now() == 11.0
        assert await get("a") == 3

    run(main())
    snapshot = cache.snapshot()
    assert (snapshot.hits, snapshot.misses, snapshot.entries, snapshot.flights) == (1, 3, 2, 0)
    assert cache.counters() == {"hits": 1, "misses": 3, "shared": 0, "stale": 0, "refreshes": 0, "evictions": 0}
    assert cache.gauges() == {"entries": 2, "flights": 0}


def test_a_plain_function_is_remembered_too():
    runs, cache = [], Cache("c", ttl=timedelta(seconds=10))

    @cache
    def get(x, *, y=0):
        runs.append((x, y))
        return x + y

    clock = VirtualClock()
    with use_clock(clock):
        assert [get(1), get(1), get(1, y=2), get(1, y=2)] == [1, 1, 3, 3]
        clock.advance(10)
        assert get(1) == 1
    assert runs == [(1, 0), (1, 2), (1, 0)]


def test_a_full_cache_forgets_what_was_not_asked_for_longest():
    runs, cache = [], Cache("c", ttl=10, max_entries=2)

    @cache
    def get(x):
        runs.append(x)
        return x

    for x in (1, 2, 1, 3, 1, 2):
        assert get(x) == x
    assert runs == [1, 2, 3, 2]
    assert cache.snapshot().evictions == 2
    assert cache.snapshot().entries == 2


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("get"), st.integers(0, 4)),
            st.tuples(st.just("sleep"), st.integers(1, 6)),
            st.tuples(st.just("forget"), st.integers(0, 4)),
        ),
        max_size=40,
    ),
    entries=st.integers(1, 4),
)
def test_it_agrees_with_a_small_model(steps, entries):
    clock, runs, model = VirtualClock(), [], {}
    cache = Cache("c", ttl=10, max_entries=entries)

    @cache
    def get(x):
        runs.append(x)
        return len(runs)

    with use_clock(clock):
        for step, value in steps:
            if step == "sleep":
                clock.advance(value)
            elif step == "forget":
                assert cache.invalidate(value) == (value in model)
                model.pop(value, None)
            else:
                before = len(runs)
                answer = get(value)
                known = model.pop(value, None)
                if known is not None and clock() - known[1] < 10:
                    assert (answer, len(runs)) == (known[0], before)
                    model[value] = known
                else:
                    assert (answer, len(runs)) == (before + 1, before + 1)
                    model[value] = (answer, clock())
                    while len(model) > entries:
                        model.pop(next(iter(model)))
            assert cache.snapshot().entries == len(model) <= entries


def test_keyword_arguments_are_part_of_the_key_in_any_order_and_never_mistaken_for_others():
    runs, cache = [], Cache("c", ttl=10)

    @cache
    def get(*args, **kwargs):
        runs.append((args, kwargs))
        return len(runs)

    assert get(1, a=1, b=2) == get(1, b=2, a=1) == 1
    assert get(1, ("a", 1), ("b", 2)) == 2
    assert get((1,), (("a", 1), ("b", 2))) == 3
    assert get() == 4
    assert get(a=1) == 5


def test_a_key_of_ones_own_decides():
    cache = Cache("c", ttl=10, key=lambda request: request["id"])

    @cache
    def get(request):
        return request["at"]

    assert get({"id": 1, "at": 1}) == get({"id": 1, "at": 2}) == 1
    assert cache.invalidate({"id": 1})
    assert get({"id": 1, "at": 3}) == 3


def test_arguments_that_cannot_be_hashed_are_refused_with_the_cure():
    async def coroutine(x): ...

    async def main():
        with pytest.raises(TypeError, match=r"Cache 'c' can't use unhashable type: 'list'; give it a `key`"):
            await Cache("c", ttl=10)(coroutine)([])

    run(main())
    with pytest.raises(TypeError, match="its `key` must return something to hash"):
        Cache("c", ttl=10, key=lambda x: [x])(lambda x: x)(1)


def test_methods_have_the_instance_in_their_key():
    class Shop:
        def __init__(self, name):
            self.name = name

        @Cache("c", ttl=10)
        async def price(self, item):
            return f"{item} at {self.name}"

    async def main():
        one, other = Shop("one"), Shop("other")
        assert await one.price("tea") == "tea at one"
        assert await other.price("tea") == "tea at other"

    run(main())


def test_one_cache_holds_the_results_of_one_function():
    cache = Cache("c", ttl=10)

    def one(x): ...
    def other(x): ...

    cache(one)
    cache(one)
    with pytest.raises(TypeError, match=r"Cache 'c' holds the results of .*one.*, and equal arguments of .*other"):
        cache(other)
    static = Cache("s", ttl=10)
    assert isinstance(static(staticmethod(one)), staticmethod)
    with pytest.raises(TypeError, match="holds the results of"):
        static(other)


def test_values_are_shared_not_copied():
    @Cache("c", ttl=10)
    def get():
        return []

    get().append(1)
    assert get() == [1]


def test_results_that_are_not_to_be_remembered_are_not():
    runs, cache = [], Cache("c", ttl=10, cache_if=lambda result: result is not None)

    @cache
    def get(x):
        runs.append(x)
        return x or None

    assert [get(0), get(0), get(1), get(1)] == [None, None, 1, 1]
    assert runs == [0, 0, 1]


def test_a_predicate_that_fails_remembers_nothing(caplog):
    runs = []

    @Cache("c", ttl=10, cache_if=lambda result: 1 / 0)
    def get():
        runs.append(1)
        return "x"

    assert get() == get() == "x"
    assert len(runs) == 2
    assert "predicate" in caplog.text


def test_none_is_a_value_like_any_other():
    runs = []

    @Cache("c", ttl=math.inf)
    def get():
        runs.append(1)

    assert get() is get() is None
    assert len(runs) == 1


def test_errors_are_not_remembered():
    cache, slow = Cache("c", ttl=10), Slow()

    async def main():
        get = cache(slow)
        slow.error = ConnectionError()
        with pytest.raises(ConnectionError):
            await get()
        slow.error = None
        assert await get() == 2

    run(main())


def test_what_is_forgotten_is_asked_for_again_and_a_run_in_flight_then_is_not_remembered():
    cache, slow = Cache("c", ttl=10), Slow()

    async def main():
        get = cache(slow)
        old = asyncio.create_task(get("a"))
        await asyncio.sleep(0.5)
        assert cache.invalidate("a") is False  # nothing yet, but what the run read may be old
        new = asyncio.create_task(get("a"))
        assert await old == 1
        assert await new == 2
        assert await get("a") == 2
        assert cache.invalidate("a") is True
        assert await get("a") == 3
        flight = asyncio.create_task(get("b"))
        await asyncio.sleep(0.5)
        cache.clear()
        assert cache.snapshot().entries == 0
        assert await flight == 4
        assert cache.snapshot().entries == 0
        assert await get("a") == 5

    run(main())


# Sharing a run


def test_concurrent_calls_with_equal_arguments_share_one_run():
    cache, slow = Cache("c", ttl=0), Slow()

    async def main():
        get = cache(slow)
        assert await asyncio.gather(*(get(x) for x in "aaabab")) == [1, 1, 1, 2, 1, 2]
        assert now() == 1.0
        assert await get("a") == 3  # nothing was remembered
        assert not others()

    run(main())
    snapshot = cache.snapshot()
    assert (snapshot.misses, snapshot.shared, snapshot.entries, snapshot.flights) == (3, 4, 0, 0)


@pytest.mark.parametrize("victims", [[0], [1], [0, 1], [2], [1, 2]])
@pytest.mark.parametrize("at", [0.0, 0.5])
def test_cancellation_of_one_waiter_does_not_kill_the_others(victims, at):
    cache, slow = Cache("c", ttl=10), Slow()

    async def main():
        get = cache(slow)
        callers = [asyncio.create_task(get("a")) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(at)
        for victim in victims:
            callers[victim].cancel()
        results = await asyncio.gather(*callers, return_exceptions=True)
        for number, result in enumerate(results):
            assert isinstance(result, asyncio.CancelledError) if number in victims else result == 1
        assert await get("a") == 1

    run(main())
    assert len(slow.runs) == 1
    assert cache.snapshot().flights == 0


def test_the_last_waiter_that_is_cancelled_cancels_the_run_and_waits_for_its_end():
    cache, ended = Cache("c", ttl=10), []

    @cache
    async def get():
        try:
            await asyncio.sleep(50)
        finally:
            await asyncio.sleep(0.25)
            ended.append(now())

    async def main():
        callers = [asyncio.create_task(get()) for _ in range(2)]
        await asyncio.sleep(1.0)
        callers[0].cancel()
        await asyncio.sleep(1.0)
        assert callers[0].cancelled()
        callers[1].cancel()
        await asyncio.sleep(0.1)
        late = asyncio.create_task(get())  # does not join a run that is being called off
        with pytest.raises(asyncio.CancelledError):
            await callers[1]
        assert ended == [2.25]
        await asyncio.sleep(1.0)
        assert not late.done()
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert not others()

    run(main())
    assert cache.snapshot().flights == cache.snapshot().entries == 0


def test_a_run_that_was_called_off_is_not_remembered_even_if_it_returns():
    cache = Cache("c", ttl=10)

    @cache
    async def get():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(50)
        return "late"

    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await get()
        assert cache.snapshot().entries == 0

    run(main())


def test_callers_cancelled_at_every_step_of_the_loop_leave_nothing():
    async def main():
        for steps in range(12):
            for victims in ((0,), (1,), (0, 1), (1, 0)):
                guard, cache = Bulkhead("b", max_concurrent=1), Cache("c", ttl=0)

                async def work():
                    for _ in range(4):
                        await asyncio.sleep(0)
                    return "done"

                get = Pipeline(cache, guard)(work)
                callers = [asyncio.create_task(get()) for _ in range(2)]
                for _ in range(steps):
                    await asyncio.sleep(0)
                for victim in victims:
                    callers[victim].cancel()
                results = await asyncio.gather(*callers, return_exceptions=True)
                assert all(result == "done" or isinstance(result, asyncio.CancelledError) for result in results)
                for number in {0, 1} - set(victims):
                    assert results[number] == "done"
                await asyncio.sleep(0)
                assert not others()
                assert guard.snapshot().active == cache.snapshot().flights == 0

    run(main())


def test_a_waiter_with_a_timeout_leaves_alone():
    cache, slow = Cache("c", ttl=10), Slow(3.0)

    async def main():
        get = cache(slow)
        patient = asyncio.create_task(get())
        await asyncio.sleep(0)
        with pytest.raises(CallTimeoutError):
            await Timeout("t", 1.0)(get)()
        assert await patient == 1

    run(main())


def test_a_waiter_that_is_dropped_calls_the_run_off():
    cache, slow = Cache("c", ttl=10), Slow(50)

    async def main():
        call = cache(slow)()
        call.send(None)
        await asyncio.sleep(1)
        call.close()
        await asyncio.sleep(0)
        assert slow.ended == [1.0]
        assert not others()
        assert cache.snapshot().flights == 0

    run(main())


def test_a_run_that_somebody_else_cancels_cancels_who_waits_even_before_its_first_step():
    async def main():
        for steps in (1, 2, 3):
            callers = [asyncio.create_task(call) for call in [Cache("c", ttl=10)(Slow())()]]
            for _ in range(steps):
                await asyncio.sleep(0)
            (others() - {*callers}).pop().cancel()
            with pytest.raises(asyncio.CancelledError):
                await callers[0]

    run(main())


def test_an_error_goes_to_every_waiter_as_it_was_and_nothing_of_it_grows():
    cache, slow = Cache("c", ttl=0), Slow()
    slow.error = ConnectionError("down")
    lengths, contexts, errors = set(), set(), []

    async def one(get):
        try:
            try:
                raise KeyError  # its handler's own error must not stick to the shared one
            except KeyError:
                await get()
        except ConnectionError as error:
            frames = traceback.extract_tb(error.__traceback__)
            lengths.add(len(frames))
            assert frames[-1].line == "raise self.error"
            errors.append(error)
            contexts.add(error.__context__)

    async def main():
        get = cache(slow)
        await asyncio.gather(*(one(get) for _ in range(300)))

    run(main())
    assert len(lengths) == 1
    assert max(lengths) < 15
    assert contexts == {None}
    assert errors == [slow.error] * 300


def test_each_event_loop_has_runs_of_its_own_and_all_share_the_values():
    cache, runs = Cache("c", ttl=100), []
    barrier = threading.Barrier(3, timeout=10)

    @cache
    async def get(x):
        runs.append(x)
        await asyncio.to_thread(barrier.wait)
        return x

    errors = []

    def work():
        async def main():
            assert await asyncio.gather(get("a"), get("a"), get("a")) == ["a"] * 3

        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert runs == ["a"] * 3
    assert asyncio.run(get("a")) == "a"
    assert len(runs) == 3
    assert cache.snapshot().flights == 0


def test_a_loop_that_is_closed_over_a_run_does_not_hold_the_key():
    cache = Cache("c", ttl=10)
    runs = []

    @cache
    async def get():
        runs.append(1)
        await asyncio.Event().wait()

    async def hang():
        task = asyncio.ensure_future(get())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return weakref.ref(task)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending"
    loop.run_until_complete(hang())
    loop.close()
    assert cache.snapshot().flights == 1
    gone = weakref.ref(loop)
    del loop

    async def again():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await get()

    run(again())
    assert len(runs) == 2
    assert cache.snapshot().flights == 0
    gc.collect()
    assert gone() is None


def test_a_loop_that_has_ended_is_not_held():
    cache = Cache("c", ttl=10)

    @cache
    async def get():
        return "value"

    async def main():
        await get()
        return weakref.ref(asyncio.get_running_loop())

    gone = asyncio.run(main())
    asyncio.run(Timeout("t", 1.0)(asyncio.sleep)(0))  # this thread's timers are another loop's now
    gc.collect()
    assert cache.snapshot().entries == 1
    assert gone() is None


def test_a_run_has_no_deadline_of_its_own_and_sees_its_first_callers_context():
    variable, seen = contextvars.ContextVar("variable", default=""), []

    @Cache("c", ttl=0)
    async def get():
        seen.append((variable.get(), ambient.deadline.get()))
        await asyncio.sleep(2.0)
        return "done"

    async def main():
        variable.set("first")
        first = asyncio.create_task(Deadline("d", 1.0)(get)())
        await asyncio.sleep(0)
        variable.set("second")
        second = asyncio.create_task(get())
        with pytest.raises(TimeoutError):
            await first
        assert now() == pytest.approx(1.0, abs=1e-5)
        assert await second == "done"

    run(main())
    assert seen == [("first", math.inf)]


# A function that calls itself


def test_a_function_that_calls_itself_with_the_same_arguments_runs_again_instead_of_waiting_for_itself():
    depth = []

    @Cache("c", ttl=10)
    async def get(x):
        depth.append(x)
        await asyncio.sleep(0)
        return "inner" if len(depth) == 3 else f"<{await get(x)}>"

    @Cache("s", ttl=10)
    def get_sync(x):
        depth.append(x)
        return "inner" if len(depth) == 3 else f"<{get_sync(x)}>"

    async def main():
        assert await get("a") == "<<inner>>"
        assert not others()

    run(main())
    depth.clear()
    assert get_sync("a") == "<<inner>>"
    assert [policies_of(fn)[0].snapshot().misses for fn in (get, get_sync)] == [3, 3]


def test_runs_that_would_wait_for_each_other_do_not():
    one, other = Cache("one", ttl=0), Cache("other", ttl=0)
    calls = []

    @one
    async def ask(x):
        calls.append(("ask", x))
        await asyncio.sleep(1)
        return await answer(x) if len(calls) < 6 else "ask"

    @other
    async def answer(x):
        calls.append(("answer", x))
        await asyncio.sleep(1)
        return await ask(x) if len(calls) < 6 else "answer"

    async def main():
        async with asyncio.timeout(60):
            results = await asyncio.gather(ask(1), answer(1), ask(1))
        assert set(results) <= {"ask", "answer"}
        assert not others()

    run(main())
    assert one.snapshot().flights == other.snapshot().flights == 0


def test_threads_whose_runs_would_wait_for_each_other_do_not():
    both = threading.Barrier(2, timeout=10)
    first = threading.local()

    def meet():
        if not getattr(first, "met", False):
            first.met = True
            both.wait()

    @Cache("one", ttl=0)
    def ask():
        meet()
        return f"ask {answer()}" if getattr(first, "top", None) == "ask" else "ask"

    @Cache("other", ttl=0)
    def answer():
        meet()
        return f"answer {ask()}" if getattr(first, "top", None) == "answer" else "answer"

    results = []

    def work(name, call):
        first.top = name
        results.append(call())

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in (("ask", ask), ("answer", answer))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    # One waits for the other's run; the other, which it would wait for, runs what it needs itself.
    assert sorted(len(result.split()) for result in results) in ([2, 2], [2, 3])


def test_a_task_that_outlives_the_run_it_began_in_may_share_later_ones():
    cache, slow, left = Cache("c", ttl=0), Slow(), []

    async def later():
        await asyncio.sleep(5)
        return await asyncio.gather(get("x"), get("x"))

    @cache
    async def get(x):
        if not left:
            left.append(asyncio.create_task(later()))
        return await slow(x)

    async def main():
        assert await get("x") == 1
        assert await left[0] == [2, 2]

    run(main())


def test_what_a_run_waited_for_once_is_not_what_it_waits_for():
    calls = []

    @Cache("outer", ttl=0)
    async def outer():
        calls.append("outer")
        await inner()
        await asyncio.sleep(5)
        return len(calls)

    @Cache("inner", ttl=0)
    async def inner():
        calls.append("inner")
        calls.append(asyncio.create_task(later()))
        await asyncio.sleep(1)

    async def later():
        await asyncio.sleep(3)
        return await outer()  # which has waited for the run that this task began in, and does no longer

    async def main():
        first = asyncio.create_task(inner())
        await asyncio.sleep(0.5)
        assert await outer() == 3
        assert await calls[1] == 3
        await first

    run(main())


def test_a_waiter_inside_a_run_may_be_dropped_in_another_context():
    cache, slow, dropped = Cache("c", ttl=0), Slow(5), []

    @Cache("outer", ttl=0)
    async def outer():
        call = get("x")
        call.send(None)
        dropped.append(call)

    async def drop():
        dropped.pop().close()

    get = cache(slow)

    async def main():
        other = asyncio.create_task(get("x"))
        await asyncio.sleep(0)
        await outer()
        await Cache("third", ttl=0)(drop)()
        assert await other == 1

    run(main())


def test_a_chain_of_tasks_that_begin_in_each_others_runs_does_not_grow():
    depths = []

    @Cache("c", ttl=0)
    async def get(x):
        depths.append(len(_aboard.get()))
        if x < 20:
            tasks_.append(asyncio.create_task(later(x + 1)))

    async def later(x):
        await asyncio.sleep(1)
        await get(x)

    tasks_ = []

    async def main():
        await get(0)
        await asyncio.sleep(100)

    run(main())
    assert depths == [1] * 21


# An old answer instead of an error


def test_a_failing_run_is_answered_with_the_old_value_for_a_while():
    heard = []
    cache, slow = Cache("c", ttl=10, stale_ttl=20, listeners=[heard.append]), Slow(0)

    async def main():
        get = cache(slow)
        assert await get() == 1
        slow.error = ConnectionError("down")
        await asyncio.sleep(10)
        assert await asyncio.gather(get(), get()) == [1, 1]
        await asyncio.sleep(19.9)
        assert await get() == 1
        await asyncio.sleep(0.1)
        with pytest.raises(ConnectionError):
            await get()
        assert cache.snapshot().entries == 0
        slow.error = None
        assert await get() == 5

    run(main())
    assert heard == [StaleAnswered("c", 10.0, heard[0].error, 10.0), StaleAnswered("c", 29.9, heard[1].error, 29.9)]
    assert isinstance(heard[0].error, ConnectionError)
    assert (cache.snapshot().stale, cache.snapshot().misses, cache.snapshot().shared) == (3, 3, 0)


def test_only_the_listed_exceptions_are_answered_with_an_old_value():
    cache, clock, errors = Cache("c", ttl=10, stale_ttl=math.inf, on=ConnectionError), VirtualClock(), []

    @cache
    def get():
        if errors:
            raise errors[-1]
        return "value"

    with use_clock(clock):
        assert get() == "value"
        clock.advance(1e6)
        errors.append(ConnectionError())
        assert get() == "value"
        errors.append(KeyError())
        with pytest.raises(KeyError):
            get()
        assert cache.snapshot().entries == 1
        errors.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            get()
    assert cache.snapshot().stale == 1


def test_an_open_breaker_inside_answers_at_once_with_the_old_value():
    cache, clock = Cache("c", ttl=10, stale_ttl=1000), VirtualClock()
    runs = []

    @Pipeline(cache, CircuitBreaker("b", consecutive_failures=1))
    def get():
        runs.append(1)
        if len(runs) > 1:
            raise ConnectionError
        return "value"

    with use_clock(clock):
        get()
        clock.advance(20)
        assert [get() for _ in range(5)] == ["value"] * 5
    assert len(runs) == 2


def test_an_old_value_that_answers_for_errors_is_one_that_was_asked_for():
    cache, clock, down = Cache("c", ttl=1, stale_ttl=100, max_entries=2), VirtualClock(), []

    @cache
    def get(x):
        if down:
            raise ConnectionError
        return x

    with use_clock(clock):
        get(1)
        get(2)
        clock.advance(2)
        down.append(1)
        assert get(1) == 1
        down.clear()
        get(3)  # pushes out 2
        down.append(1)
        assert get(1) == 1


def test_with_no_ttl_but_a_stale_one_only_errors_are_answered_from_memory():
    cache, slow = Cache("c", ttl=0, stale_ttl=60), Slow()

    async def main():
        get = cache(slow)
        assert [await get(), await get()] == [1, 2]
        slow.error = ConnectionError()
        assert await get() == 2

    run(main())


# Refreshing ahead of time


def test_a_value_near_its_end_is_answered_at_once_and_refreshed_in_the_background():
    cache, slow = Cache("c", ttl=10, refresh_ahead=4), Slow()

    async def main():
        get = cache(slow)
        assert await get() == 1
        await asyncio.sleep(5.9)
        assert await get() == 1
        assert not others()
        await asyncio.sleep(0.1)
        assert [await get() for _ in range(3)] == [1, 1, 1]
        assert now() == 7.0
        gc.collect()
        await asyncio.sleep(1.5)
        assert await get() == 2
        assert not others()

    run(main())
    assert [at for (at,) in slow.runs] == [0.0, 7.0]
    assert cache.snapshot().refreshes == 1
    assert (cache.snapshot().hits, cache.snapshot().misses) == (5, 1)


def test_a_refresh_that_fails_is_an_event_and_the_value_stays_good(caplog):
    heard = []
    cache, slow = Cache("c", ttl=10, refresh_ahead=4, listeners=[heard.append]), Slow()

    async def main():
        get = cache(slow)
        assert await get() == 1
        slow.error = ConnectionError()
        await asyncio.sleep(7)
        assert await get() == 1
        await asyncio.sleep(1.5)
        assert await get() == 1
        assert len(slow.runs) == 2  # it is not tried again before the value's time is over
        await asyncio.sleep(2)
        with pytest.raises(ConnectionError):
            await get()

    with caplog.at_level(logging.DEBUG):
        run(main())
        gc.collect()
    assert heard == [RefreshFailed("c", 9.0, slow.error)]
    assert "never retrieved" not in caplog.text


def test_a_refresh_belongs_to_nobody_so_its_waiters_cannot_call_it_off_and_it_ends_with_the_loop():
    cache, slow = Cache("c", ttl=10, refresh_ahead=1), Slow(50)

    async def main():
        get = cache(slow)
        slow.seconds = 0
        assert await get() == 1
        slow.seconds = 50
        await asyncio.sleep(9.5)
        caller = asyncio.create_task(get())
        await asyncio.sleep(0)
        caller.cancel()  # it has its answer already
        await asyncio.sleep(5)
        with pytest.raises(TimeoutError):  # the old value has expired, so this one waits for the refresh
            async with asyncio.timeout(1):
                await get()
        assert len(others()) == 1
        assert len(slow.runs) == 2

    run(main())
    assert cache.snapshot().flights == 0
    assert not tasks._kept


def test_a_plain_functions_caller_refreshes_and_has_the_old_value_if_that_fails():
    cache, clock, runs, errors = Cache("c", ttl=10, refresh_ahead=4), VirtualClock(), [], []

    @cache
    def get():
        runs.append(clock())
        if errors:
            raise errors[0]
        return len(runs)

    with use_clock(clock):
        assert get() == 1
        clock.advance(6)
        assert get() == 2
        clock.advance(7)
        errors.append(ConnectionError())
        assert get() == 2
        assert get() == 2
        assert len(runs) == 3
        snapshot = cache.snapshot()
        assert (snapshot.hits, snapshot.misses, snapshot.refreshes) == (3, 1, 2)
        clock.advance(3)
        with pytest.raises(ConnectionError):
            get()


def test_an_interrupted_refresh_is_interrupted():
    cache, clock, errors = Cache("c", ttl=10, refresh_ahead=4), VirtualClock(), []

    @cache
    def get():
        if errors:
            raise errors[0]
        return "value"

    with use_clock(clock):
        get()
        errors.append(KeyboardInterrupt())
        clock.advance(7)
        with pytest.raises(KeyboardInterrupt):
            get()
        assert get() == "value"


# Threads


def in_threads(count, work):
    results, errors = [], []

    def one():
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results, errors


def waiting_for(cache, count):
    """Wait until that many threads wait for the one run of `cache`."""
    (flight,) = cache._flights[None].values()
    while len(flight._sleepers) < count:
        threading.Event().wait(0.001)


def test_threads_share_one_run():
    cache, begun, go = Cache("c", ttl=0), threading.Event(), threading.Event()
    runs = []

    @cache
    def get(x):
        runs.append(x)
        begun.set()
        go.wait(10)
        return x

    threads, results, errors = in_threads(8, lambda: get("a"))
    begun.wait(10)
    waiting_for(cache, 7)
    go.set()
    for thread in threads:
        thread.join(10)
    assert (results, errors, runs) == (["a"] * 8, [], ["a"])
    assert (cache.snapshot().misses, cache.snapshot().shared, cache.snapshot().flights) == (1, 7, 0)


def test_threads_share_an_error_too():
    cache, begun, go = Cache("c", ttl=0), threading.Event(), threading.Event()

    @cache
    def get():
        begun.set()
        go.wait(10)
        raise ConnectionError("down")

    threads, results, errors = in_threads(4, get)
    begun.wait(10)
    waiting_for(cache, 3)
    go.set()
    for thread in threads:
        thread.join(10)
    assert results == []
    assert [str(error) for error in errors] == ["down"] * 4


def test_when_the_thread_that_runs_it_is_interrupted_another_one_does():
    cache, begun, go = Cache("c", ttl=0), threading.Event(), threading.Event()
    runs = []

    @cache
    def get():
        runs.append(1)
        if len(runs) == 1:
            begun.set()
            go.wait(10)
            raise KeyboardInterrupt
        return "done"

    threads, results, errors = in_threads(4, get)
    begun.wait(10)
    waiting_for(cache, 3)
    go.set()
    for thread in threads:
        thread.join(10)
    assert results == ["done"] * 3
    assert [type(error) for error in errors] == [KeyboardInterrupt]


def test_a_plain_function_on_a_thread_that_runs_an_event_loop_waits_for_nobody():
    cache, begun, go = Cache("c", ttl=10, stale_ttl=100), threading.Event(), threading.Event()
    runs = []

    @cache
    def get():
        runs.append(threading.get_ident())
        if len(runs) == 1:
            begun.set()
            go.wait(10)
        return len(runs)

    threads, results, errors = in_threads(1, get)
    begun.wait(10)

    async def main():
        assert get() == 2

    asyncio.run(main())
    go.set()
    threads[0].join(10)
    assert (results, errors) == ([2], [])
    assert len(runs) == 2


def test_many_threads_and_loops_never_get_anothers_value():
    cache = Cache("c", ttl=0.001, max_entries=3)

    @cache
    async def get(x):
        await asyncio.sleep(0)
        return x

    def work():
        async def main():
            for round_ in range(50):
                keys = [(round_ * 7 + number) % 5 for number in range(10)]
                assert await asyncio.gather(*(get(key) for key in keys)) == keys

        asyncio.run(main())
        return True

    threads, results, errors = in_threads(4, work)
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert results == [True] * 4
    snapshot = cache.snapshot()
    assert snapshot.flights == 0
    assert snapshot.entries <= 3
    assert snapshot.hits + snapshot.misses + snapshot.shared == 4 * 500


# Nothing is left


@pytest.mark.parametrize("outcome", ["value", "error", "stale", "cancelled"])
@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_call_leaves_no_reference_cycle(outcome, kind):
    if (outcome, kind) == ("cancelled", "sync"):
        return
    cache = Cache("c", ttl=0, stale_ttl=100 if outcome == "stale" else 0)
    fails = []

    def work():
        if fails and outcome in {"error", "stale"}:
            raise ConnectionError("down")
        return "value"

    async def work_async():
        await asyncio.sleep(50 if fails and outcome == "cancelled" else 0)
        return work()

    get = cache(work_async if kind == "async" else work)

    async def scene():
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(5):
                if kind == "async":
                    await get()
                else:
                    get()
        if kind == "async":
            async with asyncio.timeout(5):
                await asyncio.gather(get(), get(), get(), return_exceptions=True)
        await asyncio.sleep(0)

    async def main():
        await scene()
        fails.append(1)
        with contextlib.suppress(TimeoutError):
            await scene()
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(TimeoutError):
                await scene()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            ours = [
                one for one in gc.garbage if "seawall" in type(one).__module__ or "Connection" in type(one).__name__
            ]
            assert ours == []
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    run(main())


def test_a_dropped_cache_is_collected_with_its_values():
    class Value:
        @staticmethod
        def make():
            return Value()

    cache = Cache("c", ttl=10)
    value = weakref.ref(cache(Value.make)())
    assert value() is not None
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert value() is None


def test_values_are_let_go_of_without_the_lock():
    held = []

    def try_lock():
        held.append(cache._lock.acquire(timeout=5))
        if held[-1]:
            cache._lock.release()

    class Value:
        def __del__(self):
            thread = threading.Thread(target=try_lock)
            thread.start()
            thread.join()

    cache = Cache("c", ttl=10, max_entries=1)

    @cache
    def get(x):
        return Value()

    get(1)
    get(2)
    cache.invalidate(2)
    get(3)
    cache.clear()
    assert held == [True] * 3
    cache = Cache("c", ttl=0, stale_ttl=10)
    get_one = cache(lambda: get.__wrapped__(1))
    get_one()
    get_one()
    assert held == [True] * 4
    cache.clear()


# Settings


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"ttl": -1}, ValueError, "ttl must be 0 or more, got -1 s"),
        ({"ttl": math.nan}, ValueError, "got nan s"),
        ({"ttl": "1"}, TypeError, "ttl must be a number of seconds or a timedelta, got '1'"),
        ({"ttl": True}, TypeError, "got True"),
        ({"ttl": 1, "stale_ttl": -1}, ValueError, "stale_ttl must be 0 or more"),
        ({"ttl": 1, "max_entries": 0}, ValueError, "max_entries must be 1 or more, got 0"),
        ({"ttl": 1, "refresh_ahead": 2}, ValueError, r"refresh_ahead must be at most ttl \(1 s\), got 2"),
        ({"ttl": 1, "on": "x"}, TypeError, "on must be an exception class"),
        ({"ttl": 1, "key": "x"}, TypeError, "key must be a plain function, got 'x'"),
        ({"ttl": 1, "cache_if": asyncio.sleep}, TypeError, "cache_if must be a plain function"),
        ({"ttl": 1, "cache_if": AsyncScript()}, TypeError, "cache_if must be a plain function"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(setting, error, message):
    with pytest.raises(error, match=message):
        Cache("c", **setting)


@pytest.mark.parametrize("seconds", [1e308, 1e-310, math.inf])
def test_absurd_settings_work(seconds):
    cache, clock = Cache("c", ttl=seconds, stale_ttl=seconds, refresh_ahead=min(seconds, 1e308)), VirtualClock()
    get = cache(lambda: "value")
    with use_clock(clock):
        assert [get(), get()] == ["value"] * 2
        clock.advance(1e300)
        assert get() == "value"


def test_settings_change_while_calls_are_in_flight():
    cache, slow = Cache("c", ttl=10), Slow()

    async def main():
        get = cache(slow)
        await asyncio.gather(*(get(x) for x in range(5)))
        flight = asyncio.create_task(get(9))
        await asyncio.sleep(0.5)
        cache.update(max_entries=2, ttl=100)
        assert cache.snapshot().entries == 2
        assert await flight == 6
        await asyncio.sleep(50)
        assert await get(9) == 6
        cache.update(key=lambda x: 0)
        assert cache.snapshot().entries == 0
        assert await get(1) == 7
        assert await get(2) == 7

    run(main())
    with pytest.raises(ValueError, match="ttl must be"):
        cache.update(ttl=-1)


def test_streams_are_refused_with_the_reason():
    with pytest.raises(TypeError, match="Cache runs whole calls"):

        @Cache("c", ttl=1)
        async def stream():
            yield 1


def test_a_loop_that_makes_no_tasks_is_reported_and_leaves_nothing():
    def broken(loop, coro, **kwargs):
        raise RuntimeError("no tasks today")

    cache = Cache("c", ttl=10)

    async def main():
        asyncio.get_running_loop().set_task_factory(broken)
        with pytest.raises(RuntimeError, match="no tasks today"):
            await cache(asyncio.sleep)(1)
        asyncio.get_running_loop().set_task_factory(None)

    run(main())
    assert cache.snapshot().flights == 0


# trio


def run_trio(main):
    async def outer():
        with use_clock(trio.current_time):
            return await main()

    return trio.run(outer, clock=MockClock(autojump_threshold=0))


def test_on_trio_calls_share_a_run_and_one_that_is_cancelled_leaves_alone():
    cache, runs = Cache("c", ttl=10), []

    @cache
    async def get():
        runs.append(trio.current_time())
        await trio.sleep(2)
        return "value"

    results = []

    async def impatient():
        with trio.move_on_after(1):
            await get()

    async def patient():
        results.append(await get())

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(impatient)
            nursery.start_soon(patient)
            nursery.start_soon(impatient)
        assert await get() == "value"

    run_trio(main)
    assert results == ["value"]
    assert len(runs) == 1
    assert cache.snapshot().flights == 0


def test_on_trio_the_last_waiter_cancels_the_run_and_waits_for_its_end():
    cache, ended = Cache("c", ttl=10), []

    @cache
    async def get():
        try:
            await trio.sleep(50)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.25)
            ended.append(trio.current_time())

    async def main():
        start = trio.current_time()
        with trio.move_on_after(1):
            await get()
        assert trio.current_time() - start == pytest.approx(1.25)
        assert len(ended) == 1

    run_trio(main)


def test_on_trio_a_refresh_in_the_background_ends_with_the_run():
    cache, ended = Cache("c", ttl=10, refresh_ahead=10), []

    @cache
    async def get():
        try:
            await trio.sleep(2)
        finally:
            ended.append(trio.current_time())
        return "value"

    async def main():
        assert await get() == "value"
        assert await get() == "value"

    run_trio(main)
    assert len(ended) == 2
    assert cache.snapshot().flights == 0


def test_a_cache_in_a_pipeline_of_two_functions_is_refused_for_the_second():
    guard = Pipeline(Cache("c", ttl=60), CircuitBreaker("b"))

    @guard
    def price(item):
        return f"price of {item}"

    with pytest.raises(TypeError, match=r"equal arguments of .* would get them"):

        @guard
        def weight(item):
            return f"weight of {item}"

    assert price("salt") == "price of salt"


async def _value(item):
    return item


def test_a_cache_that_a_pipeline_calls_with_serves_one_function_as_well():
    guard = Pipeline(Cache("c", ttl=60))

    async def main():
        return await guard.call(_value, 1), await guard.call(_value, 1)

    assert run(main()) == (1, 1)


@pytest.mark.parametrize(
    "decorator",
    [single_flight, single_flight(), single_flight("f"), single_flight(key=id)],
    ids=["bare", "called", "named", "key"],
)
def test_single_flight_works_bare_called_named_and_with_a_key(decorator):
    runs = []

    @decorator
    async def get(what):
        runs.append(what)
        await asyncio.sleep(1.0)
        return what

    async def main():
        assert await asyncio.gather(get("a"), get("a")) == ["a", "a"]
        assert await get("a") == "a"

    run(main())
    assert runs == ["a", "a"]
    assert policies_of(get)[0].kind == "cache"


def test_keyword_arguments_reach_the_function_and_tell_calls_apart():
    @Cache("c", ttl=10)
    async def get(x, *, times):
        return x * times

    @Cache("s", ttl=10)
    def get_sync(x, *, times):
        return x * times

    async def main():
        return [await get("a", times=times) for times in (1, 2, 1)]

    assert run(main()) == [get_sync("a", times=times) for times in (1, 2, 1)] == ["a", "aa", "a"]
