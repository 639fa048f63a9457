from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect

import pytest

from seawall import (
    SLO,
    Bulkhead,
    BulkheadFullError,
    CircuitBreaker,
    CircuitOpenError,
    Deadline,
    Pipeline,
    RateLimiter,
    State,
    Timeout,
    breaker,
    policies_of,
    use_clock,
)
from seawall.testing import run


class Spy:
    """A guard that writes down entries and exits."""

    def __init__(self, log, name="spy"):
        self.log, self.name = log, name

    def enter(self, now):
        self.log.append(f"+{self.name}")

    def exit(self, token, now, exc):
        self.log.append(f"-{self.name} {type(exc).__name__}")


class Again:
    """An around that runs a failing call `times` times."""

    def __init__(self, times):
        self.times = times

    async def around(self, call):
        for _ in range(self.times - 1):
            try:
                return await call()
            except ConnectionError:
                pass
        return await call()

    def around_sync(self, call):
        for _ in range(self.times - 1):
            try:
                return call()
            except ConnectionError:
                pass
        return call()


@pytest.fixture
def log():
    return []


@pytest.fixture
def guard(log):
    return Pipeline(Spy(log))


def test_a_decorated_function_stays_one_of_its_kind(guard):
    async def coroutine(a: int, *, b: str = "") -> float: ...

    def plain(a: int) -> float: ...

    def generator(a: int):
        yield

    async def stream(a: int):
        yield

    tests = [
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
        inspect.isfunction,
    ]
    for fn in (coroutine, plain, generator, stream):
        guarded = guard(fn)
        assert [test(guarded) for test in tests] == [test(fn) for test in tests]
        assert inspect.signature(guarded) == inspect.signature(fn)
        assert (guarded.__name__, guarded.__doc__, guarded.__wrapped__) == (fn.__name__, fn.__doc__, fn)


def test_stacked_decorators_make_one_row_outermost_first(log):
    one, two, three = (Spy(log, name) for name in "abc")

    @Pipeline(one)
    @Pipeline(two, three)
    def call():
        log.append("call")

    call()
    assert log == ["+a", "+b", "+c", "call", "-c NoneType", "-b NoneType", "-a NoneType"]
    assert policies_of(call) == (one, two, three)
    assert not hasattr(call.__wrapped__, "__wrapped__"), "one frame, not two"


def test_a_wrapper_of_somebody_else_between_two_of_ours_still_runs(log):
    outer, inner = Spy(log, "outer"), Spy(log, "inner")

    def theirs(fn):
        @functools.wraps(fn)
        def wrapper():
            log.append("theirs")
            return fn()

        return wrapper

    @Pipeline(outer)
    @theirs
    @Pipeline(inner)
    def call(): ...

    call()
    assert log == ["+outer", "theirs", "+inner", "-inner NoneType", "-outer NoneType"]
    assert policies_of(call) == (outer,)


def test_methods_of_all_sorts_are_guarded(log, guard):
    class Service:
        @guard
        def method(self, x):
            return self, x

        @staticmethod
        @guard
        def static_outside(x):
            return x

        @guard
        @staticmethod
        def static_inside(x):
            return x

        @classmethod
        @guard
        def class_outside(cls, x):
            return cls, x

        @guard
        @classmethod
        def class_inside(cls, x):
            return cls, x

        @guard
        async def coroutine(self, x):
            return self, x

    service = Service()
    assert service.method(1) == (service, 1)
    assert service.static_outside(1) == Service.static_inside(1) == 1
    assert service.class_outside(1) == Service.class_inside(1) == (Service, 1)
    assert run(service.coroutine(1)) == (service, 1)
    assert log == ["+spy", "-spy NoneType"] * 6
    for name in ("method", "static_outside", "static_inside", "class_outside", "class_inside", "coroutine"):
        assert policies_of(getattr(service, name)) == guard.policies, name


def test_bound_methods_callable_objects_and_partials_are_guarded_as_what_they_are(log, guard):
    class Client:
        def __init__(self, base):
            self.base = base

        async def __call__(self, x):
            return self.base + x

        def plain(self, x):
            return self.base + x

        async def stream(self, x):
            yield self.base + x

    client = Client(1)
    assert run(guard(client)(2)) == 3
    assert guard(client.plain)(2) == 3
    assert guard(functools.partial(functools.partial(client.plain), 2))() == 3
    assert run(guard(functools.partial(client, 2))()) == 3

    async def collect():
        return [item async for item in guard(client.stream)(2)]

    assert run(collect()) == [3]
    assert log == ["+spy", "-spy NoneType"] * 5


@pytest.mark.parametrize("target", [int, Spy, 5, "name", None])
def test_what_is_no_function_is_refused_when_decorating(guard, target):
    with pytest.raises(TypeError, match="policies guard functions, methods and callable objects, not"):
        guard(target)


def test_an_around_on_a_stream_is_refused_when_decorating():
    async def stream():
        yield

    def generator():
        yield

    for fn in (stream, generator):
        with pytest.raises(TypeError, match=r"Again runs whole calls; .* which can't be run again"):
            Pipeline(Again(2))(fn)
    with pytest.raises(TypeError, match="Again runs the call itself, so it can't guard a block"):
        Pipeline(Again(2)).scope()
    with pytest.raises(TypeError, match="is no policy"):
        Pipeline(lambda fn: fn)


def test_a_plain_function_that_returns_a_coroutine_is_told_apart_and_counts_as_failed():
    guard = CircuitBreaker("b", consecutive_failures=1)

    async def work(): ...

    def plain():
        return work()

    with pytest.raises(TypeError, match="is a plain function but returned coroutine, which nothing guards"):
        guard(plain)()
    assert guard.state is State.OPEN


def test_arounds_nest_between_rows(log):
    tries = []

    @Pipeline(Spy(log, "outer"), Again(3), Spy(log, "inner"))
    async def call():
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError
        return "third"

    assert run(call()) == "third"
    inner = ["+inner", "-inner ConnectionError"]
    assert log == ["+outer", *inner, *inner, "+inner", "-inner NoneType", "-outer NoneType"]


def test_arounds_run_plain_functions_too(log):
    @Pipeline(Again(2))
    @Pipeline(Spy(log))
    def call():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        call()
    assert log == ["+spy", "-spy ConnectionError"] * 2


def test_a_stream_passes_asend_and_athrow_through_and_ends_once(log, guard):
    @guard
    async def echo():
        got = yield "ready"
        while got != "end":
            try:
                got = yield got
            except ValueError as error:
                got = yield f"caught {error}"

    async def main():
        items = echo()
        assert log == []
        assert await anext(items) == "ready"
        assert await items.asend("a") == "a"
        assert await items.athrow(ValueError("x")) == "caught x"
        assert log == ["+spy"]
        with pytest.raises(StopAsyncIteration):
            await items.asend("end")
        with pytest.raises(StopAsyncIteration):
            await anext(items)

    run(main())
    assert log == ["+spy", "-spy NoneType"]


def test_a_stream_closed_early_runs_its_cleanup_and_counts_as_neither(log):
    guards = CircuitBreaker("b", consecutive_failures=1), SLO("s", target=0.9), Bulkhead("k", max_concurrent=1)

    @Pipeline(*guards)
    async def stream():
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            log.append("cleaned")

    async def main():
        items = stream()
        assert await anext(items) == 1
        assert guards[2].snapshot().active == 1
        await items.aclose()

    run(main())
    assert log == ["cleaned"]
    assert guards[2].snapshot().active == 0
    assert guards[0].snapshot().neither == 1
    assert guards[1].counters() == {"good": 0, "bad": 0, "neither": 1}


def test_a_stream_never_started_enters_nothing(log, guard):
    @guard
    async def stream():
        yield 1

    async def main():
        await stream().aclose()
        stream()

    run(main())
    assert log == []


def test_an_error_thrown_into_a_stream_comes_out_of_it(log, guard):
    @guard
    async def stream():
        yield 1

    async def main():
        items = stream()
        await anext(items)
        with pytest.raises(KeyError):
            await items.athrow(KeyError("k"))

    run(main())
    assert log == ["+spy", "-spy KeyError"]


def test_a_generator_passes_send_throw_and_its_return_value_through(log, guard):
    @guard
    def echo():
        got = yield "ready"
        try:
            yield got
        except ValueError:
            yield "caught"
        return "result"

    def outer():
        result = yield from echo()
        log.append(result)

    items = outer()
    assert (next(items), items.send("a"), items.throw(ValueError())) == ("ready", "a", "caught")
    assert list(items) == []
    assert log == ["+spy", "-spy NoneType", "result"]


def test_a_generator_closed_early_counts_as_neither(log, guard):
    @guard
    def numbers():
        yield 1
        yield 2

    items = numbers()
    next(items)
    items.close()
    assert log == ["+spy", "-spy GeneratorExit"]


def test_policies_guard_blocks_with_and_async_with():
    places = Bulkhead("k", max_concurrent=2)
    with places, places, pytest.raises(BulkheadFullError):
        places.scope().__enter__()

    async def main():
        async with places, places.scope():
            with pytest.raises(BulkheadFullError):
                async with places:
                    pass

    run(main())
    assert places.snapshot().active == 0


def test_two_tasks_may_be_inside_the_same_policy_at_once():
    places = Bulkhead("k", max_concurrent=2)

    async def one(seconds):
        async with places:
            await asyncio.sleep(seconds)

    async def main():
        await asyncio.gather(one(2), one(1))

    run(main())
    assert places.snapshot().active == 0


def test_blocks_in_interleaved_generators_each_leave_their_own_place():
    times = SLO("s", target=0.9, latency=2.0)

    def held():
        with times:
            yield

    now = 0.0
    with use_clock(lambda: now):
        first, second = held(), held()
        next(first)
        now = 5.0
        next(second)
        first.close()  # 5 s: neither, for it was closed
        now = 6.0
        next(second, None)  # 1 s: good, and 6 s if it had left with the token of the first
    assert (times.snapshot().good, times.snapshot().bad, times.snapshot().neither) == (1, 0, 1)


def test_a_block_in_a_generator_may_exit_in_another_context():
    places = Bulkhead("k", max_concurrent=1)

    async def held():
        async with places:
            yield

    async def main():
        stream = held()
        await asyncio.create_task(stream.__anext__())
        assert places.snapshot().active == 1
        await asyncio.create_task(stream.aclose())

    run(main())
    assert places.snapshot().active == 0


def test_blocks_of_exit_stacks_in_two_tasks_leave_their_own_places():
    times = SLO("s", target=0.9, latency=2.0)

    async def one(seconds):
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(times)
            with contextlib.ExitStack() as inner:
                inner.enter_context(times)
                await asyncio.sleep(seconds)

    async def main():
        await asyncio.gather(one(1), one(5))

    run(main())
    assert (times.snapshot().good, times.snapshot().bad) == (2, 2)


def test_an_exit_stack_closed_in_another_task_gives_its_place_back():
    places = Bulkhead("k", max_concurrent=1)

    async def main():
        stack = contextlib.AsyncExitStack()
        await asyncio.create_task(stack.enter_async_context(places))
        await asyncio.create_task(stack.aclose())

    run(main())
    assert places.snapshot().active == 0


def test_a_scope_is_good_for_one_use():
    scope = Bulkhead("k", max_concurrent=1).scope()
    with scope:
        pass
    with pytest.raises(RuntimeError, match="a scope guards one block once"), scope:
        pass


def test_leaving_a_policy_that_was_not_entered_here_is_an_error():
    with pytest.raises(RuntimeError, match="was not entered; each block exits once"):
        Bulkhead("k", max_concurrent=1).__exit__(None, None, None)


def test_a_permit_ends_once_and_says_how():
    guard = CircuitBreaker("b", consecutive_failures=1)
    guard.admit().success()
    permit = guard.admit()
    permit.cancel()
    with pytest.raises(RuntimeError, match="this permit has ended already"):
        permit.success()
    guard.admit().failure(OSError())
    with pytest.raises(CircuitOpenError):
        guard.admit()
    seen = guard.snapshot()
    assert (seen.successes, seen.neither, seen.failures) == (1, 1, 1)


def test_a_permit_past_a_pipeline_asks_guards_of_the_users_own_too(log):
    Pipeline(Spy(log), Bulkhead("k", max_concurrent=1)).admit().success()
    assert log == ["+spy", "-spy NoneType"]


def test_a_dropped_permit_gives_its_place_back_even_where_warnings_are_errors():
    places = Bulkhead("k", max_concurrent=1)
    with pytest.warns(ResourceWarning, match="a permit was dropped"):
        places.admit()
    assert places.snapshot().active == 0


def test_a_bare_decorator_names_its_policy_after_the_function():
    @breaker
    def pay(): ...

    @breaker(consecutive_failures=1)
    def refund(): ...

    (one,), (two,) = policies_of(pay), policies_of(refund)
    assert (one.name, two.name) == tuple(f"{fn.__module__}.{fn.__qualname__}" for fn in (pay, refund))
    with pytest.raises(ValueError, match="failure_rate must be in"):
        breaker(failure_rate=50)


def test_a_pipeline_calls_a_function_once():
    row = Pipeline(RateLimiter("r", rate=1, burst=2), name="once")
    with use_clock(lambda: 0.0):
        assert row.call_sync(len, "five!") == 5
    with pytest.raises(TypeError, match="policies guard"):
        row.call_sync(5)

    async def double(x):
        return 2 * x

    assert run(row.call(double, 4)) == 8


def test_a_pipeline_passes_all_arguments_on():
    async def power(base, *, to):
        return base**to

    assert run(Pipeline().call(power, 2, to=5)) == 32
    assert Pipeline().call_sync(sorted, [1, 3, 2], reverse=True) == [3, 2, 1]


def test_an_empty_pipeline_changes_nothing():
    assert Pipeline()(lambda x: x + 1)(1) == 2
    with Pipeline().scope():
        pass


def test_timeout_is_refused_on_a_plain_function_by_name():
    with pytest.raises(TypeError, match=r"Timeout needs an event loop; .*lookup is a plain function"):

        @Timeout("t", 1.0)
        def lookup(): ...


def test_a_callable_object_that_is_guarded_goes_by_the_name_of_its_class():
    class Answer:
        def __call__(self):
            return 42

    named = breaker(Answer())
    (guard,) = policies_of(named)
    assert guard.name == f"{Answer.__module__}.{Answer.__qualname__}"
    assert named() == 42


def test_an_error_of_a_guard_further_in_leaves_a_block_as_itself():
    class Replacing(Spy):
        def exit(self, token, now, exc):
            super().exit(token, now, exc)
            raise RuntimeError("in its place") from exc

    async def asynchronously(pipeline):
        async with pipeline.scope():
            raise ConnectionError

    def plainly(pipeline):
        with pipeline.scope():
            raise ConnectionError

    for block in (plainly, lambda pipeline: run(asynchronously(pipeline))):
        heard = []  # a deadline ends a row, so the two guards stand in two
        with pytest.raises(RuntimeError, match="in its place"):
            block(Pipeline(Spy(heard, "outer"), Deadline("d", 1.0), Replacing(heard, "inner")))
        assert heard == ["+outer", "+inner", "-inner ConnectionError", "-outer RuntimeError"]


def test_the_name_of_a_pipeline_is_checked_as_its_own():
    with pytest.raises(ValueError, match="a Pipeline's name must be 1 to 200 printable characters"):
        Pipeline(name="")


def test_a_generator_that_is_refused_never_starts(log):
    refusing = CircuitBreaker("b")

    @Pipeline(Spy(log), refusing)
    def items():
        log.append("started")
        yield 1

    refusing.force_open()
    with pytest.raises(CircuitOpenError):
        next(items())
    assert log == ["+spy", "-spy CircuitOpenError"]


def test_a_bare_decorator_above_a_static_or_class_method_names_its_policy_after_the_function():
    class Bank:
        @breaker
        @staticmethod
        def pay(): ...

        @breaker
        @classmethod
        def refund(cls): ...

    names = [policies_of(fn)[0].name for fn in (Bank.pay, Bank.refund)]
    assert names == [f"{Bank.__module__}.{Bank.__qualname__}.{name}" for name in ("pay", "refund")]
