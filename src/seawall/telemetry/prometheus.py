"""Prometheus: a collector that reads the policies when it is scraped."""

from __future__ import annotations

from collections.abc import Iterable

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:  # pragma: no cover - exercised with the import blocked
    raise ImportError("Prometheus metrics need prometheus-client: pip install 'seawall[prometheus]'") from error

from seawall.telemetry.readings import DESCRIPTIONS, counters, gauges, summed


class PoliciesCollector(Collector):
    """Every live policy of this process, read at scrape time; register it with your own registry.

    Examples:
        >>> from prometheus_client import CollectorRegistry
        >>> CollectorRegistry().register(PoliciesCollector())
    """

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families depend on the policies alive at each scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """One family a metric, one sample a policy and attribute."""
        for family, readings in ((CounterMetricFamily, counters()), (GaugeMetricFamily, gauges())):
            for metric, rows in summed(readings).items():
                keys = [key.replace(".", "_") for key, _ in next(iter(rows))]
                one = family(metric.replace(".", "_"), DESCRIPTIONS.get(metric, metric), labels=keys)
                for attributes, value in rows.items():
                    one.add_metric([text for _, text in attributes], value)
                yield one
