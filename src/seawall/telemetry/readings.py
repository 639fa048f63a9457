"""What the exporters read: each live policy's counters and gauges, under the names of both worlds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from seawall.core.policy import PolicyBase
from seawall.core.registry import live

DESCRIPTIONS = {
    "seawall.pipeline.duration": "Seconds that guarded calls took, waiting and retries included.",
    "seawall.slo.events": "Calls by how they count for the objective.",
    "seawall.slo.error_budget": "Share of the error budget that is left.",
    "seawall.slo.burn_rate": "How fast the error budget goes; 1 uses it up at the window's end.",
    "seawall.slo.objective": "Share of calls that must be good.",
    "seawall.slo.alert": "1 while a burn rate alert of this severity fires.",
    "seawall.slo.coverage": "Share of the window that was observed.",
    "seawall.slo.exhausted_in": "Seconds until the error budget is used up at the last hour's rate.",
    "seawall.slo.latency": "Seconds that this share of the successful calls did not exceed.",
    "seawall.brownout.calls": "Calls by what the steps of the ladder left of them.",
    "seawall.brownout.level": "Steps of the ladder that hold.",
    "seawall.breaker.calls": "Calls by outcome.",
    "seawall.breaker.state": "1 for the state the breaker is in.",
    "seawall.breaker.failure_rate": "Share of failures in the window; NaN below the minimum of calls.",
    "seawall.breaker.slow_call_rate": "Share of slow calls in the window; NaN below the minimum of calls.",
    "seawall.aiobreaker.calls": "Calls by whether aiobreaker's breaker let them in.",
    "seawall.bulkhead.calls": "Calls by what became of them.",
    "seawall.bulkhead.active": "Places taken.",
    "seawall.bulkhead.waiting": "Calls that wait for a place.",
    "seawall.bulkhead.limit": "Places.",
    "seawall.adaptive_bulkhead.calls": "Calls by what became of them; dropped ones timed out.",
    "seawall.adaptive_bulkhead.active": "Places taken.",
    "seawall.adaptive_bulkhead.waiting": "Calls that wait for a place.",
    "seawall.adaptive_bulkhead.limit": "Places there are now.",
    "seawall.load_shedder.calls": "Calls by outcome.",
    "seawall.load_shedder.rejection_rate": "Share of calls that is refused now.",
    "seawall.chaos.calls": "Injections by kind.",
    "seawall.chaos.enabled": "1 while it is on; NaN where each call is asked.",
    "seawall.limiter.calls": "Calls by what became of them.",
    "seawall.limiter.available": "Calls that could start now.",
    "seawall.limiter.waiting": "Calls that wait for their turn.",
    "seawall.limiter.keys": "Keys that are not at their full burst.",
    "seawall.keyed.calls": "What the policies of all keys counted.",
    "seawall.keyed.keys": "Keys that have a policy.",
    "seawall.timeout.calls": "Calls by what became of them.",
    "seawall.deadline.calls": "Calls by what became of them.",
    "seawall.retry.calls": "Calls by how they ended, and whether it took more than one attempt.",
    "seawall.retry_budget.calls": "First and extra attempts, and extra ones that were refused.",
    "seawall.retry_budget.balance": "Extra attempts that could start now.",
    "seawall.retry_budget.in_flight": "Calls in flight.",
    "seawall.retry_budget.extra_in_flight": "Extra attempts in flight.",
    "seawall.hedge.calls": "Calls by which attempt answered or how they ended, and the extra attempts.",
    "seawall.hedge.delay": "Seconds after which an extra attempt starts.",
    "seawall.hedge.losing": "Attempts that lost and have not ended.",
    "seawall.cache.calls": "Calls by who answered, runs ahead of time, and values pushed out.",
    "seawall.cache.entries": "Values remembered.",
    "seawall.cache.flights": "Runs in flight.",
    "seawall.fallback.calls": "Calls by who answered.",
}


def _sum(one: float, other: float) -> float:
    return one + other


_WORST: dict[str, Callable[[float, float], float]] = {
    "error_budget": min,
    "coverage": min,
    "exhausted_in": min,
    "objective": max,
    "alert": max,
    "latency": max,
    "level": max,
    "burn_rate": max,
    "failure_rate": max,
    "slow_call_rate": max,
    "rejection_rate": max,
    "enabled": max,
    "delay": max,
    "state": max,
}


_UNITS = {  # by the last part of a metric's name; the rest are shares and states, without one
    "calls": "{call}",
    "events": "{call}",
    "active": "{call}",
    "waiting": "{call}",
    "limit": "{call}",
    "available": "{call}",
    "in_flight": "{call}",
    "extra_in_flight": "{attempt}",
    "balance": "{attempt}",
    "losing": "{attempt}",
    "flights": "{call}",
    "keys": "{key}",
    "entries": "{entry}",
    "level": "{step}",
    "delay": "s",
    "exhausted_in": "s",
    "latency": "s",
    "duration": "s",
}

_DETAILS = {"alert": "severity", "burn_rate": "window", "latency": "quantile", "state": "state"}  # after the dot


class Reading(NamedTuple):
    """One number of one policy. `attributes` are names declared in code, so their values are bounded."""

    metric: str
    attributes: tuple[tuple[str, str], ...]
    value: float


def counters_of(policy: PolicyBase) -> Iterator[Reading]:
    """What only grows."""
    family = "events" if policy.kind == "slo" else "calls"
    for outcome, value in policy.counters().items():
        attributes = (("policy.name", policy.name), ("outcome", outcome))
        yield Reading(f"seawall.{policy.kind}.{family}", attributes, value)


def gauges_of(policy: PolicyBase) -> Iterator[Reading]:
    """What goes up and down."""
    for gauge, value in policy.gauges().items():
        metric, _, detail = gauge.partition(".")
        extra = ((_DETAILS.get(metric, "detail"), detail),) if detail else ()
        yield Reading(f"seawall.{policy.kind}.{metric}", (("policy.name", policy.name), *extra), value)


def counters() -> Iterator[Reading]:
    """What only grows, of every live policy."""
    return (reading for policy in _policies() for reading in counters_of(policy))


def gauges() -> Iterator[Reading]:
    """What goes up and down, of every live policy."""
    return (reading for policy in _policies() for reading in gauges_of(policy))


def _policies() -> Iterator[PolicyBase]:
    return (policy for policy in live() if isinstance(policy, PolicyBase))


def merge_of(metric: str) -> Callable[[float, float], float]:
    """How readings of policies that share a name become one: amounts add up, of shares and states the worst is told."""
    return _WORST.get(metric.rpartition(".")[2], _sum)


def unit_of(metric: str) -> str:
    """The unit, as OpenTelemetry writes it."""
    last = metric.rpartition(".")[2]
    return _UNITS.get(last, "1")


def summed(readings: Iterator[Reading]) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Readings by metric and attributes.

    Where policies of one kind share a name, amounts add up; shares do not, so the worst one is told.
    """
    table: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for metric, attributes, value in readings:
        rows = table.setdefault(metric, {})
        known = rows.get(attributes)
        merge = _WORST.get(metric.rpartition(".")[2], _sum)
        rows[attributes] = value if known is None else merge(known, value)
    return table
