"""What a breaker says: its states, its error, its events and its snapshot."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from seawall.core.errors import Rejected
from seawall.core.events import Event


class State(enum.Enum):
    """What a breaker does with calls. The last three last until somebody says otherwise."""

    CLOSED = "closed"  # lets them pass and counts how they end
    OPEN = "open"  # refuses them until the reset timeout has passed
    HALF_OPEN = "half_open"  # lets a few probes through to find out
    ISOLATED = "isolated"  # refuses them
    DISABLED = "disabled"  # lets them pass and counts nothing
    METRICS_ONLY = "metrics_only"  # lets them pass, counts, and only says when it would have opened


class CircuitOpenError(Rejected):
    """The breaker is open, or half open with all its probes out. `retry_after` is when it probes next.

    Attributes:
        failure: type and message of the exception that opened it; None where none did (by hand, too slow, a result).
            Text, because an exception that is kept keeps the variables of the functions it came through.
    """

    reason = "is open: what it guards was failing"

    failure: str | None = None


@dataclass(frozen=True, slots=True)
class StateChanged(Event):
    """A breaker changed its state."""

    before: State
    after: State
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ThresholdExceeded(Event):
    """A breaker that only measures would have opened; said once for each time it is set to measure."""

    reason: str


@dataclass(frozen=True, slots=True)
class BreakerSnapshot:
    """A breaker at one moment. Counters only grow; the rates are of the window, None under `minimum_calls`."""

    state: State
    successes: int
    failures: int
    slow: int
    neither: int
    rejections: int
    opened: int
    opened_in_a_row: int
    failure_rate: float | None
    slow_call_rate: float | None
    consecutive_failures: int
    probes: int
    retry_after: float | None
    failure: str | None


def described(exc: BaseException) -> str:
    """Type and message of `exc`, found without running code of the user's: the lock is held."""
    arguments = BaseException.args.__get__(exc)  # type: ignore[attr-defined]
    message = next((argument for argument in arguments if type(argument) is str), "")
    return f"{type(exc).__name__}: {message[:200]}" if message else type(exc).__name__
