"""A breaker of ours, as their listeners and their other code look at one."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta

import aiobreaker
from aiobreaker.storage.base import CircuitBreakerStorage

from seawall.policies.circuit_breaker import CircuitBreaker, State

Theirs = aiobreaker.CircuitBreakerState
THEIRS = {
    State.CLOSED: Theirs.CLOSED,
    State.OPEN: Theirs.OPEN,
    State.HALF_OPEN: Theirs.HALF_OPEN,
    State.ISOLATED: Theirs.OPEN,
    State.DISABLED: Theirs.CLOSED,
    State.METRICS_ONLY: Theirs.CLOSED,
}
LONGEST = 10**9  # seconds, 31 years: not every float is a date or a timedelta


def view_of(breaker: CircuitBreaker) -> aiobreaker.CircuitBreaker:
    """A breaker of theirs that shows ours."""
    return aiobreaker.CircuitBreaker(
        fail_max=breaker.consecutive_failures or sys.maxsize,
        timeout_duration=timedelta(seconds=timeout_of(breaker)),
        state_storage=_Mirror(breaker),
        name=breaker.name,
    )


def timeout_of(breaker: CircuitBreaker) -> float:
    """Seconds that it stays open, the first time in a row."""
    timeout = breaker.reset_timeout
    first = timeout(1) if callable(timeout) else timeout
    seconds = first.total_seconds() if isinstance(first, timedelta) else first
    return min(seconds, LONGEST)


def utcnow() -> datetime:
    """Universal time without a zone, as they keep it."""
    return datetime.now(UTC).replace(tzinfo=None)


def opened_at(breaker: CircuitBreaker, retry_after: float) -> datetime:
    """When one of theirs would have opened, to probe in `retry_after` seconds."""
    return utcnow() + timedelta(seconds=min(retry_after, LONGEST) - timeout_of(breaker))


class _Mirror(CircuitBreakerStorage):  # type: ignore[misc]  # theirs is untyped
    """Says what our breaker says; may open and close it."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        super().__init__("seawall")
        self._breaker = breaker

    @property
    def state(self) -> aiobreaker.CircuitBreakerState:
        return THEIRS[self._breaker.state]

    @state.setter
    def state(self, state: aiobreaker.CircuitBreakerState) -> None:
        if state is Theirs.OPEN:
            self._breaker.force_open()
        elif state is Theirs.CLOSED:
            self._breaker.force_closed()

    def increment_counter(self) -> None:
        """Nothing: ours counts."""

    def reset_counter(self) -> None:
        """Nothing: ours counts."""

    @property
    def counter(self) -> int:
        return self._breaker.snapshot().consecutive_failures

    @property
    def opened_at(self) -> datetime | None:
        retry_after = self._breaker.snapshot().retry_after
        return None if retry_after is None else opened_at(self._breaker, retry_after)

    @opened_at.setter
    def opened_at(self, moment: datetime) -> None:
        """Nothing: ours opens when it is told to."""
