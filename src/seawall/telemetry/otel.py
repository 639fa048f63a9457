"""OpenTelemetry metrics: observable instruments that read the policies when somebody collects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

from seawall.core import watching
from seawall.telemetry.ledger import PIPELINE_DURATION, Attributes, Numbers, ledger
from seawall.telemetry.readings import DESCRIPTIONS, is_counter, unit_of

PIPELINE_CALLS = "seawall.pipeline.calls"
_observed: WeakKeyDictionary[MeterProvider, list[bool]] = WeakKeyDictionary()  # one entry for each that observes


def observe(meters: MeterProvider, meter: Meter) -> Callable[[], None]:
    """Instruments over all live policies and guarded functions; returns what makes them report nothing.

    A provider gives an instrument that it made before, with the callbacks of then: so they are made once.
    """
    on = _observed.get(meters)
    if on is None:
        on = _observed[meters] = []
        _make(meter, on)
    on.append(True)

    def stop() -> None:
        on.pop()

    return stop


def _make(meter: Meter, on: list[bool]) -> None:
    def reading(metric: str, read: Callable[[str], Numbers]) -> Callable[[CallbackOptions], list[Observation]]:
        kind = metric.split(".")[1]

        def callback(options: CallbackOptions) -> list[Observation]:
            rows = read(kind).get(metric, {}) if on else {}
            return [Observation(value, _given(key)) for key, value in rows.items() if math.isfinite(value)]

        return callback

    for metric, description in DESCRIPTIONS.items():
        if metric == PIPELINE_DURATION:
            text = "Guarded calls by how they ended."
            meter.create_observable_counter(PIPELINE_CALLS, [reading(PIPELINE_CALLS, _calls)], "{call}", text)
        elif is_counter(metric):
            meter.create_observable_counter(metric, [reading(metric, ledger.counters)], unit_of(metric), description)
        elif metric.startswith("seawall."):
            meter.create_observable_gauge(metric, [reading(metric, ledger.gauges)], unit_of(metric), description)


def _given(attributes: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {key: value for key, value in attributes if value}


def _calls(kind: str) -> Numbers:
    """How many calls the durations are of."""
    rows: dict[Attributes, float] = {}
    for attributes, histogram in ledger.histograms().get(PIPELINE_DURATION, {}).items():
        rows[attributes] = sum(histogram.counts)
    return {PIPELINE_CALLS: rows}


def record(meter: Meter) -> Callable[[], None]:
    """A histogram of the durations of guarded calls; returns what stops it.

    OpenTelemetry has no observable histogram, so each call pays for one `record`: many times what counting costs.
    """
    histogram = meter.create_histogram(
        PIPELINE_DURATION,
        "s",
        DESCRIPTIONS[PIPELINE_DURATION],
        explicit_bucket_boundaries_advisory=watching.BOUNDS,
    )

    def recorder(name: str, outcome: str, error: str, seconds: float) -> None:
        attributes = {"pipeline.name": name, "outcome": outcome}
        if error:
            attributes["error.type"] = error
        histogram.record(seconds, attributes)

    return watching.record_with(recorder)
