"""One span a guarded call, one for each extra attempt, current where the call is at work and nowhere else."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import types
from contextlib import aclosing
from types import SimpleNamespace

import pytest
import trio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

from seawall import (
    Bulkhead,
    Cache,
    CircuitBreaker,
    CircuitOpenError,
    Fallback,
    Hedge,
    KeyedAround,
    Pipeline,
    Retry,
    Timeout,
)
from seawall.core import watching
from seawall.engine.worker import Worker
from seawall.telemetry import install


def flaky(failures, error=ConnectionError):
    left = [failures]

    async def work():
        if left[0]:
            left[0] -= 1
            raise error("gone")
        return trace.get_current_span()

    return work


def named(spans):
    return [span.name for span in spans]


def test_a_call_is_one_span_named_after_its_pipeline(spans):
    asyncio.run(
        Pipeline(CircuitBreaker("b"), Timeout("t", 1.0), Bulkhead("k", max_concurrent=1), name="work")(flaky(0))()
    )
    (span,) = spans()
    assert span.name == "work"
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {"seawall.outcome": "success"}


STACKS = {
    "guards around a retry": lambda retry: (CircuitBreaker("b"), retry, Bulkhead("k", max_concurrent=9)),
    "a retry outermost": lambda retry: (retry, CircuitBreaker("b")),
    "a retry innermost": lambda retry: (CircuitBreaker("b"), retry),
    "a retry alone": lambda retry: (retry,),
    "a fallback outermost": lambda retry: (Fallback("f", value=None), retry, Bulkhead("k", max_concurrent=9)),
    "a hedge outermost": lambda retry: (Hedge("h", delay=60.0), retry),
    "a cache outermost": lambda retry: (Cache("c", ttl=60.0), retry),
    "a retry for each key": lambda retry: (KeyedAround("r", lambda key: retry, key=lambda: "one"),),
    "three rows": lambda retry: (Timeout("t", 9.0), CircuitBreaker("b"), retry, Timeout("u", 9.0), CircuitBreaker("c")),
}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_a_first_attempt_needs_no_span_of_its_own_wherever_the_retry_stands(spans, stack):
    policies = stack(Retry("r", on=ConnectionError, wait=0))
    asyncio.run(Pipeline(*policies, name="work")(flaky(0))())
    assert named(spans()) == ["work"]


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_each_extra_attempt_is_a_span_and_a_call_that_ends_well_is_no_error(spans, stack):
    policies = stack(Retry("r", on=ConnectionError, wait=0))
    current = asyncio.run(Pipeline(*policies, name="work")(flaky(2))())
    second, third, call = spans()
    assert named([second, third, call]) == ["retry", "retry", "work"]
    assert second.attributes["error.type"] == "ConnectionError"
    assert third.attributes["seawall.attempt.number"] == 3
    assert {second.parent.span_id, third.parent.span_id} == {call.context.span_id}
    assert current.get_span_context() == third.context
    assert call.status.status_code is StatusCode.UNSET
    assert "error.type" not in call.attributes


def test_plain_functions_are_retried_in_spans_too(spans):
    left = [1]

    @Retry("r", on=ConnectionError, wait=0)
    def work():
        if left:
            left.pop()
            raise ConnectionError
        return trace.get_current_span().get_span_context()

    inside = work()
    attempt, call = spans()
    assert inside == attempt.context
    assert attempt.parent.span_id == call.context.span_id


def test_a_hedged_attempt_is_a_span_below_the_call_and_a_cancelled_loser_no_error(spans):
    attempts = []

    @Pipeline(Hedge("h", delay=0.0), name="work")
    async def work():
        attempts.append(trace.get_current_span().get_span_context())
        await asyncio.sleep(0 if len(attempts) == 2 else 60)

    async def main():
        await work()
        await asyncio.sleep(0)

    asyncio.run(main())
    hedge, call = sorted(spans(), key=lambda span: span.name)
    assert (hedge.name, call.name) == ("hedge", "work")
    assert attempts == [call.context, hedge.context]
    assert {hedge.status.status_code, call.status.status_code} == {StatusCode.UNSET}


def test_a_failure_and_a_refusal_are_error_spans_that_say_why(spans):
    guarded = CircuitBreaker("b", consecutive_failures=1)(flaky(9, LookupError))
    for error in (LookupError, CircuitOpenError):
        with pytest.raises(error):
            asyncio.run(guarded())
    failure, refusal = spans()
    assert failure.attributes["error.type"] == "LookupError"
    assert refusal.attributes["error.type"] == "CircuitOpenError"
    assert refusal.attributes["seawall.rejected_by"] == "b"
    assert refusal.attributes["seawall.outcome"] == "rejected"
    assert {failure.status.status_code, refusal.status.status_code} == {StatusCode.ERROR}


def test_a_cancelled_call_ends_its_span_and_is_no_error(spans):
    async def main():
        task = asyncio.create_task(CircuitBreaker("b")(asyncio.Event().wait)())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    (span,) = spans()
    assert span.attributes["seawall.outcome"] == "cancelled"
    assert span.status.status_code is StatusCode.UNSET


def test_a_call_cancelled_while_it_waits_for_its_place_ends_its_span(spans):
    places = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=60.0)

    async def main():
        with places.scope():
            task = asyncio.create_task(places(flaky(0))())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(main())
    assert [span.attributes["seawall.outcome"] for span in spans()] == ["cancelled"]


def test_spans_nest_as_calls_do_and_what_was_current_before_is_current_again(spans, provider):
    inner = Pipeline(CircuitBreaker("i"), name="inner")(flaky(0))

    @Pipeline(CircuitBreaker("o"), name="outer")
    async def outer():
        await inner()

    async def main():
        with provider.get_tracer("app").start_as_current_span("request") as request:
            await outer()
            assert trace.get_current_span() is request

    asyncio.run(main())
    inside, around, request = spans()
    assert named(spans()) == ["inner", "outer", "request"]
    assert inside.parent == around.context
    assert around.parent == request.context


def test_on_trio_too(spans):
    async def main():
        return await Pipeline(Timeout("t", 1.0), Retry("r", on=ConnectionError, wait=0), name="work")(flaky(1))()

    trio.run(main)
    assert named(spans()) == ["retry", "work"]


@pytest.fixture(params=["a guard outermost", "a fallback outermost"])
def stream(request):
    seen = []
    outermost = CircuitBreaker("b") if request.param.startswith("a guard") else Fallback("f", value=0)

    @Pipeline(outermost, Timeout("t", 9.0), name="stream")
    async def stream():
        for number in range(3):
            seen.append(trace.get_current_span())
            yield number

    stream.seen = seen
    return stream


def test_a_stream_is_current_while_it_works_and_never_while_its_consumer_does(spans, stream):
    async def main():
        async for _ in stream():
            assert not trace.get_current_span().get_span_context().is_valid

    asyncio.run(main())
    (span,) = spans()
    assert [one.get_span_context() for one in stream.seen] == 3 * [span.context]


def test_a_stream_that_changes_tasks_nests_in_the_task_that_asks(spans, stream, provider, caplog):
    async def main():
        items = stream()
        await anext(items)

        async def go_on():
            with provider.get_tracer("app").start_as_current_span("elsewhere") as elsewhere:
                await anext(items)
                assert trace.get_current_span() is elsewhere

        await asyncio.create_task(go_on())
        await asyncio.create_task(items.aclose())

    asyncio.run(main())
    assert not caplog.records
    assert named(spans()) == ["elsewhere", "stream"]


@pytest.mark.parametrize("policies", [(CircuitBreaker("b"),), (Fallback("f", value=0), CircuitBreaker("b"))])
def test_b27_a_stream_closed_in_another_task_leaks_no_span_and_logs_no_context_error(spans, policies, caplog):
    @Pipeline(*policies)
    async def stream():
        yield 1
        yield 2

    async def main():
        items = stream()
        await anext(items)
        await asyncio.create_task(items.aclose())

    asyncio.run(main())
    assert not caplog.records
    assert len(spans()) == 1


def test_a_coroutine_forgotten_in_the_middle_ends_its_span_and_logs_no_context_error(spans, caplog):
    @types.coroutine
    def stand_still():
        yield

    async def work():
        await stand_still()

    coroutine = CircuitBreaker("b")(work)()
    contextvars.copy_context().run(coroutine.send, None)
    coroutine.close()
    assert not caplog.records
    assert [span.attributes["seawall.outcome"] for span in spans()] == ["cancelled"]
    assert not trace.get_current_span().get_span_context().is_valid


def test_streams_generators_and_plain_functions_are_spans_too_refused_or_not(spans):
    breaker = CircuitBreaker("exported", consecutive_failures=1)

    @breaker
    def plain():
        raise ConnectionError

    @breaker
    def items():
        yield trace.get_current_span().get_span_context().is_valid

    @breaker
    async def stream():
        yield trace.get_current_span().get_span_context().is_valid

    async def consume():
        async with aclosing(stream()) as found:
            return [item async for item in found]

    generator = items()
    assert next(generator)
    assert not trace.get_current_span().get_span_context().is_valid
    assert list(generator) == []
    assert asyncio.run(consume()) == [True]
    for refused, error in [
        (plain, ConnectionError),
        (plain, CircuitOpenError),
        (lambda: list(items()), CircuitOpenError),
        (lambda: asyncio.run(consume()), CircuitOpenError),
    ]:
        with pytest.raises(error):
            refused()
    kinds = [span.attributes.get("error.type", "ok") for span in spans()]
    assert kinds == ["ok", "ok", "ConnectionError", "CircuitOpenError", "CircuitOpenError", "CircuitOpenError"]


def test_a_generator_passes_everything_on_while_its_span_comes_and_goes(spans):
    @CircuitBreaker("b", on=LookupError)
    def echo():
        got = yield "ready"
        try:
            yield got
        except KeyError as error:
            yield f"caught {error.args[0]}"
        return "result"

    def consumer():
        return (yield from echo())

    items = consumer()
    assert (next(items), items.send("hello"), items.throw(KeyError("k"))) == ("ready", "hello", "caught k")
    with pytest.raises(StopIteration) as stop:
        next(items)
    assert stop.value.value == "result"
    closed = echo()
    next(closed)
    closed.close()
    assert [span.attributes["seawall.outcome"] for span in spans()] == ["success", "cancelled"]


def test_the_context_of_a_call_reaches_the_worker_thread(spans):
    worker = Worker("w")

    @CircuitBreaker("b")
    async def work():
        return await worker.run(lambda: (threading.get_ident(), trace.get_current_span().get_span_context()))

    thread, inside = asyncio.run(work())
    worker.close()
    (span,) = spans()
    assert thread != threading.get_ident()
    assert inside == span.context


def test_without_a_tracer_no_call_touches_opentelemetry(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a call into OpenTelemetry")

    for name in ("attach", "get_current", "set_span_in_context"):
        monkeypatch.setattr(f"seawall.telemetry.spans.{name}", refuse)
    monkeypatch.setattr(trace, "get_tracer", refuse)
    monkeypatch.setattr(trace, "get_current_span", refuse)
    uninstall = install(tracer_provider="auto", meter_provider="auto", logger_provider="auto")  # nobody set a provider
    assert not watching.hooked
    left = [1]

    @Pipeline(CircuitBreaker("b"), Retry("r", on=ConnectionError, wait=0))
    async def work():
        if left:
            left.pop()
            raise ConnectionError

    asyncio.run(work())
    uninstall()


def test_unsampled_calls_pass_their_context_on_and_are_not_kept():
    uninstall = install(tracer_provider=TracerProvider(sampler=ALWAYS_OFF))
    inside = asyncio.run(CircuitBreaker("b")(flaky(0))())
    uninstall()
    assert inside.get_span_context().is_valid
    assert not inside.get_span_context().trace_flags.sampled


def test_spans_are_exported_once(spans):
    with pytest.raises(RuntimeError, match="already"):
        install(tracer_provider=TracerProvider())


def test_a_tracer_that_fails_harms_no_call(monkeypatch, caplog):
    monkeypatch.setattr(watching, "hooked", True)
    monkeypatch.setattr(watching, "tracer", SimpleNamespace(call=int, attempt=int))  # which no name is
    assert asyncio.run(Pipeline(CircuitBreaker("b"), Retry("r", on=ConnectionError, wait=0))(flaky(1))())
    assert caplog.text.count("the call goes on") == 2
    monkeypatch.undo()
