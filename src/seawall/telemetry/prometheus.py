"""Prometheus: a collector that reads the policies when it is scraped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector, CollectorRegistry
    from prometheus_client.samples import Exemplar
    from prometheus_client.utils import floatToGoString
except ImportError as error:  # pragma: no cover - exercised with the import blocked
    raise ImportError("Prometheus metrics need prometheus-client: pip install 'seawall[prometheus]'") from error

from seawall.core.watching import Histogram
from seawall.telemetry import gen_ai
from seawall.telemetry.ledger import PIPELINE_DURATION, Attributes, Snapshot, ledger
from seawall.telemetry.readings import DESCRIPTIONS, unit_of


def prometheus_name(metric: str) -> str:
    """The name of an OpenTelemetry metric in Prometheus, as OpenTelemetry's own exporter makes it.

    Examples:
        >>> prometheus_name("seawall.hedge.delay"), prometheus_name("seawall.bulkhead.active")
        ('seawall_hedge_delay_seconds', 'seawall_bulkhead_active')
    """
    name = metric.replace(".", "_")
    unit = gen_ai.METRICS[metric].unit if metric in gen_ai.METRICS else unit_of(metric)
    return f"{name}_seconds" if unit == "s" else name


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
        for metric in (*DESCRIPTIONS, *gen_ai.METRICS):
            yield _family(metric)(prometheus_name(metric), _text(metric))

    def collect(self) -> Iterable[Metric]:
        """One family a metric, one sample a policy and attribute."""
        snapshot = self._read()
        for metric, rows in itertools.chain(snapshot.counters.items(), snapshot.gauges.items()):
            family, keys = _family(metric), _keys(rows)
            one = family(prometheus_name(metric), _text(metric), labels=_labels(keys))
            for attributes, value in rows.items():
                one.add_metric(_values(keys, attributes), value)
            yield one
        for metric, distributions in snapshot.histograms.items():
            keys = _keys(distributions)
            histogram = HistogramMetricFamily(prometheus_name(metric), _text(metric), labels=_labels(keys))
            for attributes, distribution in distributions.items():
                histogram.add_metric(_values(keys, attributes), list(_buckets(distribution)), distribution.total)
            yield histogram


def _text(metric: str) -> str:
    return gen_ai.METRICS[metric].text if metric in gen_ai.METRICS else DESCRIPTIONS.get(metric, metric)


def _family(metric: str) -> Callable[..., Any]:
    if metric == PIPELINE_DURATION or metric in gen_ai.METRICS:
        return HistogramMetricFamily
    return CounterMetricFamily if metric.endswith((".calls", ".events")) else GaugeMetricFamily


def _keys(rows: Mapping[Attributes, object]) -> list[str]:
    """The names of all attributes of a metric; who lacks one has it empty, which to Prometheus is the same."""
    return list(dict.fromkeys(key for attributes in rows for key, _ in attributes))


def _labels(keys: list[str]) -> list[str]:
    return [key.replace(".", "_") for key in keys]


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
