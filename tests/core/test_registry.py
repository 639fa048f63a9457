from __future__ import annotations

import gc

import pytest

from seawall import Bulkhead, CircuitBreaker, live
from seawall.core import registry


def mine(names):
    return [policy.name for policy in live() if policy.name in names]


def test_live_policies_are_found_oldest_first_while_somebody_holds_them():
    names = {"registry-a", "registry-b"}
    one, two = Bulkhead("registry-a", max_concurrent=1), CircuitBreaker("registry-b")
    assert mine(names) == ["registry-a", "registry-b"]
    gc.disable()
    try:
        del one
        assert mine(names) == ["registry-b"]
    finally:
        gc.enable()
    del two
    assert mine(names) == []


def test_a_policy_that_could_not_be_built_is_not_found():
    with pytest.raises(ValueError, match="max_concurrent"):
        Bulkhead("registry-broken", max_concurrent=0)
    gc.collect()
    assert mine({"registry-broken"}) == []


def test_a_guarded_function_keeps_its_policy_alive_and_no_longer():
    @CircuitBreaker("registry-held")
    def pay(): ...

    assert mine({"registry-held"}) == ["registry-held"]
    del pay
    gc.collect()
    assert mine({"registry-held"}) == []


def test_a_policy_that_is_gone_leaves_nothing_behind():
    gc.collect()
    before = len(registry._entries)
    for _ in range(50):
        Bulkhead("registry-passing", max_concurrent=1)
    gc.collect()
    assert len(registry._entries) == before
