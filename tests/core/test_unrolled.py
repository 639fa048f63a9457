"""The generated frame: what it says, and that it keeps every promise of the loop it replaces."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import traceback
import weakref

import pytest

from seawall import Bulkhead, CallTimeoutError, CircuitBreaker, Pipeline, Rejected, State, Timeout, use_clock
from seawall.core import gate
from seawall.core.protocol import returns_now
from seawall.core.unrolled import Shape, source
from seawall.testing import VirtualClock, run


class Noted:
    """A guard that writes down what it is asked."""

    def __init__(self, name, log, *, fails=False):
        self.name, self.log, self.fails = name, log, fails

    def enter(self, now):
        self.log.append(f"{self.name} in")
        return f"{self.name}'s token"

    def exit(self, token, now, exc):
        assert token == f"{self.name}'s token"
        self.log.append(f"{self.name} out {type(exc).__name__}")
        if self.fails:
            raise LookupError(self.name)


async def give(value):
    return value


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_a_row_of_any_length_enters_in_order_and_leaves_in_reverse(count):
    log = []
    guards = [Noted(str(number), log) for number in range(count)]
    assert asyncio.run(Pipeline(*guards)(give)("value")) == "value"
    entered = [f"{number} in" for number in range(count)]
    assert log == entered + [f"{number} out NoneType" for number in reversed(range(count))]


@pytest.mark.parametrize("culprit", range(5))
def test_a_guard_that_raises_on_the_way_out_leaves_the_rest_to_hear_of_it(culprit):
    log = []
    guards = [Noted(str(number), log, fails=number == culprit) for number in range(5)]
    with pytest.raises(LookupError):
        asyncio.run(Pipeline(*guards)(give)("value"))
    outs = [line for line in log if "out" in line]
    assert outs == [
        f"{number} out {'LookupError' if number < culprit else 'NoneType'}" for number in reversed(range(5))
    ]


def test_the_source_of_a_row_is_plain_python_without_a_loop():
    text = source(Shape(3, timed=True))
    compile(text, "<row>", "exec")
    assert "for " not in text.replace("before", "")
    assert text.count("_enter1(_now)") == 1
    assert "_arm(_t2, _now, _clock)" in text


class Timed:
    """A guard that only wants to know when the call began, and how it ended."""

    def __init__(self):
        self.entered, self.heard = 0, []

    @returns_now
    def enter(self, now):
        self.entered += 1
        return now

    def exit(self, token, now, exc):
        self.heard.append((token, now, exc))


class Counting(Timed):
    def enter(self, now):
        self.entered += 1
        return now


def test_a_guard_that_only_wants_the_time_is_told_it_without_being_asked():
    clock, plain, counting, log = VirtualClock(), Timed(), Counting(), []
    clock.advance(7.0)
    with use_clock(clock):
        asyncio.run(Pipeline(plain, Noted("a", log), counting)(give)(1))
    assert plain.heard == counting.heard == [(7.0, 7.0, None)]
    assert (plain.entered, counting.entered) == (0, 1)  # a subclass that says more is asked


def test_one_that_only_wants_the_time_hears_of_a_refusal_further_in():
    plain, places = Timed(), Bulkhead("k", max_concurrent=1)
    with places.scope(), pytest.raises(Rejected) as caught:
        asyncio.run(Pipeline(plain, places)(give)(1))
    ((_, _, heard),) = plain.heard
    assert heard is caught.value


def test_a_traceback_through_the_frame_shows_its_source():
    @Pipeline(CircuitBreaker("b"))
    async def fail():
        raise ConnectionError

    with pytest.raises(ConnectionError) as caught:
        asyncio.run(fail())
    shown = "".join(traceback.format_exception(caught.value))
    assert "<seawall row of 1: >" in shown
    assert "_result = await _fn()" in shown


def test_a_rejection_in_the_middle_lets_out_whom_was_let_in():
    log = []
    places = Bulkhead("k", max_concurrent=1)
    with places.scope(), pytest.raises(Rejected):
        asyncio.run(Pipeline(Noted("a", log), places, Noted("b", log))(give)(1))
    assert log == ["a in", "a out BulkheadFullError"]


def test_a_timeout_further_out_covers_the_waiting_further_in():
    places = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=60.0)
    outside = Pipeline(Timeout("t", 2.0), places)(give)

    async def main():
        loop = asyncio.get_running_loop()
        with places.scope(), pytest.raises(CallTimeoutError):
            await outside(1)
        assert loop.time() == 2.0
        assert places.snapshot().waiting == 0

    run(main())


def test_of_two_timeouts_the_one_that_expires_first_speaks():
    def named(outer, inner):
        call = Pipeline(Timeout("outer", outer), Timeout("inner", inner))(asyncio.sleep)

        async def main():
            with pytest.raises(CallTimeoutError) as caught:
                await call(10)
            assert asyncio.current_task().cancelling() == 0
            return caught.value.policy

        return run(main())

    assert [named(1.0, 2.0), named(2.0, 1.0)] == ["outer", "inner"]


def test_a_call_that_waited_has_its_whole_timeout_still_before_it():
    places = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=60.0)
    call = Pipeline(places, Timeout("t", 2.0))(asyncio.sleep)

    async def main():
        first = asyncio.create_task(call(1.9))
        await asyncio.sleep(0)
        await call(1.9)
        await first
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(3.8)


def test_an_interrupt_right_after_the_lock_was_taken_leaves_it_free(monkeypatch):
    """Ctrl-C is handled when a call returns, also the one that took the lock."""

    def interrupted():
        raise KeyboardInterrupt

    call = Pipeline(CircuitBreaker("b"))(give)
    with use_clock(interrupted), pytest.raises(KeyboardInterrupt):  # the clock is read first thing under the lock
        coroutine = call(1)
        coroutine.send(None)
    free = []
    other = threading.Thread(target=lambda: free.append(gate.lock.acquire(blocking=False)) or gate.lock.release())
    other.start()
    other.join()
    assert free == [True]


def test_the_frame_keeps_the_kind_and_the_name_of_the_function():
    guarded = Pipeline(CircuitBreaker("b"))(give)
    assert inspect.iscoroutinefunction(guarded)
    assert guarded.__name__ == "give"


def many_kinds():
    async def nothing(): ...
    async def plain(a, b): ...
    async def defaults(a, b=(1,), *, c, d=None): ...
    async def only(a, /, b, *, c=1): ...
    async def stars(a, *rest, c=1, **more): ...
    async def ours(_t0, _now): ...
    async def named_like_ours(name, result, wait, args, now): ...

    return [nothing, plain, defaults, only, stars, ours, named_like_ours]


@pytest.mark.parametrize("fn", many_kinds(), ids=lambda fn: fn.__name__)
def test_the_frame_takes_just_what_the_function_takes(fn):
    guarded = Pipeline(CircuitBreaker("b"))(fn)
    assert inspect.signature(guarded) == inspect.signature(fn)
    frame = inspect.signature(guarded, follow_wrapped=False)
    assert frame == inspect.signature(fn) or str(frame) == "(*args, **kwargs)"
    assert (str(frame) == "(*args, **kwargs)") == (fn.__name__ == "ours")


def test_arguments_arrive_as_they_were_given():
    async def echo(a, /, b, *rest, c=3, d, **more):
        return a, b, rest, c, d, more

    guarded = Pipeline(CircuitBreaker("b"))(echo)

    async def main():
        return await guarded(1, 2, 4, 5, d=6, e=7), await guarded(1, b=2, d=4)

    assert asyncio.run(main()) == ((1, 2, (4, 5), 3, 6, {"e": 7}), (1, 2, (), 3, 4, {}))


def test_a_default_value_is_the_functions_own_object():
    shared = []

    async def remember(item, seen=shared):
        seen.append(item)
        return seen

    assert asyncio.run(Pipeline(CircuitBreaker("b"))(remember)(1)) is shared


def test_a_wrong_call_is_refused_where_it_is_made_and_counts_for_nothing():
    breaker = CircuitBreaker("b", consecutive_failures=1)
    guarded = Pipeline(breaker)(give)
    with pytest.raises(TypeError, match=r"give.. missing 1 required positional argument: 'value'"):
        guarded()
    assert breaker.snapshot().failures == 0


class Rescuing:
    """An around that acts on failures alone, and for once on nothing."""

    def __init__(self, log):
        self.log, self.rescues, self.passed = log, True, 0

    async def around(self, call):
        self.log.append("around")
        return await call()

    def around_sync(self, call):
        return call()

    async def rescue(self, exc, call):
        self.log.append(type(exc).__name__)
        try:
            return await call()
        finally:
            del exc


def test_an_around_that_acts_on_failures_alone_is_not_in_the_way_of_a_call_that_succeeds():
    log = []
    policy = Rescuing(log)
    assert asyncio.run(Pipeline(policy)(give)("value")) == "value"
    assert (log, policy.passed) == ([], 1)


def test_an_around_that_acts_on_failures_alone_gets_the_error_and_the_call_with_its_arguments():
    log = []

    async def once(number, /, *rest, word="w"):
        if not log:
            raise ConnectionError
        return number, rest, word

    assert asyncio.run(Pipeline(Rescuing(log))(once)(1, 2, word="x")) == (1, (2,), "x")
    assert log == ["ConnectionError"]


def test_an_around_may_take_the_whole_call_after_all():
    log = []
    policy = Rescuing(log)
    call = Pipeline(policy)(give)
    policy.rescues = False
    assert asyncio.run(call("value")) == "value"
    assert log == ["around"]


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, GeneratorExit])
def test_what_is_no_exception_of_a_call_is_never_rescued(error):
    log = []

    async def leave():
        raise error

    with pytest.raises(error):
        Pipeline(Rescuing(log))(leave)().send(None)
    assert log == []


def test_an_around_per_call_may_have_the_answer_at_once():
    class Knowing:
        def answer_for(self, args, kwargs):
            return (True, "known") if args == (1,) else (False, self.around_for(args, kwargs))

        def around_for(self, args, kwargs):
            return Rescuing([])

    call = Pipeline(Knowing())(give)

    async def main():
        return await call(1), await call(2)

    assert asyncio.run(main()) == ("known", 2)


def half_open(*listeners):
    """A breaker whose next call is a probe, and the time at which it is."""
    watch = CircuitBreaker("b", reset_timeout=1.0, listeners=listeners)
    with use_clock(lambda: 0.0):
        watch.force_open()
    return watch, use_clock(lambda: 60.0)


def test_what_happened_as_a_call_came_in_is_told_before_it_begins_and_the_rest_before_it_is_over():
    heard, inside = [], []
    watch, later = half_open(heard.append)
    heard.clear()

    @watch
    async def call():
        inside.extend(heard)

    with later:
        asyncio.run(call())
        assert [event.after for event in inside] == [State.HALF_OPEN]
        assert [event.after for event in heard] == [State.HALF_OPEN, State.CLOSED]


@pytest.mark.parametrize("moment", [State.HALF_OPEN, State.CLOSED])
def test_an_interrupt_in_a_listener_as_a_call_comes_or_goes_gives_its_place_back_once(moment):
    def interrupt(event):
        if event.after is moment:
            raise KeyboardInterrupt

    watch, later = half_open(interrupt)
    places = Bulkhead("k", max_concurrent=1)

    @Pipeline(places, watch)
    async def call(): ...

    with later:
        with pytest.raises(KeyboardInterrupt):
            call().send(None)
        assert (places.snapshot().active, places.snapshot().finished) == (0, 1)


def test_a_call_that_was_not_rescued_leaves_no_reference_cycle():
    class Helpless(Rescuing):
        async def rescue(self, exc, call):
            try:
                raise exc
            finally:
                del exc

    async def fail():
        raise OwnError

    guarded = Pipeline(Helpless([]))(fail)

    def once():
        try:
            guarded().send(None)
        except OwnError as error:
            return weakref.ref(error)

    once()
    gc.collect()
    gc.disable()
    try:
        assert once()() is None
    finally:
        gc.enable()


class OwnError(Exception):
    pass
