"""Prometheus: a collector that reads the policies when it is scraped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

try:
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector, CollectorRegistry
    from prometheus_client.samples import Exemplar
    from prometheus_client.utils import floatToGoString
except ImportError as error:  # pragma: no cover - exercised with the import blocked
    raise ImportError("Prometheus metrics need prometheus-client: pip install 'seawall[prometheus]'") from error

from seawall.core.watching import Histogram
from seawall.telemetry.ledger import Attributes, Snapshot, ledger
from seawall.telemetry.names import METRICS, kind_of, prometheus_name, text_of

Rows = Mapping[Attributes, float | Histogram]


class PoliciesCollector(Collector):
    """Every live policy of this process, read at scrape time; `install` registers one with your registry.

    Args:
        read: gives the numbers; those of this process, unless told.

    Examples:
        >>> registry = CollectorRegistry()
        >>> registry.register(PoliciesCollector())
    """

    def __init__(self, read: Callable[[], Snapshot] = ledger.snapshot) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """A family for every metric there may be, so that a registry refuses a second exporter of them."""
        for metric in METRICS:
            yield _FAMILIES[kind_of(metric)](prometheus_name(metric), text_of(metric))

    def collect(self) -> Iterable[Metric]:
        """One family a metric, one sample a policy and attribute."""
        snapshot = self._read()
        numbers = itertools.chain(snapshot.counters.items(), snapshot.gauges.items())
        for metric, rows in itertools.chain[tuple[str, Rows]](numbers, snapshot.histograms.items()):
            yield family(prometheus_name(metric), kind_of(metric), text_of(metric), rows)


_FAMILIES: Mapping[str, Callable[..., Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


def family(
    name: str,
    kind: Literal["counter", "gauge", "histogram"],
    text: str,
    rows: Rows,
) -> Metric:
    """One metric, with a sample, or a histogram's samples, for each row of attributes."""
    keys = _keys(rows)
    one = _FAMILIES[kind](name, text, labels=[key.replace(".", "_") for key in keys])
    for attributes, value in rows.items():
        if isinstance(value, Histogram):
            one.add_metric(_values(keys, attributes), list(_buckets(value)), value.total)
        else:
            one.add_metric(_values(keys, attributes), value)
    return one  # type: ignore[no-any-return]


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """What a scrape is answered with, and its content type: OpenMetrics, which has exemplars, where it is accepted."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none
        encode, content_type = generate_latest, CONTENT_TYPE_LATEST
    return encode(registry), content_type


def _keys(rows: Mapping[Attributes, object]) -> list[str]:
    """The names of all attributes of a metric; who lacks one has it empty, which to Prometheus is the same."""
    return list(dict.fromkeys(key for attributes in rows for key, _ in attributes))


def _values(keys: list[str], attributes: Attributes) -> list[str]:
    given = dict(attributes)
    return [given.get(key, "") for key in keys]


def _buckets(histogram: Histogram) -> Iterator[tuple[str, float] | tuple[str, float, Exemplar]]:
    below = 0
    for index, bound in enumerate((*histogram.bounds, math.inf)):
        below += histogram.counts[index]
        found = (histogram.exemplars or {}).get(index)
        if found is None:
            yield _shown(bound), below
        else:
            labels = {"trace_id": found.trace_id, "span_id": found.span_id}
            yield _shown(bound), below, Exemplar(labels, found.value, found.at)


def _shown(bound: float) -> str:
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


def exports_opentelemetry(registry: CollectorRegistry) -> bool:
    """Whether OpenTelemetry's PrometheusMetricReader is registered there."""
    return any(type(one).__module__.startswith("opentelemetry.exporter.prometheus") for one in _collectors(registry))


def exports_policies(registry: CollectorRegistry) -> bool:
    """Whether there is a collector of ours already."""
    return any(isinstance(one, PoliciesCollector) for one in _collectors(registry))


def _collectors(registry: CollectorRegistry) -> list[object]:
    return list(getattr(registry, "_collector_to_names", ()))  # it has no public way to ask
