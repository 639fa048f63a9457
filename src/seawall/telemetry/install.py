"""Switch telemetry on, and off again."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from opentelemetry import _logs as otel_logs
from opentelemetry import metrics, trace
from opentelemetry._logs import LoggerProvider
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider

from seawall.core import watching
from seawall.telemetry import gen_ai, logs, otel
from seawall.telemetry.ledger import ledger
from seawall.telemetry.spans import Spans, watch_steps

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

T = TypeVar("T")
Auto = Literal["auto"]
Undo = Callable[[], None]
_SCOPE = "seawall"
_measuring = 0  # meter providers with instruments of ours
_registries: list[CollectorRegistry] = []
_outlets: list[object] = []  # meter providers, logger providers and loggers that are exported to


class TelemetryConflictError(RuntimeError):
    """The same numbers would be exported twice to one place, and be added up there."""


def install(
    *,
    tracer_provider: TracerProvider | Auto | None = None,
    meter_provider: MeterProvider | Auto | None = None,
    logger_provider: LoggerProvider | Auto | None = None,
    registry: CollectorRegistry | None = None,
    logger: logging.Logger | None = None,
    duration_histogram: bool = False,
    span_events: bool = False,
    step_spans: bool = False,
    prompts: bool = False,
    multiprocess_dir: str | os.PathLike[str] | None = None,
    allow_duplicate: bool = False,
) -> Undo:
    """Export to what is given, and to nothing else; returns a function that takes it all back.

    Counters are kept anyway and read when somebody collects, so calls pay nothing for them. Instruments cannot be
    unregistered from a meter provider, so after the undo they report nothing more.

    Args:
        tracer_provider: makes each guarded call a span, and each extra attempt of it; each answer of a model too.
            "auto" takes the application's own provider, if it has set one by now; so do the next two.
        meter_provider: gets observable instruments over all policies, and histograms of answers of models.
        logger_provider: gets events as log records that belong to the span of their call.
        registry: of Prometheus; a collector reads the policies and the durations of calls at each scrape.
        logger: gets events as records with the same attributes and the trace ids as `extra`.
        duration_histogram: also record each call in a histogram of `meter_provider`, at some 7 us a call.
        span_events: also add events to the span of their call, for backends without logs.
        step_spans: also make each step of an engine a span that links to those of the answers it was for: for each
            token of an answer one.
        prompts: put the texts of prompts and answers on the spans of answers. They may hold anything.
        multiprocess_dir: a folder in which the workers of a server keep their numbers for each other, empty when the
            server starts; `$PROMETHEUS_MULTIPROC_DIR` unless told. With it any worker that is scraped tells the
            numbers of all.
        allow_duplicate: export all the same where TelemetryConflictError would be raised.

    Raises:
        TypeError: something given is none of what it is for.
        ValueError: a setting needs a provider that is not given.
        TelemetryConflictError: what is given is exported to already; `registry` has a collector of OpenTelemetry's
            while our instruments are on a meter provider; or what `logger` writes gets to OpenTelemetry too.
        RuntimeError: spans are exported already.
        ImportError: `registry` needs the extra `prometheus`.

    Examples:
        >>> from prometheus_client import CollectorRegistry, generate_latest
        >>> from seawall import Bulkhead
        >>> reports, registry = Bulkhead("reports", max_concurrent=2), CollectorRegistry()
        >>> uninstall = install(registry=registry)
        >>> "seawall_bulkhead_limit" in generate_latest(registry).decode()
        True
        >>> uninstall()
    """
    _check(tracer_provider=tracer_provider, meter_provider=meter_provider, logger_provider=logger_provider,
           registry=registry, logger=logger)  # fmt: skip
    for name, wanted in (("span_events", span_events), ("step_spans", step_spans), ("prompts", prompts)):
        if wanted and tracer_provider is None:
            raise ValueError(f"{name} needs a tracer_provider: it says what is on spans of ours, and there are none")
    if duration_histogram and meter_provider is None:
        raise ValueError("duration_histogram needs a meter_provider: it is a histogram of OpenTelemetry's")
    if multiprocess_dir is not None and registry is None:
        raise ValueError("multiprocess_dir needs a registry, which is to tell the numbers of all workers")
    undo: list[Undo] = []

    def uninstall() -> None:
        while undo:
            undo.pop()()

    try:
        if (tracers := _chosen(tracer_provider, trace.get_tracer_provider)) is not None:
            spans = Spans(tracers.get_tracer(_SCOPE, _version()))
            undo.append(watching.trace_with(spans))
            undo.append(spans.watch_batches())
            tracer = tracers.get_tracer(gen_ai.SCOPE, _version(), gen_ai.SCHEMA_URL)
            undo.append(gen_ai.trace_with(tracer, texts=prompts))
            undo.append(gen_ai.watch())
            if span_events:
                undo.append(logs.add_to_spans())
            if step_spans:
                undo.append(watch_steps())
        if (meters := _chosen(meter_provider, metrics.get_meter_provider)) is not None:
            _claim(meters, undo, allow_duplicate=allow_duplicate)
            _measure(meters, undo, duration_histogram=duration_histogram, allow_duplicate=allow_duplicate)
        if registry is not None:
            _collect(registry, undo, multiprocess_dir, allow_duplicate=allow_duplicate)
        if (loggers := _chosen(logger_provider, otel_logs.get_logger_provider)) is not None:
            _claim(loggers, undo, allow_duplicate=allow_duplicate)
            undo.append(logs.emit_to(loggers.get_logger(_SCOPE, _version())))
        if logger is not None:
            if loggers is not None and logs.reaches_opentelemetry(logger) and not allow_duplicate:
                raise TelemetryConflictError(_TWICE_LOGGED)
            _claim(logger, undo, allow_duplicate=allow_duplicate)
            undo.append(logs.log_to(logger))
    except BaseException:
        uninstall()
        raise
    return uninstall


_KINDS = {  # what each destination must be able to do, and what it is
    "tracer_provider": ("get_tracer", "a TracerProvider, 'auto'"),
    "meter_provider": ("get_meter", "a MeterProvider, 'auto'"),
    "logger_provider": ("get_logger", "a LoggerProvider, 'auto'"),
    "registry": ("register", "a CollectorRegistry"),
    "logger": ("isEnabledFor", "a logging.Logger"),
}


def _check(**given: object) -> None:
    for name, value in given.items():
        method, kind = _KINDS[name]
        automatic = value == "auto" and "auto" in kind
        if value is not None and not automatic and not callable(getattr(value, method, None)):
            raise TypeError(f"{name} must be {kind} or None, got {value!r}")


def _chosen(given: T | Auto | None, of_the_application: Callable[[], T]) -> T | None:
    """The provider to use; of the application's, none where it has set none, so that its calls pay nothing."""
    if given != "auto":
        return given
    provider = of_the_application()
    if type(provider).__name__.startswith(("Proxy", "NoOp")):
        logging.getLogger("seawall").info("the application has set no %s; nothing of it is exported", provider)
        return None
    return provider


def _claim(outlet: object, undo: list[Undo], *, allow_duplicate: bool) -> None:
    """Export there, and refuse to do so twice."""
    if outlet in _outlets and not allow_duplicate:
        raise TelemetryConflictError(
            f"{outlet!r} gets all this already; call what install() returned before installing again"
        )
    _outlets.append(outlet)
    undo.append(lambda: _outlets.remove(outlet))


def _measure(meters: MeterProvider, undo: list[Undo], *, duration_histogram: bool, allow_duplicate: bool) -> None:
    global _measuring
    if not allow_duplicate and any(_both(registry) for registry in _registries):
        raise TelemetryConflictError(_TWICE)
    meter = meters.get_meter(_SCOPE, _version())
    undo.append(otel.observe(meters, meter))
    undo.append(watching.read_durations())
    if duration_histogram:
        undo.append(otel.record(meter))
    undo.append(gen_ai.record_with(meters.get_meter(gen_ai.SCOPE, _version(), gen_ai.SCHEMA_URL)))
    undo.append(gen_ai.watch())
    _measuring += 1

    def stop() -> None:
        global _measuring
        _measuring -= 1

    undo.append(stop)


def _collect(
    registry: CollectorRegistry,
    undo: list[Undo],
    multiprocess_dir: str | os.PathLike[str] | None,
    *,
    allow_duplicate: bool,
) -> None:
    from seawall.telemetry.prometheus import PoliciesCollector, exports_policies

    if exports_policies(registry) and not allow_duplicate:
        raise TelemetryConflictError(
            "this registry exports the policies already; call what install() returned before installing again"
        )
    if _measuring and not allow_duplicate and _both(registry):
        raise TelemetryConflictError(_TWICE)
    read = ledger.snapshot
    ledger.add_source(gen_ai.answers.histograms)
    folder = multiprocess_dir or os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder:
        from seawall.telemetry.multiprocess import Workers

        workers = Workers(Path(folder), ledger)
        read = workers.read
        atexit.register(workers.close)
        undo.append(workers.close)
        undo.append(lambda: atexit.unregister(workers.close))
    collector = PoliciesCollector(read)
    registry.register(collector)
    undo.append(lambda: registry.unregister(collector))
    _registries.append(registry)
    undo.append(lambda: _registries.remove(registry))
    undo.append(watching.read_durations())
    undo.append(gen_ai.watch())


_TWICE = (
    "this registry has OpenTelemetry's PrometheusMetricReader, and our instruments are on a meter provider: each call "
    "would count twice. Give install() either registry= or meter_provider=, or allow_duplicate=True if the reader "
    "belongs to another meter provider"
)


_TWICE_LOGGED = (
    "records of this logger reach OpenTelemetry already, by a handler of it or of a logger above: each event would be "
    "there twice. Give install() either logger= or logger_provider=, or allow_duplicate=True"
)


def _both(registry: CollectorRegistry) -> bool:
    from seawall.telemetry.prometheus import exports_opentelemetry

    return exports_opentelemetry(registry)


def _version() -> str:
    return metadata.version("seawall")
