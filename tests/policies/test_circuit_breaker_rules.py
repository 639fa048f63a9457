"""When a breaker opens and closes beyond the plain failure rate: windows, slow calls, rounds of probes, open times."""

from __future__ import annotations

import random
from asyncio import CancelledError
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall import CircuitBreaker, CircuitOpenError, State, StateChanged, growing, use_clock
from seawall.policies.circuit_breaker.windows import CallWindow


def call(guard, now, error=None, *, took=0.0):
    guard.exit(guard.enter(now), now + took, error)


def opened(at=0.0, **kwargs):
    guard = CircuitBreaker("b", **{"consecutive_failures": 1, "reset_timeout": 30.0, **kwargs})
    call(guard, at, ConnectionError())
    assert guard.state is State.OPEN
    return guard


def refused(guard, now):
    with pytest.raises(CircuitOpenError) as refusal:
        guard.enter(now)
    return refusal.value.retry_after


# The window of calls


def test_a_window_of_calls_forgets_the_oldest_call_and_no_other():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=4, window_calls=4)
    for error in (OSError(), None, None, None, None, OSError()):  # the last four: one failure
        call(guard, 1.0, error)
    assert guard.state is State.CLOSED
    call(guard, 1.0, OSError())
    assert guard.state is State.OPEN  # two of the last four


def test_a_window_of_calls_looks_back_however_long_ago_they_were():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=2, window_calls=2)
    call(guard, 0.0, None)
    call(guard, 1e9, OSError())
    assert guard.state is State.OPEN


def test_a_window_smaller_than_the_minimum_of_calls_is_judged_once_full():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=20, window_calls=3)
    for _ in range(2):
        call(guard, 1.0, OSError())
    assert guard.state is State.CLOSED
    call(guard, 1.0, OSError())
    assert guard.state is State.OPEN


def test_calls_that_are_neither_take_no_place_in_the_window_of_calls():
    guard = CircuitBreaker("b", failure_rate=0.6, minimum_calls=3, window_calls=3)
    for error in (OSError(), None, *[CancelledError()] * 50, OSError()):
        call(guard, 1.0, error)
    assert guard.state is State.OPEN


def test_once_closed_again_a_window_of_calls_is_empty():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=4, window_calls=8, reset_timeout=1.0)
    for _ in range(4):
        call(guard, 10.0, OSError())
    call(guard, 11.0, None)
    for _ in range(3):
        call(guard, 11.0, OSError())
    assert guard.state is State.CLOSED
    call(guard, 11.0, OSError())
    assert guard.state is State.OPEN


@given(st.integers(1, 9), st.lists(st.tuples(st.booleans(), st.booleans())))
def test_a_window_of_calls_is_the_end_of_the_list(size, calls):
    window = CallWindow(size)
    for failed, slow in calls:
        window.turn(0.0, ())
        if failed or slow:  # a quick success is not marked
            window.mark(failed=failed, slow=slow)
    last = calls[-size:]
    failures, slow = sum(failed for failed, _ in last), sum(slow for _, slow in last)
    assert window.since(0.0, ()) == [len(last) - failures, failures, slow]


@pytest.mark.parametrize("error", [None, OSError()])
def test_a_call_at_the_very_start_of_a_slot_belongs_to_it(error):
    guard = CircuitBreaker("b", failure_rate=1.0, minimum_calls=100, window=10.0)
    call(guard, 0.0)
    call(guard, 1.0, error)
    with use_clock(lambda: 10.0):  # the slot from 0 to 1 has left, that from 1 to 2 has not
        guard.update(minimum_calls=1)
        assert guard.snapshot().failure_rate == float(error is not None)
    with use_clock(lambda: 11.0):
        assert guard.snapshot().failure_rate is None


# Slow calls


def test_slow_successes_open_it_at_their_rate_and_not_before():
    guard = CircuitBreaker("b", minimum_calls=4, slow_call_rate=0.5, slow_call_duration=2.0)
    for took in (0.1, 0.1, 2.0, 9.0):  # two seconds are not yet slow
        call(guard, 1.0, took=took)
    assert guard.state is State.CLOSED
    call(guard, 20.0, took=2.001)
    assert guard.state is State.CLOSED  # 2 of 5
    call(guard, 20.0, took=2.001)
    assert guard.state is State.OPEN


def test_a_slow_failure_is_slow_too_and_a_slow_cancelled_call_is_not():
    guard = CircuitBreaker("b", failure_rate=1.0, minimum_calls=2, slow_call_rate=1.0, slow_call_duration=2.0)
    call(guard, 0.0, CancelledError(), took=9.0)
    call(guard, 0.0, None, took=9.0)
    assert guard.snapshot().slow == 1
    call(guard, 9.0, OSError(), took=9.0)
    assert (guard.state, guard.snapshot().slow) == (State.OPEN, 2)


def test_a_slow_success_never_opens_it_on_the_failure_rate_and_ends_a_row_of_failures():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=3, slow_call_rate=1.0, slow_call_duration=2.0)
    for error in (OSError(), OSError()):
        call(guard, 0.0, error)
    call(guard, 0.0, None, took=3.0)
    assert guard.state is State.CLOSED
    assert guard.snapshot().consecutive_failures == 0
    with use_clock(lambda: 3.0):
        assert guard.snapshot().failure_rate == pytest.approx(2 / 3)


def test_slow_calls_count_in_a_window_of_calls():
    guard = CircuitBreaker(
        "b", minimum_calls=3, window_calls=3, slow_call_rate=0.6, slow_call_duration=timedelta(seconds=2)
    )
    for took in (3.0, 0.0, 0.0, 0.0, 3.0):
        call(guard, 1.0, took=took)
    assert guard.state is State.CLOSED
    call(guard, 1.0, took=3.0)
    assert guard.state is State.OPEN


def test_a_slow_probe_proves_no_recovery():
    guard = opened(slow_call_rate=0.5, slow_call_duration=2.0)
    call(guard, 30.0, None, took=5.0)
    assert guard.state is State.OPEN
    assert refused(guard, 35.0) == 30.0


def test_slow_calls_are_measured_from_the_day_somebody_asks_for_them():
    guard = CircuitBreaker("b")
    assert "slow_call_rate" not in guard.gauges()
    guard.update(slow_call_rate=0.5, slow_call_duration=2.0, minimum_calls=1)
    with use_clock(lambda: 9.0):
        call(guard, 0.0, None, took=1.0)
        call(guard, 0.0, None, took=9.0)
        assert guard.state is State.OPEN


def test_the_slow_call_rate_is_a_gauge_and_in_the_snapshot():
    guard = CircuitBreaker("b", minimum_calls=4, slow_call_rate=0.9, slow_call_duration=2.0)
    for took in (0.0, 0.0, 0.0, 4.0):
        call(guard, 1.0, took=took)
    with use_clock(lambda: 5.0):
        assert guard.gauges()["slow_call_rate"] == 0.25
        assert guard.snapshot().slow_call_rate == 0.25


# Rounds of probes


def test_as_many_probes_as_permitted_pass_in_one_round_and_no_more():
    guard = opened(probes=10, permitted_probes=3, success_threshold=3, probe_timeout=7.0)
    for now in (30.0, 31.0, 32.0):
        guard.enter(now)
    assert refused(guard, 33.0) == 4.0  # when the first lease ends
    assert guard.snapshot().probes == 3


@pytest.mark.parametrize("ending", [None, OSError()])
def test_probes_that_ended_count_against_the_permitted_ones_too(ending):
    guard = opened(probes=10, permitted_probes=3, success_threshold=2, probe_timeout=100.0)
    call(guard, 30.0, ending)
    guard.enter(30.0)
    guard.enter(30.0)
    refused(guard, 30.0)


def test_a_round_reopens_as_soon_as_success_is_out_of_reach_and_not_before():
    guard = opened(permitted_probes=5, success_threshold=3)
    for error in (None, OSError(), OSError()):
        call(guard, 30.0, error)
        assert guard.state is State.HALF_OPEN
    call(guard, 30.0, OSError())  # 3 of 5 failed: 3 can't succeed any more
    assert guard.state is State.OPEN


def test_a_round_closes_as_soon_as_enough_succeeded():
    guard = opened(permitted_probes=5, success_threshold=3)
    for error in (None, OSError(), None, OSError()):
        call(guard, 30.0, error)
        assert guard.state is State.HALF_OPEN
    call(guard, 30.0)
    assert guard.state is State.CLOSED


def test_a_probe_that_ends_as_neither_gives_its_permission_back():
    guard = opened(permitted_probes=1)
    for error in (CancelledError(), CircuitOpenError("further in")):
        call(guard, 30.0, error)
        assert guard.state is State.HALF_OPEN
    call(guard, 30.0)
    assert guard.state is State.CLOSED


def test_a_hanging_probe_costs_a_round_no_permission():
    guard = opened(permitted_probes=1, probe_timeout=5.0)
    guard.enter(30.0)
    refused(guard, 34.9)
    call(guard, 35.0)
    assert guard.state is State.CLOSED


def test_half_open_for_too_long_it_opens_from_that_moment_on():
    guard = opened(half_open_timeout=5.0, probe_timeout=1000.0)
    guard.enter(30.0)
    assert refused(guard, 34.0) == 1.0
    assert refused(guard, 35.0) == 30.0
    assert guard.state is State.OPEN
    assert guard.snapshot().opened == 2


def test_half_open_for_too_long_while_nobody_called_it_has_been_open_since():
    guard = opened(half_open_timeout=5.0, probe_timeout=1000.0)
    guard.enter(30.0)
    assert refused(guard, 60.0) == 5.0  # open since 35, not since 60
    guard.enter(65.0)
    assert guard.state is State.HALF_OPEN


def test_half_open_for_too_long_it_closes_where_told_to():
    guard = opened(half_open_timeout=5.0, half_open_then="closed", probe_timeout=1000.0)
    guard.enter(30.0)
    assert refused(guard, 34.0) == 1.0
    guard.enter(35.0)
    guard.enter(35.0)
    assert guard.state is State.CLOSED


@pytest.mark.parametrize("late", [None, OSError()])
def test_a_probe_that_ends_after_the_half_open_timeout_proves_nothing(late):
    guard = opened(half_open_timeout=5.0, probe_timeout=1000.0)
    probe = guard.enter(30.0)
    guard.exit(probe, 35.0, late)
    assert guard.state is State.OPEN
    assert refused(guard, 36.0) == 29.0


def test_one_lease_is_as_long_as_the_first_reset_timeout_unless_told():
    guard = opened(reset_timeout=lambda opened: 10.0 * opened)
    guard.enter(10.0)
    assert refused(guard, 11.0) == 9.0


# Open times


def test_the_open_time_follows_a_function_of_how_many_times_in_a_row_it_opened():
    guard = opened(reset_timeout=lambda opened: timedelta(seconds=10 * opened))
    assert refused(guard, 0.0) == 10.0
    call(guard, 10.0, OSError())
    assert refused(guard, 10.0) == 20.0
    call(guard, 30.0, OSError())
    assert refused(guard, 30.0) == 30.0
    call(guard, 60.0)  # closes: the row is over
    call(guard, 60.0, OSError())
    assert refused(guard, 60.0) == 10.0


def test_a_function_of_the_open_time_is_asked_when_it_is_built_and_never_by_a_call():
    asked = []

    def seconds(opened):
        asked.append(opened)
        return float(opened)

    guard = CircuitBreaker("b", consecutive_failures=1, reset_timeout=seconds)
    assert asked == list(range(1, 33))
    now = 0.0
    for _ in range(40):
        call(guard, now, OSError())
        now += refused(guard, now)
    assert asked == list(range(1, 33))
    call(guard, now, OSError())
    assert refused(guard, now) == 32.0  # the last answer holds


def test_what_a_function_of_the_open_time_raises_is_raised_where_the_breaker_is_built():
    with pytest.raises(ZeroDivisionError):
        CircuitBreaker("b", reset_timeout=lambda opened: 1 / (5 - opened))


def test_a_growing_open_time_doubles_up_to_its_maximum():
    steps = [growing(5, maximum=60, jitter=0)(opened) for opened in range(1, 7)]
    assert steps == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


def test_jitter_survives_at_the_maximum_and_never_passes_it():
    random.seed(7)
    step = growing(1, maximum=60, jitter=0.25)
    drawn = [step(50) for _ in range(1000)]
    assert 45.0 <= min(drawn) < 46.0
    assert 59.0 < max(drawn) <= 60.0


def test_a_growing_open_time_is_drawn_anew_at_each_opening():
    guard = opened(reset_timeout=growing(10, factor=1, jitter=0.5))
    times, now = [], 0.0
    for _ in range(20):
        times.append(refused(guard, now))
        now += times[-1] + 1e-6
        call(guard, now, OSError())
    assert len(set(times)) == 20
    assert all(5.0 <= time <= 10.0 for time in times)


@given(
    base=st.floats(1e-308, 1e308),
    factor=st.floats(1, 1e308),
    room=st.floats(1, 1e308),
    jitter=st.floats(0, 0.999),
    opened=st.integers(1, 10**6),
)
def test_a_growing_open_time_is_positive_and_finite_whatever_its_settings(base, factor, room, jitter, opened):
    maximum = min(base * room, 1.7e308)
    seconds = growing(base, factor=factor, maximum=maximum, jitter=jitter)(opened)
    assert 0 < seconds <= maximum


@pytest.mark.parametrize(
    ("settings", "error", "rule"),
    [
        ({"base": 0}, ValueError, "base must be more than 0 and finite, got 0 s"),
        ({"base": 10, "maximum": 5}, ValueError, "maximum must be base or more, got 5 s for a base of 10 s"),
        ({"base": 1, "factor": 0.5}, ValueError, "factor must be 1 or more, got 0.5"),
        ({"base": 1, "factor": float("inf")}, ValueError, "factor must be more than 0 and finite, got inf"),
        ({"base": 1, "jitter": 1}, ValueError, r"jitter must be in \(0, 1\), got 1"),
        ({"base": 1, "jitter": -0.1}, ValueError, "got -0.1"),
        ({"base": 1, "jitter": False}, TypeError, "jitter must be a fraction, got False"),
        ({"base": "5"}, TypeError, "base must be a number of seconds or a timedelta, got '5'"),
    ],
)
def test_a_bad_setting_of_a_growing_open_time_is_refused(settings, error, rule):
    with pytest.raises(error, match=rule):
        growing(**settings)


def test_events_say_why_the_state_changed():
    heard = []
    guard = CircuitBreaker(
        "b", failure_rate=0.5, minimum_calls=2, slow_call_rate=0.9, slow_call_duration=2.0, permitted_probes=2,
        half_open_timeout=5.0, listeners=[heard.append],
    )  # fmt: skip
    now = [0.0]

    @guard
    def once(error=None, took=0.0):
        now[0] += took
        if error:
            raise error

    def quietly(error=None, took=0.0):
        with pytest.raises(OSError, match="x"):
            once(error, took)

    with use_clock(lambda: now[0]):
        once()
        quietly(OSError("x"))  # half of them
        now[0] = 30.0
        quietly(OSError("x"))
        quietly(OSError("x"))  # the second of two probes
        now[0] = 60.0
        permit = guard.admit()
        now[0] = 95.0
        once()
        once(took=3.0)
        once(took=3.0)
        permit.cancel()
    assert [event.reason for event in heard if isinstance(event, StateChanged)] == [
        "1 of 2 calls failed",
        "the reset timeout is over",
        "the probes failed",
        "the reset timeout is over",
        "the probes took too long",
        "the reset timeout is over",
        "the probes succeeded",
        "2 of 2 calls were slow",
    ]


def test_slow_calls_that_end_after_a_change_of_state_are_all_counted():
    guard = CircuitBreaker("b", slow_call_rate=0.5, slow_call_duration=2.0)
    calls = [guard.enter(0.0) for _ in range(3)]
    with use_clock(lambda: 1.0):
        guard.force_open()
    for call, error in zip(calls, (None, OSError(), None), strict=True):
        guard.exit(call, 9.0, error)
    with use_clock(lambda: 9.0):
        seen = guard.snapshot()
    assert (seen.successes, seen.failures, seen.slow) == (2, 1, 3)


def test_a_reset_timeout_given_as_a_timedelta_reads_as_seconds():
    assert CircuitBreaker("b", reset_timeout=timedelta(minutes=1)).reset_timeout == 60.0


@pytest.mark.parametrize("then", ["open", "closed"])
def test_the_event_says_that_the_probes_took_too_long(then):
    heard = []
    guard = CircuitBreaker("b", half_open_timeout=5.0, half_open_then=then, listeners=[heard.append])
    with use_clock(lambda: 0.0):
        guard.force_open(30.0)
    with use_clock(lambda: 30.0):
        probe = guard.admit()
    with use_clock(lambda: 40.0):
        probe.cancel()
    assert (heard[-1].before, heard[-1].after, heard[-1].reason) == (
        State.HALF_OPEN,
        State(then),
        "the probes took too long",
    )
