"""What each metric is called in Prometheus, and of what kind it is."""

from __future__ import annotations

from typing import Literal

from seawall.telemetry import gen_ai
from seawall.telemetry.ledger import PIPELINE_DURATION
from seawall.telemetry.readings import DESCRIPTIONS, is_counter, unit_of

METRICS = (*DESCRIPTIONS, *gen_ai.METRICS)
_SUFFIXES = {"s": "_seconds", "By": "_bytes"}


def kind_of(metric: str) -> Literal["counter", "gauge", "histogram"]:
    """How it behaves."""
    if metric == PIPELINE_DURATION or metric in gen_ai.METRICS:
        return "histogram"
    return "counter" if is_counter(metric) else "gauge"


def prometheus_name(metric: str) -> str:
    """The name of an OpenTelemetry metric in Prometheus, as OpenTelemetry's own exporter makes it.

    Examples:
        >>> prometheus_name("seawall.hedge.delay"), prometheus_name("seawall.bulkhead.active")
        ('seawall_hedge_delay_seconds', 'seawall_bulkhead_active')
    """
    unit = gen_ai.METRICS[metric].unit if metric in gen_ai.METRICS else unit_of(metric)
    return metric.replace(".", "_") + _SUFFIXES.get(unit, "")


def text_of(metric: str) -> str:
    """What it tells."""
    return gen_ai.METRICS[metric].text if metric in gen_ai.METRICS else DESCRIPTIONS.get(metric, metric)
