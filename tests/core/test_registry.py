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


def test_policies_that_the_collector_frees_while_somebody_looks_are_no_error():
    gc.collect()
    gc.disable()
    thresholds = gc.get_threshold()
    try:
        held = [Bulkhead("registry-looked-at", max_concurrent=1) for _ in range(5000)]
        for _ in range(50):
            cycle = [Bulkhead("registry-in-a-cycle", max_concurrent=1)]
            cycle.append(cycle)
        del cycle
        gc.set_threshold(gc.get_count()[0] + 100, 1, 1)  # until 3.12 whoever allocates the hundredth object sets it off
        gc.enable()
        assert len(mine({"registry-looked-at"})) == len(held)
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
    assert mine({"registry-in-a-cycle"}) == []
