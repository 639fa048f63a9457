"""OpenTelemetry: a span per guarded call, and observable instruments that read the policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from seawall.core.errors import Rejected
from seawall.core.gate import EndSpan
from seawall.core.gate import Tracer as StartSpan
from seawall.telemetry.readings import DESCRIPTIONS, Reading, counters, gauges, summed


def tracer(spans: Tracer) -> StartSpan:
    """What the gate calls to begin the span of a guarded call.

    The span is never made current, so it can't leak across a `yield` or into another task. A rejected call is
    an error span with the policy that refused; a cancelled one is no error.
    """

    def start(name: str) -> EndSpan:
        span = spans.start_span(name, kind=SpanKind.INTERNAL)
        if not span.is_recording():
            return lambda exc: None

        def end(exc: BaseException | None) -> None:
            if exc is not None:
                span.set_attribute("error.type", type(exc).__qualname__)
                if isinstance(exc, Rejected):
                    span.set_attribute("seawall.rejected_by", exc.policy)
                if isinstance(exc, Exception):
                    span.set_status(Status(StatusCode.ERROR))
            span.end()

        return end

    return start


def observe(meter: Meter) -> Callable[[], None]:
    """Observable instruments over all live policies; returns what makes them report nothing."""
    on = [True]

    def reading(metric: str, read: Callable[[], Iterable[Reading]]) -> Callable[[CallbackOptions], list[Observation]]:
        def callback(options: CallbackOptions) -> list[Observation]:
            rows = summed(iter(read())).get(metric, {}) if on else {}
            return [Observation(value, dict(attributes)) for attributes, value in rows.items()]

        return callback

    for metric, description in DESCRIPTIONS.items():
        if metric.endswith((".calls", ".events")):
            meter.create_observable_counter(metric, [reading(metric, counters)], "{call}", description)
        else:
            meter.create_observable_gauge(metric, [reading(metric, gauges)], "1", description)
    return on.clear
