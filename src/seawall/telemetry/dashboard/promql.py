"""The PromQL of the panels. A metric that the exporter has not is an error."""

from __future__ import annotations

from typing import Literal

from seawall.telemetry.names import METRICS, kind_of, prometheus_name

_CHOSEN = 'job=~"$job"'
_SUFFIXES = {"counter": "_total", "gauge": "", "histogram": "_bucket"}


def series(metric: str, *labels: str, part: str = "") -> str:
    """A selector of what the chosen jobs tell; of a histogram the `part` "_bucket" unless told, or "_sum", "_count"."""
    if metric not in METRICS:
        raise ValueError(f"no metric is called {metric!r}")
    suffix = part or _SUFFIXES[kind_of(metric)]
    matchers = ", ".join((_CHOSEN, *labels))
    return f"{prometheus_name(metric)}{suffix}{{{matchers}}}"


def rate(metric: str, by: str, *labels: str, part: str = "", over: str = "$__rate_interval") -> str:
    """How much a counter, or the count of a histogram, grows a second."""
    part = part or ("_count" if kind_of(metric) == "histogram" else "")
    return f"sum by ({by}) (rate({series(metric, *labels, part=part)}[{over}]))"


def quantile(share: float, metric: str, by: str, *labels: str) -> str:
    """What that share of a histogram's values did not exceed."""
    return f"histogram_quantile({share:g}, {rate(metric, f'le, {by}', *labels, part='_bucket')})"


def total(metric: str) -> str:
    """A gauge of all processes, added up."""
    return f"sum by (policy_name) ({series(metric)})"


def worst(how: Literal["max", "min"], metric: str, by: str, *labels: str) -> str:
    """Of a gauge of several processes the worst."""
    return f"{how} by ({by}) ({series(metric, *labels)})"


def burn_rate(over: str) -> str:
    """How fast the fleet's error budget goes, from what all processes counted."""
    bad = rate("seawall.slo.events", "policy_name", 'outcome="bad"', over=over)
    calls = rate("seawall.slo.events", "policy_name", 'outcome=~"good|bad"', over=over)
    return f"{bad} / {calls} / (1 - {worst('max', 'seawall.slo.objective', 'policy_name')})"
