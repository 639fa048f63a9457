"""Every policy names the setting that it refuses."""

from __future__ import annotations

import inspect

import pytest

import seawall
from seawall.policies.adaptive_bulkhead import AIMDLimit, GradientLimit, VegasLimit

NEEDED = {
    seawall.AdaptiveBulkhead: {},
    seawall.Bulkhead: {"max_concurrent": 1},
    seawall.Cache: {"ttl": 1.0},
    seawall.Chaos: {},
    seawall.CircuitBreaker: {},
    seawall.Deadline: {"after": 1.0},
    seawall.Fallback: {"value": None},
    seawall.Hedge: {"delay": 1.0},
    seawall.KeyedRateLimiter: {"key": len, "rate": 1},
    seawall.Keyed: {"factory": lambda key: None, "key": len},
    seawall.LoadShedder: {},
    seawall.RateLimiter: {"rate": 1},
    seawall.Retry: {"on": OSError},
    seawall.RetryBudget: {},
    seawall.SLO: {"target": 0.9},
    seawall.Timeout: {"after": 1.0},
    AIMDLimit: {},
    GradientLimit: {},
    VegasLimit: {},
}
ANYTHING = {"steps", "value", "signals"}  # may be an object, or is checked item by item
CASES = [
    (policy, setting)
    for policy in NEEDED
    for setting in inspect.signature(policy).parameters
    if setting not in {"name", *ANYTHING}
]


@pytest.mark.parametrize(("policy", "setting"), CASES, ids=[f"{one.__name__}-{setting}" for one, setting in CASES])
def test_a_setting_that_is_nonsense_is_refused_by_its_name(policy, setting):
    name = {"name": "p"} if "name" in inspect.signature(policy).parameters else {}
    beside = {"slow_call_rate": 0.5, "slow_call_duration": 1.0} if setting.startswith("slow_call") else {}
    with pytest.raises((TypeError, ValueError), match=f"^{setting} "):
        policy(**{**name, **NEEDED[policy], **beside, setting: object()})


@pytest.mark.parametrize("policy", [one for one in NEEDED if "name" in inspect.signature(one).parameters])
def test_a_name_that_is_nonsense_is_refused_as_that_of_its_kind_of_policy(policy):
    with pytest.raises(ValueError, match=f"^a {policy.__name__}'s name must be 1 to 200 printable characters"):
        policy("", **NEEDED[policy])
