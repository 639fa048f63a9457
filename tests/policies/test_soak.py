"""The soak of benchmarks/soak_permits.py, shortened."""

from __future__ import annotations

import pytest

from benchmarks import soak_permits
from seawall import Bulkhead
from seawall.testing import run


def test_two_thousand_random_cancellations_lose_no_permit():
    tally = run(soak_permits.soak(2000, seed=1))
    assert soak_permits.cancelled(tally) >= 2000
    reached = ["cancelled running", "cancelled waiting", "cancelled as it was handed a place", "succeeded", "failed"]
    refused = ["BulkheadFullError", "RateLimitedError", "CircuitOpenError"]
    assert [name for name in reached + refused if not tally[name]] == []


def test_the_soak_notices_a_lost_place(monkeypatch):
    monkeypatch.setattr(soak_permits.WatchedBulkhead, "_give_back", lambda *_: None)
    with pytest.raises(soak_permits.LostPermitError, match=r"places: [1-9]"):
        run(soak_permits.soak(2000, seed=1))


def test_the_soak_notices_a_place_given_twice(monkeypatch):
    def twice(guard, cost, now):
        Bulkhead._give_back(guard, cost, now)
        Bulkhead._give_back(guard, cost, now)

    monkeypatch.setattr(soak_permits.WatchedBulkhead, "_give_back", twice)
    with pytest.raises(soak_permits.LostPermitError):
        run(soak_permits.soak(2000, seed=1))
