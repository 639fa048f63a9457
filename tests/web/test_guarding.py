"""Guards that one place enters and another leaves."""

from __future__ import annotations

import asyncio

import pytest

from seawall import Bulkhead, BulkheadFullError, CircuitBreaker, Keyed, KeyedRateLimiter, RateLimitedError, Timeout
from seawall.web.guarding import Guards, HeldGuards


def test_they_leave_once_with_the_outcome_that_the_first_said():
    breaker, places = CircuitBreaker("b"), Bulkhead("p", max_concurrent=2)
    held = HeldGuards([breaker, places]).enter_sync(None)
    assert places.snapshot().active == 1
    held.leave(ValueError())
    held.leave()
    assert places.snapshot().active == 0
    assert (breaker.snapshot().failures, breaker.snapshot().successes) == (1, 0)


def test_those_that_are_dropped_were_given_up():
    breaker = CircuitBreaker("b")
    held = HeldGuards([breaker]).enter_sync(None)
    del held
    assert (breaker.snapshot().failures, breaker.snapshot().neither) == (0, 1)


def test_a_refusal_further_in_gives_back_what_was_entered_before():
    outer, inner = Bulkhead("o", max_concurrent=2), Bulkhead("i", max_concurrent=1)
    guards = HeldGuards([outer, inner])
    first = guards.enter_sync(None)
    with pytest.raises(BulkheadFullError):
        guards.enter_sync(None)
    assert outer.snapshot().active == 1
    first.leave()
    assert outer.snapshot().active == 0


@pytest.mark.asyncio
async def test_a_call_that_is_cancelled_in_the_queue_leaves_nothing():
    outer = Bulkhead("o", max_concurrent=2)
    guards = HeldGuards([outer, Bulkhead("i", max_concurrent=1, max_queued=1, max_wait=60)])
    first = await guards.enter(None)
    waiting = asyncio.create_task(guards.enter(None))
    await asyncio.sleep(0)
    assert outer.snapshot().active == 2
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert outer.snapshot().active == 1
    first.leave()
    assert outer.snapshot().active == 0


def test_a_policy_per_key_is_held_as_long_as_its_guard_and_no_longer():
    keyed = Keyed("tenants", lambda key: Bulkhead(key, max_concurrent=1), key=lambda request: request, max_keys=1)
    guards = HeldGuards([keyed])
    held = {name: guards.enter_sync(name) for name in ("a", "b")}
    assert set(keyed) == {"a", "b"}
    for one in held.values():
        one.leave()
    guards.enter_sync("c").leave()
    assert set(keyed) == {"c"}


def test_blocks_choose_by_their_request():
    guards = Guards([KeyedRateLimiter("per user", rate=1, per=1000, burst=1, key=lambda request: request)])
    with guards.scope("a"), guards.scope("b"), pytest.raises(RateLimitedError), guards.scope("a"):
        pass


def test_a_guard_that_sets_a_deadline_can_not_be_held():
    with pytest.raises(TypeError, match="give a timeout"):
        HeldGuards([Timeout("t", 1.0)])
