"""Checks of the settings that only a breaker has."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Literal, TypeVar

from seawall.core import checks
from seawall.policies.circuit_breaker.calls import Errors
from seawall.policies.circuit_breaker.states import State

F = TypeVar("F", bound=Callable[..., object])

NAMES = (
    "failure_rate",
    "slow_call_rate",
    "slow_call_duration",
    "consecutive_failures",
    "minimum_calls",
    "window",
    "window_calls",
    "reset_timeout",
    "open_for",
    "probes",
    "permitted_probes",
    "success_threshold",
    "probe_timeout",
    "half_open_timeout",
    "half_open_then",
    "on",
    "ignore",
    "on_result",
)


def seconds(setting: str, value: float | timedelta | None) -> float | None:
    """`value` as float seconds, None where it is off."""
    return None if value is None else checks.seconds(setting, value)


def count(setting: str, value: int | None) -> int | None:
    """`value` as a whole number of at least 1, None where it is off."""
    return None if value is None else checks.count(setting, value)


def slow_calls(rate: float | None, duration: float | timedelta | None) -> tuple[float | None, float | None]:
    """How many calls may take how long: both or neither."""
    if (rate is None) != (duration is None):
        raise ValueError(
            "slow_call_rate and slow_call_duration go together: how many calls may take how long; "
            f"got {rate!r} and {duration!r}"
        )
    checked = None if rate is None else checks.fraction("slow_call_rate", rate)
    return checked, seconds("slow_call_duration", duration)


def windows(window: float | timedelta | None, window_calls: int | None) -> tuple[float | None, int | None]:
    """The one of both that is used: seconds or calls."""
    if window_calls is None:
        span = checks.seconds("window", 60.0 if window is None else window)
        if span < 0.001:  # ten slots of 100 us: clocks tell no finer ones apart
            raise ValueError(f"window must be 0.001 or more, got {window!r} s")
        return span, None
    if window is not None:
        raise ValueError(f"give window or window_calls, not both; got {window!r} and {window_calls!r}")
    if checks.count("window_calls", window_calls) > 1_000_000:  # a byte each
        raise ValueError(f"window_calls must be 1000000 or fewer, got {window_calls!r}")
    return None, window_calls


def permitted_probes(probes: int | None, success_threshold: int) -> int | None:
    """How many probes a round has in all: enough to close it."""
    permitted = count("permitted_probes", probes)
    if permitted is not None and permitted < success_threshold:
        raise ValueError(
            f"permitted_probes must be success_threshold ({success_threshold}) or more, or it would never close; "
            f"got {permitted!r}"
        )
    return permitted


def after_half_open(value: State | Literal["open", "closed"]) -> State:
    """The state that follows a round of probes that took too long."""
    if value not in (State.OPEN, State.CLOSED, "open", "closed"):
        raise ValueError(f"half_open_then must be State.OPEN or State.CLOSED, got {value!r}")
    return State(value)


def errors(setting: str, value: Errors) -> Errors:
    """Exception classes, or a predicate of an exception."""
    if callable(value) and not isinstance(value, type):
        return checks.function(setting, value, of="one value")
    checks.exceptions(setting, value)
    return value
