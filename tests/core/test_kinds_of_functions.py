"""What can be decorated, what it stays, and what is refused when decorating."""

from __future__ import annotations

import asyncio
import functools
import inspect

import pytest

from seawall import (
    SLO,
    Bulkhead,
    CallTimeoutError,
    CircuitBreaker,
    Pipeline,
    RateLimiter,
    State,
    Timeout,
    breaker,
    bulkhead,
    policies_of,
    rate_limiter,
    slo,
    timeout,
)


def guard():
    return Bulkhead("k", max_concurrent=1)


async def coroutine(a, *, b=2):
    """Adds."""
    return a + b


def plain(a, *, b=2):
    return a + b


def generator(a, *, b=2):
    got = yield a
    yield got or b
    return "end"


async def stream(a, *, b=2):
    got = yield a
    yield got or b


def test_a_guarded_function_stays_what_it_was():
    for fn, is_kind in [
        (coroutine, inspect.iscoroutinefunction),
        (generator, inspect.isgeneratorfunction),
        (stream, inspect.isasyncgenfunction),
    ]:
        guarded = guard()(fn)
        assert is_kind(guarded)
        assert inspect.signature(guarded) == inspect.signature(fn)
        assert (guarded.__name__, guarded.__doc__, guarded.__wrapped__) == (fn.__name__, fn.__doc__, fn)
    assert not inspect.iscoroutinefunction(guard()(plain))


def test_arguments_and_results_pass_through():
    assert guard()(plain)(1, b=3) == 4
    assert asyncio.run(guard()(coroutine)(1, b=3)) == 4


def test_a_generator_takes_what_is_sent_and_thrown_and_returns_its_value():
    bulkhead_ = guard()
    items = bulkhead_(generator)(1)
    assert (next(items), items.send("sent")) == (1, "sent")
    assert bulkhead_.snapshot().active == 1
    with pytest.raises(StopIteration) as stop:
        next(items)
    assert stop.value.value == "end"
    assert bulkhead_.snapshot().active == 0
    items = bulkhead_(generator)(1)
    next(items)
    with pytest.raises(KeyError):
        items.throw(KeyError())
    assert bulkhead_.snapshot().active == 0


@pytest.mark.asyncio
async def test_a_stream_takes_what_is_sent_and_thrown_and_holds_its_guards_to_the_end():
    watch = CircuitBreaker("b")
    items = watch(stream)(1)
    assert (await anext(items), await items.asend("sent")) == (1, "sent")
    with pytest.raises(StopAsyncIteration):
        await anext(items)
    thrown = watch(stream)(1)
    await anext(thrown)
    with pytest.raises(KeyError):
        await thrown.athrow(KeyError())
    closed = watch(stream)(1)
    await anext(closed)
    await closed.aclose()
    counts = watch.snapshot()
    assert (counts.successes, counts.failures, counts.neither) == (1, 1, 1)


@pytest.mark.asyncio
async def test_a_timeout_holds_for_each_item_and_not_for_the_consumers_own_time():
    loop = asyncio.get_running_loop()

    @Timeout("t", 0.02)
    async def items():
        yield 1
        yield 2
        await asyncio.Event().wait()

    seen = []
    with pytest.raises(CallTimeoutError):
        async for item in items():
            seen.append(item)
            if item == 1:  # longer than the timeout, between two items
                later = loop.create_future()
                loop.call_later(0.05, later.set_result, None)
                await later
    assert seen == [1, 2]


def test_methods_static_and_class_methods_in_either_order():
    class Service:
        base = 10

        @breaker
        def method(self, a):
            return self.base + a

        @breaker
        @staticmethod
        def static_outside(a):
            return a

        @staticmethod
        @breaker
        def static_inside(a):
            return a

        @breaker
        @classmethod
        def class_outside(cls, a):
            return cls.base + a

        @classmethod
        @breaker
        def class_inside(cls, a):
            return cls.base + a

    service = Service()
    assert service.method(1) == service.class_outside(1) == Service.class_inside(1) == 11
    assert service.static_outside(1) == Service.static_inside(1) == 1


def test_a_callable_object_keeps_its_attributes_to_itself():
    class Client:
        def __init__(self):
            self.secret = "mine"

        def __call__(self):
            return "called"

    guarded = guard()(Client())
    assert guarded() == "called"
    assert not hasattr(guarded, "secret")


def test_stacked_decorators_are_one_row_named_after_the_function():
    @slo("answers", target=0.9)
    @breaker
    @bulkhead(max_concurrent=1)
    @rate_limiter(rate=10)
    @timeout(1.0)
    async def answer(): ...

    assert [type(policy) for policy in policies_of(answer)] == [SLO, CircuitBreaker, Bulkhead, RateLimiter, Timeout]
    assert answer.__wrapped__.__code__.co_name == "answer"
    names = {policy.name for policy in policies_of(answer)}
    assert names == {"answers", f"{__name__}.{answer.__qualname__}"}


def test_somebody_elses_wrapper_between_ours_is_not_skipped():
    calls = []

    def other(fn):
        @functools.wraps(fn)
        def wrapper(*args):
            calls.append(args)
            return fn(*args)

        return wrapper

    outer, inner = guard(), guard()

    @outer
    @other
    @inner
    def work(a):
        return outer.snapshot().active, inner.snapshot().active, a

    assert work(1) == (1, 1, 1)
    assert calls == [(1,)]


class Twice:
    """An around that runs the call twice."""

    async def around(self, call):
        return [await call(), await call()]

    def around_sync(self, call):
        return [call(), call()]


def test_an_around_owns_the_call_and_the_guards_inside_see_each_run():
    outside, inside = CircuitBreaker("outside"), CircuitBreaker("inside")
    row = Pipeline(outside, Twice(), inside)
    assert row(lambda: 1)() == [1, 1]
    assert asyncio.run(row(coroutine)(1)) == [3, 3]
    assert (outside.snapshot().successes, inside.snapshot().successes) == (2, 4)


@pytest.mark.parametrize(
    ("policy", "target", "reason"),
    [
        (Timeout("t", 1.0), plain, "needs an event loop.*is a plain function"),
        (Timeout("t", 1.0), generator, "needs an event loop.*is a generator"),
        (CircuitBreaker("b"), int, "not <class 'int'>"),
        (CircuitBreaker("b"), "text", "not 'text'"),
        (Pipeline(Twice()), stream, "Twice runs whole calls.*is an async generator"),
    ],
)
def test_what_can_not_work_is_refused_when_decorating(policy, target, reason):
    with pytest.raises(TypeError, match=reason):
        policy(target)


def test_a_pipeline_refuses_what_is_no_policy_and_blocks_that_an_around_would_have_to_run():
    with pytest.raises(TypeError, match="no policy"):
        Pipeline(object())
    with pytest.raises(TypeError, match="Twice runs the call itself"):
        Pipeline(Twice()).scope()
    with pytest.raises(TypeError, match="let in by hand"):
        Timeout("t", 1.0).admit()


def test_a_scope_guards_one_block_once_and_says_how_it_ended():
    watch = CircuitBreaker("b", consecutive_failures=1)
    scope = watch.scope()
    with pytest.raises(ConnectionError), scope:
        raise ConnectionError
    assert watch.state is State.OPEN
    with pytest.raises(RuntimeError, match="once"), scope:
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CircuitBreaker("b", failure_rate=50), "failure_rate must be in (0, 1], got 50; for 50 % write 0.5"),
        (lambda: CircuitBreaker("b", minimum_calls=0), "minimum_calls must be 1 or more, got 0"),
        (lambda: CircuitBreaker("b", reset_timeout=-1), "reset_timeout must be more than 0 and finite, got -1 s"),
        (lambda: CircuitBreaker("b", on=ValueError("x")), "on must be an exception class"),
        (lambda: CircuitBreaker(""), "a CircuitBreaker's name must be 1 to 200 printable characters"),
        (lambda: Bulkhead("k", max_concurrent=1.5), "max_concurrent must be a whole number, got 1.5"),
        (lambda: Bulkhead("k", max_concurrent=1, max_queued=-1), "max_queued must be 0 or more, got -1"),
        (lambda: RateLimiter("r", rate=0), "rate must be more than 0 and finite, got 0"),
        (lambda: RateLimiter("r", rate=1, burst=0.5), "burst must be 1 or more"),
        (lambda: Timeout("t", float("nan")), "after must be more than 0 and finite, got nan s"),
        (lambda: SLO("s", target=1.0), "target must be in (0, 1), got 1.0"),
        (lambda: breaker(failure_rate=2.0), "failure_rate must be in (0, 1], got 2.0"),
        (lambda: timeout("2"), "after must be a number of seconds or a timedelta, got '2'"),
    ],
)
def test_a_wrong_setting_is_refused_where_it_is_given_with_its_value_and_the_rule(make, message):
    with pytest.raises((ValueError, TypeError)) as refused:
        make()
    assert message in str(refused.value)


class Passing:
    """An around that only passes on, and streams too."""

    streams = True

    async def around(self, call):
        return await call()

    def around_sync(self, call):
        return call()

    async def open_stream(self, call):
        return call(), []


def test_a_function_owned_by_an_around_stays_of_its_kind():
    async def coroutine(): ...
    def plain(): ...
    async def stream():
        yield

    guard = Pipeline(Passing())
    assert inspect.iscoroutinefunction(guard(coroutine))
    assert not inspect.iscoroutinefunction(guard(plain))
    assert inspect.isasyncgenfunction(guard(stream))


def test_a_stream_owned_by_an_around_takes_what_is_sent_and_thrown_and_closes_at_once():
    log = []

    @Pipeline(Passing())
    async def echo():
        sent = None
        try:
            while True:
                try:
                    sent = yield sent
                except ValueError:
                    sent = "caught"
        finally:
            log.append("closed")

    async def main():
        items = echo()
        await anext(items)
        assert await items.asend(1) == 1
        assert await items.athrow(ValueError) == "caught"
        await items.aclose()
        assert log == ["closed"]
        with pytest.raises(StopAsyncIteration):
            await anext(items)

    asyncio.run(main())


def test_a_plain_function_that_returns_a_coroutine_is_told_apart_under_an_around_too():
    async def work(number): ...

    with pytest.raises(TypeError, match="decorate the `async def` itself"):
        Pipeline(Passing())(lambda: work(1))()
