"""One door, explicit and reversible; nothing is exported twice to one place."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from onnx.parser import parse_model
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry

from seawall import CircuitBreaker, Pipeline
from seawall.core import watching
from seawall.inference import Backend, MicroBatcher
from seawall.telemetry import TelemetryConflictError, batch_span, install
from seawall.telemetry.install import _registries
from seawall.telemetry.names import prometheus_name
from seawall.telemetry.readings import DESCRIPTIONS

SOURCE = Path(watching.__file__).parent.parent


def test_settings_that_mean_nothing_are_refused():
    for setting in ("span_events", "step_spans", "prompts"):
        with pytest.raises(ValueError, match=f"{setting} needs a tracer_provider"):
            install(**{setting: True})
    with pytest.raises(ValueError, match="duration_histogram needs a meter_provider"):
        install(duration_histogram=True)
    with pytest.raises(ValueError, match="multiprocess_dir needs a registry"):
        install(multiprocess_dir="/tmp")


@pytest.mark.parametrize("name", ["tracer_provider", "meter_provider", "logger_provider", "registry", "logger"])
def test_a_destination_that_is_none_is_refused_with_what_it_must_be(name):
    for wrong in ("Auto", 3):
        with pytest.raises(TypeError, match=rf"{name} must be a .* or None, got "):
            install(**{name: wrong})
    assert not watching.timing


def test_an_install_that_fails_half_way_leaves_nothing_on(provider):
    first = install(registry=(registry := CollectorRegistry()))
    with pytest.raises(TelemetryConflictError):
        install(tracer_provider=provider, registry=registry)
    assert watching.tracer is None
    first()
    assert not _registries


def test_undoing_twice_does_nothing(provider):
    uninstall = install(tracer_provider=provider)
    uninstall()
    again = install(tracer_provider=provider)
    uninstall()
    assert watching.tracer is not None
    again()


def test_opentelemetrys_reader_and_our_collector_in_one_registry_are_refused_in_either_order():
    registry = CollectorRegistry()
    meters = MeterProvider([PrometheusMetricReader(registry=registry)])
    with pytest.raises(TelemetryConflictError, match="twice"):
        install(meter_provider=meters, registry=registry)
    only = install(registry=registry)  # the reader exports the application's metrics alone
    with pytest.raises(TelemetryConflictError, match="twice"):
        install(meter_provider=meters)
    install(meter_provider=MeterProvider(), allow_duplicate=True)()
    only()
    meters.shutdown()


def observed(reader):
    """The names of all metrics that have a value."""
    data = reader.get_metrics_data()
    scopes = [scope for resource in (data.resource_metrics if data else ()) for scope in resource.scope_metrics]
    return {metric.name for scope in scopes for metric in scope.metrics}


def test_a_meter_provider_that_was_taken_off_can_be_given_again():
    reader = InMemoryMetricReader()
    meters, kept = MeterProvider([reader]), CircuitBreaker("b")
    for _ in range(2):
        uninstall = install(meter_provider=meters)
        assert "seawall.breaker.calls" in observed(reader)
        uninstall()
        assert observed(reader) == set()
    assert kept.name == "b"


@pytest.mark.parametrize(
    "given",
    [
        {"meter_provider": MeterProvider(), "duration_histogram": True},
        {"logger_provider": LoggerProvider()},
        {"logger": logging.getLogger("shop")},
    ],
    ids=lambda given: next(iter(given)),
)
def test_nothing_is_given_everything_twice(given):
    only = install(**given)
    with pytest.raises(TelemetryConflictError, match="gets all this already; call what install"):
        install(**given)
    install(**given, allow_duplicate=True)()
    only()
    install(**given)()


def test_events_do_not_reach_opentelemetry_both_as_its_log_records_and_through_its_handler():
    provider, above, logger = LoggerProvider(), logging.getLogger("shop"), logging.getLogger("shop.resilience")
    above.addHandler(AutoInstrumentation())
    try:
        with pytest.raises(TelemetryConflictError, match="each event would be there twice"):
            install(logger_provider=provider, logger=logger)
        install(logger=logger)()
        install(logger_provider=provider)()
        logger.propagate = False
        install(logger_provider=provider, logger=logger)()
    finally:
        above.handlers.clear()
        logger.propagate = True


class AutoInstrumentation(logging.NullHandler):
    __module__ = "opentelemetry.instrumentation.logging.handler"


def test_metrics_have_the_names_that_opentelemetrys_exporter_gives_them(fresh):
    registry = CollectorRegistry()
    meters = MeterProvider([PrometheusMetricReader(registry=registry)])
    uninstall = install(meter_provider=meters, duration_histogram=True)
    from tests.telemetry.test_prometheus import everything

    kept = everything()
    Pipeline(kept[1], name="work").call_sync(len, "")
    theirs = {family.name for family in registry.collect() if family.name.startswith("seawall_")}
    uninstall()
    meters.shutdown()
    assert theirs
    assert theirs <= {*map(prometheus_name, DESCRIPTIONS), "seawall_pipeline_calls"}


def test_the_rows_of_a_batch_are_a_span_that_links_to_those_of_their_requests(provider):
    text = '<ir_version: 10, opset_import: ["" : 21]> double (float[n, 2] x) => (float[n, 2] y) { y = Add(x, x) }'
    tracer = provider.get_tracer("app")

    async def ask(batcher, number):
        with tracer.start_as_current_span(f"request {number}"):
            await batcher.run({"x": np.full((1, 2), number, np.float32)})

    async def main():
        async with (
            Backend.load(parse_model(text).SerializeToString()) as backend,
            MicroBatcher(backend, max_size=3, max_delay=10, eager=False, watch=batch_span) as batcher,
        ):
            await asyncio.gather(*(ask(batcher, number) for number in range(3)))
            uninstall()
            await asyncio.gather(*(ask(batcher, number) for number in range(3)))

    uninstall = install(tracer_provider=provider)
    asyncio.run(main())
    (batch,) = [span for span in provider.finished() if span.name == "batch"]
    requests = [span.context for span in provider.finished() if span.name.startswith("request")][:3]
    assert {link.context.span_id for link in batch.links} == {context.span_id for context in requests}
    assert batch.attributes["seawall.batch.size"] == 3
    assert batch.parent is None


def test_only_the_api_of_opentelemetry_is_imported_and_only_by_telemetry():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "opentelemetry.sdk" not in text, path
        if "from opentelemetry" in text or "import opentelemetry" in text:
            assert path.parent.name == "telemetry", path


def test_importing_registers_nothing():
    code = (
        "import threading, prometheus_client, seawall.telemetry\n"
        "from seawall.core import answering, events, watching\n"
        "assert threading.active_count() == 1\n"
        "assert not any('seawall' in name for name in prometheus_client.REGISTRY._names_to_collectors)\n"
        "assert (watching.tracer, watching.timing, watching.hooked, answering.watch) == (None, False, False, None)\n"
        "assert answering.watch_step is None\n"
        "assert not events.audience(())\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_tracer_that_was_taken_off_keeps_no_policy_alive(provider):
    breaker = CircuitBreaker("b")
    guarded = Pipeline(breaker, name="work")(len)
    install(tracer_provider=provider)()
    gone = weakref.ref(breaker)
    del breaker, guarded
    gc.collect()
    assert gone() is None


def test_the_applications_own_providers_are_taken_where_it_has_set_some(monkeypatch, provider):
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    uninstall = install(tracer_provider="auto")
    Pipeline(CircuitBreaker("b"), name="work").call_sync(len, "")
    uninstall()
    assert [span.name for span in provider.finished()] == ["work"]
    assert isinstance(provider, TracerProvider)
