"""Exporters read what the policies counted, and leave no trace when they are taken off."""

from __future__ import annotations

import asyncio
import gc

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry, generate_latest

from seawall import SLO, Bulkhead, CircuitBreaker, CircuitOpenError, Pipeline, RateLimiter, Timeout
from seawall.core import gate
from seawall.telemetry import install
from seawall.telemetry.readings import DESCRIPTIONS, counters, gauges


@pytest.fixture
def spans():
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    uninstall = install(tracer_provider=provider)
    yield exporter.get_finished_spans
    uninstall()
    assert gate.tracer is None


@pytest.fixture
def policies():
    gc.collect()  # no policy of an earlier test is left to be read
    return (
        SLO("exported", target=0.9),
        CircuitBreaker("exported", consecutive_failures=1),
        Bulkhead("exported", max_concurrent=1),
        RateLimiter("exported", rate=1000),
        Timeout("exported", 1.0),
    )


def call(policies, error=None):
    @Pipeline(*policies, name="work")
    async def work():
        if error:
            raise error

    async def main():
        try:
            await work()
        except Exception as caught:
            return caught

    return asyncio.run(main())


def test_a_call_is_one_span_named_after_its_pipeline(spans, policies):
    call(policies)
    (span,) = spans()
    assert span.name == "work"
    assert span.status.status_code is StatusCode.UNSET
    assert "error.type" not in span.attributes


def test_a_failure_and_a_refusal_are_error_spans_that_say_why(spans, policies):
    call(policies, ConnectionError("gone"))
    assert isinstance(call(policies), CircuitOpenError)
    failure, refusal = spans()
    assert failure.attributes["error.type"] == "ConnectionError"
    assert refusal.attributes["error.type"] == "CircuitOpenError"
    assert refusal.attributes["seawall.rejected_by"] == "exported"
    assert {failure.status.status_code, refusal.status.status_code} == {StatusCode.ERROR}


def test_streams_generators_and_plain_functions_are_spans_too_refused_or_not(spans):
    breaker = CircuitBreaker("exported", consecutive_failures=1)

    @breaker
    def plain():
        raise ConnectionError

    @breaker
    def items():
        yield 1

    @breaker
    async def stream():
        yield 1

    async def consume():
        return [item async for item in stream()]

    assert list(items()) == asyncio.run(consume()) == [1]
    for refused, error in [
        (plain, ConnectionError),
        (plain, CircuitOpenError),
        (lambda: list(items()), CircuitOpenError),
    ]:
        with pytest.raises(error):
            refused()
    with pytest.raises(CircuitOpenError):
        asyncio.run(consume())
    kinds = [span.attributes.get("error.type", "ok") for span in spans()]
    assert kinds == ["ok", "ok", "ConnectionError", "CircuitOpenError", "CircuitOpenError", "CircuitOpenError"]


def test_b27_a_stream_closed_in_another_task_leaks_no_span_and_logs_no_context_error(spans, caplog):
    @CircuitBreaker("exported")
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


def test_every_reading_has_a_description_and_prometheus_and_otel_agree_with_it(policies):
    registry, reader = CollectorRegistry(), InMemoryMetricReader()
    uninstall = install(meter_provider=MeterProvider([reader]), registry=registry)
    call(policies)
    call(policies, ConnectionError("gone"))
    call(policies)
    expected = {
        (reading.metric, frozenset(reading.attributes)): reading.value
        for read in (counters, gauges)
        for reading in read()
        if ("policy.name", "exported") in reading.attributes and reading.value == reading.value
    }
    assert {metric for metric, _ in expected} <= set(DESCRIPTIONS)
    data = reader.get_metrics_data()
    exported = {
        (metric.name, frozenset(point.attributes.items())): point.value
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }
    text = generate_latest(registry).decode()
    for (metric, attributes), value in expected.items():
        if metric not in {"seawall.limiter.available", "seawall.slo.burn_rate"}:
            assert exported[metric, attributes] == pytest.approx(value)
    assert 'seawall_breaker_calls_total{outcome="rejected",policy_name="exported"} 1.0' in text
    assert 'seawall_breaker_state{policy_name="exported",state="open"} 1.0' in text
    uninstall()
    assert generate_latest(registry) == b""


def test_spans_are_exported_once(spans):
    with pytest.raises(RuntimeError, match="already"):
        install(tracer_provider=TracerProvider())
