"""Ours against the real package, over random sequences of outcomes and times.

They are meant to agree on breakers that open after failures in a row, for calls that come one after the other. Not
compared, because aiobreaker is wrong there (the ids are those of our list of peers' defects): B01, a herd of probes;
B06, an ignored error that ends a row of failures; B28 and B29, time zones and wall clocks that are set; B30, the call
that trips the breaker raises an error of the breaker's.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta

import aiobreaker
import pytest
from aiobreaker.storage import CircuitMemoryStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seawall import CircuitBreaker, Pipeline, Rejected
from seawall.aiobreakers import BridgedBreaker, from_aiobreaker, to_seawall

TICK = 0.25
ENDINGS = contextlib.suppress(ConnectionError, Rejected, aiobreaker.CircuitBreakerError)
steps = st.tuples(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 10]), st.booleans())  # ticks to wait, and whether it fails
examples = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
rules = st.fixed_dictionaries({"fail_max": st.integers(1, 4), "ticks_open": st.sampled_from([1, 2, 4, 10])})


def theirs_of(rule, storage=None):
    duration = timedelta(seconds=rule["ticks_open"] * TICK)
    return aiobreaker.CircuitBreaker(fail_max=rule["fail_max"], timeout_duration=duration, state_storage=storage)


def plain(call):
    """Calls `call(fn)` with a plain function; whether that ran."""

    def attempt(fails):
        ran = []

        def backend():
            ran.append(True)
            if fails:
                raise ConnectionError

        with ENDINGS:
            call(backend)
        return bool(ran)

    return attempt


def awaiting(call):
    """The same with a coroutine function."""

    def attempt(fails):
        ran = []

        async def backend():
            ran.append(True)
            if fails:
                raise ConnectionError

        async def main():
            with ENDINGS:
                await call(backend)

        asyncio.run(main())
        return bool(ran)

    return attempt


def as_guard(rule):
    ours = CircuitBreaker(
        "ours",
        consecutive_failures=rule["fail_max"],
        minimum_calls=10**9,
        reset_timeout=rule["ticks_open"] * TICK,
    )
    return ours, lambda: (ours.state.value, ours.snapshot().consecutive_failures)


def as_policy(rule):
    theirs = theirs_of(rule)
    return from_aiobreaker(theirs), lambda: (theirs.current_state.name.lower(), theirs.fail_counter)


def as_replacement(rule):
    theirs = theirs_of(rule)
    return to_seawall(theirs), lambda: (theirs.current_state.name.lower(), theirs.fail_counter)


@examples
@given(rule=rules, sequence=st.lists(steps, max_size=30))
@pytest.mark.parametrize("way", [plain, awaiting])
@pytest.mark.parametrize("make", [as_guard, as_policy, as_replacement])
def test_ours_admits_and_ends_up_as_theirs_does(clock, way, make, rule, sequence):
    reference = theirs_of(rule)
    policy, told = make(rule)
    theirs = way(reference.call if way is plain else reference.call_async)
    ours = way(lambda fn: Pipeline(policy)(fn)())
    for ticks, fails in sequence:
        clock.advance(ticks * TICK)
        assert ours(fails) == theirs(fails)
        state, failures = told()
        assert state == reference.current_state.name.lower()
        if state == "closed":
            assert failures == reference.fail_counter


def member_of(rule, storage):
    bridge = to_seawall(theirs_of(rule, storage))
    return plain(lambda fn: bridge(fn)())


@examples
@given(rule=rules, sequence=st.lists(st.tuples(steps, st.integers(0, 2)), max_size=40))
def test_breakers_of_ours_that_share_a_storage_act_as_one_of_theirs(clock, rule, sequence):
    reference = theirs_of(rule)
    storage = CircuitMemoryStorage(aiobreaker.CircuitBreakerState.CLOSED)
    theirs = plain(reference.call)
    members = [member_of(rule, storage) for _ in range(3)]
    rows = [0, 0, 0]
    for (ticks, fails), member in sequence:
        clock.advance(ticks * TICK)
        assert members[member](fails) == theirs(fails)
        rows[member] = rows[member] + 1 if fails else 0
        if reference.current_state is aiobreaker.CircuitBreakerState.CLOSED and rows[member] >= rule["fail_max"]:
            break  # a member opens for its own row of failures too, though others succeeded meanwhile
        assert storage.state is reference.current_state
        if storage.state is aiobreaker.CircuitBreakerState.CLOSED:
            assert storage.counter == reference.fail_counter


@examples
@given(rule=rules, sequence=st.lists(st.tuples(steps, st.integers(0, 2)), max_size=40))
def test_no_member_of_a_mixed_fleet_calls_while_another_has_the_circuit_open(clock, rule, sequence):
    storage = CircuitMemoryStorage(aiobreaker.CircuitBreakerState.CLOSED)
    old = [theirs_of(rule, storage) for _ in range(2)]
    bridge = BridgedBreaker(
        CircuitBreaker("ours", consecutive_failures=rule["fail_max"], reset_timeout=rule["ticks_open"] * TICK),
        storage=storage,
    )
    members = [plain(old[0].call), plain(lambda fn: bridge(fn)()), plain(old[1].call)]
    opened_until = 0.0
    for (ticks, fails), member in sequence:
        clock.advance(ticks * TICK)
        was = storage.state
        ran = members[member](fails)
        assert ran == (was is not aiobreaker.CircuitBreakerState.OPEN or clock() >= opened_until)
        if ran and fails and storage.state is aiobreaker.CircuitBreakerState.OPEN:
            opened_until = clock() + rule["ticks_open"] * TICK
