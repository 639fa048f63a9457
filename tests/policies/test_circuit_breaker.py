from __future__ import annotations

import asyncio
import contextlib
import math
from asyncio import CancelledError
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import (
    BulkheadFullError,
    CallRejected,
    CircuitBreaker,
    CircuitOpenError,
    RateLimitedError,
    Rejected,
    State,
    StateChanged,
    Timeout,
    use_clock,
)
from seawall.testing import run


def call(guard, now, error=None):
    guard.exit(guard.enter(now), now, error)


def opened(at=0.0, **kwargs):
    guard = CircuitBreaker("b", **{"consecutive_failures": 1, "reset_timeout": 30.0, **kwargs})
    call(guard, at, ConnectionError())
    assert guard.state is State.OPEN
    return guard


def test_it_opens_at_the_failure_rate_and_not_before():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=4)
    for error in (None, None, None, OSError(), OSError()):
        call(guard, 1.0, error)
    assert guard.state is State.CLOSED  # 2 of 5
    call(guard, 1.0, OSError())
    assert guard.state is State.OPEN  # 3 of 6


def test_below_the_minimum_of_calls_no_rate_opens_it():
    guard = CircuitBreaker("b", failure_rate=0.1, minimum_calls=20)
    for _ in range(19):
        call(guard, 1.0, OSError())
    assert guard.state is State.CLOSED
    call(guard, 1.0, OSError())
    assert guard.state is State.OPEN


def test_cancelled_and_refused_calls_are_no_part_of_the_minimum():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=2)
    call(guard, 1.0, OSError())
    for error in (CancelledError(), BulkheadFullError("k"), RateLimitedError("r", 1.0)):
        call(guard, 1.0, error)
    assert guard.state is State.CLOSED
    assert guard.snapshot().neither == 3


def test_failures_older_than_the_window_are_forgotten():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=2, window=10.0)
    call(guard, 0.5, OSError())
    call(guard, 10.6, None)
    call(guard, 10.7, None)
    call(guard, 10.8, OSError())
    assert guard.state is State.CLOSED  # 1 of 3, not 2 of 4
    with use_clock(lambda: 10.8):
        assert guard.snapshot().failure_rate == pytest.approx(1 / 3)


def test_a_success_ends_a_row_of_failures():
    guard = CircuitBreaker("b", consecutive_failures=3, minimum_calls=1000)
    for error in (OSError(), OSError(), None, OSError(), OSError()):
        call(guard, 1.0, error)
    assert guard.state is State.CLOSED
    assert guard.snapshot().consecutive_failures == 2
    call(guard, 1.0, OSError())
    assert guard.state is State.OPEN


def test_failures_in_a_row_count_only_where_they_are_asked_for():
    guard = CircuitBreaker("b", minimum_calls=1000)
    for _ in range(900):
        call(guard, 1.0, OSError())
    assert guard.state is State.CLOSED


def test_only_the_exceptions_named_count_and_of_them_not_the_ignored():
    guard = CircuitBreaker("b", consecutive_failures=1, on=(OSError, KeyError), ignore=FileNotFoundError)
    for error in (ValueError(), FileNotFoundError(), CircuitOpenError("further in")):
        call(guard, 1.0, error)
        assert guard.state is State.CLOSED
    call(guard, 1.0, PermissionError())
    assert guard.state is State.OPEN


def test_a_refusal_from_further_in_is_neither_even_when_everything_counts():
    guard = CircuitBreaker("b", consecutive_failures=1, on=BaseException)
    call(guard, 1.0, BulkheadFullError("k"))
    assert guard.state is State.CLOSED


@given(now=st.floats(0, 1e9), reset=st.floats(0.001, 1e5))
def test_a_call_after_retry_after_gets_in_and_one_just_before_does_not(now, reset):
    guard = opened(at=0.0, reset_timeout=now + reset)
    with pytest.raises(CircuitOpenError) as refused:
        guard.enter(now)
    then = now + refused.value.retry_after
    with pytest.raises(CircuitOpenError):
        guard.enter(then * (1 - 1e-12) - 1e-9)
    guard.enter(then * (1 + 1e-12) + 1e-9)
    assert guard.state is State.HALF_OPEN


def test_a_probe_out_tells_the_next_call_when_its_lease_ends():
    guard = opened(probes=2, probe_timeout=8.0)
    guard.enter(30.0)
    guard.enter(33.0)
    with pytest.raises(CircuitOpenError) as refused:
        guard.enter(34.0)
    assert refused.value.retry_after == 4.0  # of the first to end
    guard.enter(38.0)
    with pytest.raises(CircuitOpenError):
        guard.enter(38.0)


def test_it_needs_as_many_successes_as_told_and_one_failure_opens_it_again():
    guard = opened(success_threshold=3)
    for now in (30.0, 31.0):
        call(guard, now, None)
        assert guard.state is State.HALF_OPEN
    call(guard, 32.0, OSError())
    assert guard.state is State.OPEN
    with pytest.raises(CircuitOpenError) as refused:
        guard.enter(33.0)
    assert refused.value.retry_after == 29.0
    for now in (62.0, 63.0, 64.0):
        assert guard.state is not State.CLOSED
        call(guard, now, None)
    assert guard.state is State.CLOSED


def test_once_closed_again_the_failures_from_before_do_not_count():
    guard = CircuitBreaker("b", failure_rate=0.5, minimum_calls=4, window=3600, reset_timeout=1.0)
    for _ in range(4):
        call(guard, 10.0, OSError())
    call(guard, 11.0, None)
    assert guard.state is State.CLOSED
    for _ in range(3):
        call(guard, 11.5, OSError())
    assert guard.state is State.CLOSED
    call(guard, 11.5, OSError())
    assert guard.state is State.OPEN


@pytest.mark.parametrize("probes", [1, 2, 5])
def test_stale_ignored_and_cancelled_results_never_let_more_probes_in_than_permitted(probes):
    guard = CircuitBreaker(
        "b", consecutive_failures=1, reset_timeout=10, probes=probes, ignore=KeyError, probe_timeout=1e6
    )
    stale = [guard.enter(0.0) for _ in range(10)]
    call(guard, 0.0, OSError())
    out = [guard.enter(10.0) for _ in range(probes)]
    endings = [None, OSError(), KeyError(), CancelledError()] * 3
    for token, ending in zip(stale, endings, strict=False):
        guard.exit(token, 11.0, ending)
        with pytest.raises(CircuitOpenError):
            guard.enter(11.0)
    for _ in range(3):
        guard.exit(out.pop(), 12.0, CancelledError())
        out.append(guard.enter(12.0))
        with pytest.raises(CircuitOpenError):
            guard.enter(12.0)
    assert guard.snapshot().probes == probes


def test_a_clock_that_stands_still_between_two_calls_breaks_nothing():
    guard = opened(at=7.0, reset_timeout=1.0)
    call(guard, 8.0, None)
    for _ in range(5):
        call(guard, 8.0, None)
    assert guard.state is State.CLOSED


def test_the_wall_clock_moves_nothing(monkeypatch):
    import time

    guard = opened(reset_timeout=0.001)
    monkeypatch.setattr(time, "time", lambda: -3600.0)
    monkeypatch.setattr(time, "localtime", None)
    probe = guard.enter(10.0)
    guard.exit(probe, 10.0, None)
    assert guard.state is State.CLOSED


def test_snapshot_tells_state_and_counters():
    guard = CircuitBreaker("b", consecutive_failures=2, reset_timeout=30, minimum_calls=2)
    assert guard.snapshot().failure_rate is None
    for error in (None, None, KeyboardInterrupt(), OSError(), OSError()):
        call(guard, 100.0, error)
    for _ in range(3):
        with pytest.raises(CircuitOpenError):
            guard.enter(110.0)
    with use_clock(lambda: 110.0):
        seen = guard.snapshot()
        assert guard.counters() == {"success": 2, "failure": 2, "neither": 1, "rejected": 3}
        gauges = guard.gauges()
    assert (seen.state, seen.opened, seen.rejections, seen.retry_after) == (State.OPEN, 1, 3, 20.0)
    assert (seen.successes, seen.failures, seen.neither) == (2, 2, 1)
    assert (gauges["state.open"], gauges["state.closed"], gauges["state.half_open"]) == (1.0, 0.0, 0.0)
    assert math.isnan(gauges["failure_rate"])
    with use_clock(lambda: 1e6):
        assert guard.snapshot().retry_after == 0.0


def test_every_change_of_state_and_every_refusal_is_an_event():
    heard = []
    now = [0.0]
    guard = CircuitBreaker("b", consecutive_failures=1, reset_timeout=30, listeners=[heard.append])

    @guard
    def once(error=None):
        if error:
            raise error

    with use_clock(lambda: now[0]):
        with pytest.raises(OSError, match="x"):
            once(OSError("x"))
        with pytest.raises(CircuitOpenError) as refused:
            once()
        now[0] = 30.0
        once()
    assert heard == [
        StateChanged("b", 0.0, State.CLOSED, State.OPEN, "1 failures in a row"),
        CallRejected("b", 0.0, refused.value),
        StateChanged("b", 30.0, State.OPEN, State.HALF_OPEN, "the reset timeout is over"),
        StateChanged("b", 30.0, State.HALF_OPEN, State.CLOSED, "the probes succeeded"),
    ]


def test_the_error_says_who_why_and_when_to_come_back():
    guard = opened(reset_timeout=timedelta(seconds=30))
    with pytest.raises(CircuitOpenError) as refused:
        guard.enter(18.0)
    assert str(refused.value) == "'b' is open: what it guards was failing; try again in 12 s"
    assert (refused.value.policy, refused.value.retry_after) == ("b", 12.0)


def test_it_sees_a_timeout_further_in_as_a_failure():
    guard = CircuitBreaker("b", consecutive_failures=2)

    @guard
    @Timeout("t", 1.0)
    async def hang():
        await asyncio.sleep(10)

    async def main():
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await hang()
        with pytest.raises(CircuitOpenError):
            await hang()

    run(main())


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.floats(0, 4), st.sampled_from(["start", "good", "bad", "cancel"]), st.integers(0, 5)),
        max_size=60,
    ),
    probes=st.integers(1, 3),
    threshold=st.integers(1, 4),
)
def test_it_keeps_its_rules_over_any_history(steps, probes, threshold):
    guard = CircuitBreaker(
        "b", consecutive_failures=2, minimum_calls=1000, reset_timeout=5.0, probes=probes, success_threshold=threshold,
        probe_timeout=1e9,
    )  # fmt: skip
    now, round_, opened_at = 0.0, 0, None
    flying: list[tuple[object, int, State]] = []
    passed = in_a_row = 0
    for wait, what, which in steps:
        now += wait
        before = guard.state
        if what == "start":
            try:
                token = guard.enter(now)
            except CircuitOpenError:
                mine = sum(1 for _, when, state in flying if state is State.HALF_OPEN and when == round_)
                assert (before is State.OPEN and now < opened_at + 5.0) or mine == probes
                continue
            if before is State.OPEN:
                assert now >= opened_at + 5.0
                round_, passed = round_ + 1, 0
            flying.append((token, round_, guard.state))
            assert guard.state is not State.OPEN
        elif flying:
            token, when, state = flying.pop(which % len(flying))
            guard.exit(token, now, {"good": None, "bad": OSError(), "cancel": CancelledError()}[what])
            expected = before
            if when == round_ and state is before and what != "cancel":
                if state is State.HALF_OPEN:
                    passed += what == "good"
                    expected = State.OPEN if what == "bad" else State.CLOSED if passed >= threshold else before
                else:
                    in_a_row = in_a_row + 1 if what == "bad" else 0
                    expected = State.OPEN if in_a_row >= 2 else before
            assert guard.state is expected
            if expected is not before:
                round_, passed, in_a_row, opened_at = round_ + 1, 0, 0, now


@pytest.mark.parametrize(
    ("setting", "value", "error", "rule"),
    [
        ("failure_rate", 0, ValueError, r"failure_rate must be in \(0, 1\], got 0"),
        ("failure_rate", 50, ValueError, r"failure_rate must be in \(0, 1\], got 50; for 50 % write 0.5"),
        ("failure_rate", math.nan, ValueError, "got nan"),
        ("failure_rate", "half", TypeError, "failure_rate must be a fraction, got 'half'"),
        ("minimum_calls", 0, ValueError, "minimum_calls must be 1 or more, got 0"),
        ("minimum_calls", 1.5, TypeError, "minimum_calls must be a whole number, got 1.5"),
        ("window", 0, ValueError, "window must be more than 0 and finite, got 0 s"),
        ("window", math.inf, ValueError, "window must be more than 0 and finite, got inf s"),
        ("consecutive_failures", 0, ValueError, "consecutive_failures must be 1 or more, got 0"),
        ("consecutive_failures", True, TypeError, "consecutive_failures must be a whole number, got True"),
        ("reset_timeout", -1, ValueError, "reset_timeout must be more than 0 and finite, got -1 s"),
        ("reset_timeout", timedelta(0), ValueError, "reset_timeout must be more than 0"),
        ("reset_timeout", "30s", TypeError, "reset_timeout must be a number of seconds or a timedelta, got '30s'"),
        ("probes", 0, ValueError, "probes must be 1 or more, got 0"),
        ("success_threshold", 0, ValueError, "success_threshold must be 1 or more, got 0"),
        ("probe_timeout", 0, ValueError, "probe_timeout must be more than 0 and finite, got 0 s"),
        ("half_open_timeout", 0, ValueError, "half_open_timeout must be more than 0 and finite, got 0 s"),
        (
            "half_open_then",
            "half_open",
            ValueError,
            "half_open_then must be State.OPEN or State.CLOSED, got 'half_open'",
        ),
        ("permitted_probes", 0, ValueError, "permitted_probes must be 1 or more, got 0"),
        ("window", 1e-310, ValueError, "window must be 0.001 or more, got 1e-310 s"),
        ("window_calls", 0, ValueError, "window_calls must be 1 or more, got 0"),
        ("window_calls", 1_000_001, ValueError, "window_calls must be 1000000 or fewer, got 1000001"),
        ("window_calls", 10.0, TypeError, "window_calls must be a whole number, got 10.0"),
        ("slow_call_rate", 0.5, ValueError, "slow_call_rate and slow_call_duration go together.* got 0.5 and None"),
        ("slow_call_duration", 1, ValueError, "slow_call_rate and slow_call_duration go together.* got None and 1"),
        ("reset_timeout", lambda opened: 3 - opened, ValueError, r"reset_timeout\(3\) must be more than 0 .*got 0 s"),
        ("reset_timeout", lambda opened: None, TypeError, r"reset_timeout\(1\) must be a number of seconds"),
        ("open_for", 30.0, TypeError, "open_for must be a plain function of one value, got 30.0"),
        ("on_result", True, TypeError, "on_result must be a plain function of one value, got True"),
        ("on_result", asyncio.sleep, TypeError, "on_result must be a plain function of one value"),
        ("on", asyncio.sleep, TypeError, "on must be a plain function of one value"),
        ("on", "OSError", TypeError, "on must be an exception class or a tuple of them, got 'OSError'"),
        ("on", (OSError, int), TypeError, "on must be an exception class or a tuple of them, got <class 'int'>"),
        ("ignore", OSError(), TypeError, "ignore must be an exception class"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(setting, value, error, rule):
    with pytest.raises(error, match=rule):
        CircuitBreaker("b", **{setting: value})


@pytest.mark.parametrize(
    ("name", "error", "rule"),
    [
        ("", ValueError, "a CircuitBreaker's name must be 1 to 200 printable characters, got ''"),
        ("a\nb", ValueError, "printable"),
        ("n" * 201, ValueError, "1 to 200"),
        (5, TypeError, "a CircuitBreaker's name must be a string, got 5; settings are keyword-only"),
    ],
)
def test_a_bad_name_is_refused(name, error, rule):
    with pytest.raises(error, match=rule):
        CircuitBreaker(name)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("failure_rate", (1e-310, 0.999999, 1)),
        ("window", (0.001, 1e308, timedelta.max)),
        ("window_calls", (1, 1_000_000)),
        ("minimum_calls", (10**30,)),
        ("consecutive_failures", (10**30,)),
        ("reset_timeout", (1e-310, 1e308, lambda opened: 1e308 / opened)),
        ("probe_timeout", (1e-310, 1e308)),
        ("half_open_timeout", (1e-310, 1e308)),
        ("probes", (10**30,)),
        ("permitted_probes", (10**30,)),
        ("success_threshold", (10**30,)),
    ],
)
def test_an_absurd_setting_works(setting, values):
    for value in values:
        guard = CircuitBreaker("b", **{"consecutive_failures": 2, setting: value})
        for now in (0.0, 1e9, 1e9, 2e9, 2e9, 3e9):
            with contextlib.suppress(CircuitOpenError):
                call(guard, now, OSError())
            guard.snapshot()


def test_seconds_and_calls_for_one_window_are_refused():
    with pytest.raises(ValueError, match="give window or window_calls, not both; got 60 and 100"):
        CircuitBreaker("b", window=60, window_calls=100)


def test_a_round_too_small_to_ever_close_is_refused():
    with pytest.raises(ValueError, match=r"must be success_threshold \(3\) or more, or it would never close; got 2"):
        CircuitBreaker("b", success_threshold=3, permitted_probes=2)


def test_every_refusal_can_be_caught_as_one():
    assert issubclass(CircuitOpenError, Rejected)
