"""What the exporters read: each live policy's counters and gauges, under the names of both worlds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from seawall.core.policy import PolicyBase
from seawall.core.registry import live

DESCRIPTIONS = {
    "seawall.slo.events": "Calls by how they count for the objective.",
    "seawall.slo.error_budget": "Share of the error budget that is left.",
    "seawall.slo.burn_rate": "How fast the error budget goes; 1 uses it up at the window's end.",
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
    "burn_rate": max,
    "failure_rate": max,
    "slow_call_rate": max,
    "rejection_rate": max,
    "enabled": max,
    "delay": max,
    "state": max,
}


class Reading(NamedTuple):
    """One number of one policy. `attributes` are names declared in code, so their values are bounded."""

    metric: str
    attributes: tuple[tuple[str, str], ...]
    value: float


def counters() -> Iterator[Reading]:
    """What only grows."""
    for policy in _policies():
        family = "events" if policy.kind == "slo" else "calls"
        for outcome, value in policy.counters().items():
            attributes = (("policy.name", policy.name), ("outcome", outcome))
            yield Reading(f"seawall.{policy.kind}.{family}", attributes, value)


def gauges() -> Iterator[Reading]:
    """What goes up and down."""
    for policy in _policies():
        for gauge, value in policy.gauges().items():
            metric, _, detail = gauge.partition(".")
            key = "state" if metric == "state" else "window"
            extra = ((key, detail),) if detail else ()
            yield Reading(f"seawall.{policy.kind}.{metric}", (("policy.name", policy.name), *extra), value)


def _policies() -> Iterator[PolicyBase]:
    return (policy for policy in live() if isinstance(policy, PolicyBase))


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
