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
    "seawall.deployment.calls": "Calls by how they ended; rescued ones were answered by the model before.",
    "seawall.deployment.generation": "The model that serves: 1 is the first, one more for each that was tried.",
    "seawall.deployment.active": "Calls in flight, on all models.",
    "seawall.deployment.models": "Models in memory.",
    "seawall.supervisor.calls": "Models that were lost, rebuilt, and attempts to rebuild that failed.",
    "seawall.supervisor.serving": "1 while there is a model.",
    "seawall.supervisor.active": "Calls in flight.",
    "seawall.downgrade.calls": "Calls by which model was asked, the usual or the cheaper one.",
    "seawall.replicas.calls": "Calls by how they ended; refused by all replicas, or spilled from one to another.",
    "seawall.replicas.ejections": "Times that a replica was left out.",
    "seawall.replicas.active": "Calls in flight, on all replicas.",
    "seawall.replicas.replicas": "Replicas there are.",
    "seawall.replicas.healthy": "Replicas that may be asked.",
    "seawall.replicas.panicking": "1 while ejected replicas are asked too.",
    "seawall.engine.calls": "Answers by what became of them; shed ones gave their row back, stuck counts steps.",
    "seawall.engine.prompt_tokens": "Tokens of the prompts of whole answers.",
    "seawall.engine.cached_tokens": "Those of them that were not read anew.",
    "seawall.engine.completion_tokens": "Tokens of whole answers.",
    "seawall.engine.drafted_tokens": "Tokens that were drafted for whole answers.",
    "seawall.engine.accepted_tokens": "Those of them that the model took.",
    "seawall.engine.prefix_queries": "Tokens of prompts that were looked up in the prefix cache.",
    "seawall.engine.prefix_hits": "Those of them that it had.",
    "seawall.engine.running": "Answers that have a row.",
    "seawall.engine.waiting": "Answers that wait for a row.",
    "seawall.engine.waiting_tokens": "Tokens of prompts and longest answers that wait.",
    "seawall.engine.rows": "Answers there may be at once.",
    "seawall.engine.cache_used": "Key/value cache in use; what answers share counts once.",
    "seawall.engine.cache_committed": "Key/value cache that is held, kept prompts included.",
    "seawall.engine.cache_limit": "Key/value cache there may be.",
}

TOKENS = (
    "prompt_tokens", "cached_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens",
    "prefix_queries", "prefix_hits",
)  # fmt: skip
COUNTERS = frozenset(("calls", "events", "ejections", *TOKENS))  # by the last part of a metric's name


def _sum(one: float, other: float) -> float:
    return one + other


_WORST: dict[str, Callable[[float, float], float]] = {
    "error_budget": min,
    "coverage": min,
    "exhausted_in": min,
    "serving": min,
    "panicking": max,
    "generation": max,
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
    "models": "{model}",
    "replicas": "{replica}",
    "healthy": "{replica}",
    "ejections": "{ejection}",
    "running": "{call}",
    "rows": "{call}",
    "waiting_tokens": "{token}",
    "cache_used": "By",
    "cache_committed": "By",
    "cache_limit": "By",
    **dict.fromkeys(TOKENS, "{token}"),
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
    """What only grows: calls by outcome, and by names that end in a dot, what has a metric of its own."""
    family = "events" if policy.kind == "slo" else "calls"
    for counter, value in policy.counters().items():
        if counter.endswith("."):
            yield Reading(f"seawall.{policy.kind}.{counter[:-1]}", (("policy.name", policy.name),), value)
        else:
            attributes = (("policy.name", policy.name), ("outcome", counter))
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


def is_counter(metric: str) -> bool:
    """Whether it only grows."""
    return metric.rpartition(".")[2] in COUNTERS


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
