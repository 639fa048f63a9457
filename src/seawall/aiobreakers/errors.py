"""One error for two kinds of handlers."""

from __future__ import annotations

from datetime import datetime, timedelta

import aiobreaker

from seawall.aiobreakers.view import LONGEST
from seawall.core import gate
from seawall.policies.circuit_breaker import CircuitOpenError


class CircuitBreakerError(CircuitOpenError, aiobreaker.CircuitBreakerError):  # type: ignore[misc]  # theirs is untyped
    """A breaker is open: caught by `except CircuitOpenError` and by `except aiobreaker.CircuitBreakerError`.

    Attributes:
        message: what `str` says.
        reopen_time: when the breaker probes next, in local time, as aiobreaker tells it.
    """

    def __init__(self, policy: str, retry_after: float | None = None) -> None:
        super().__init__(policy, retry_after)
        seconds = min(retry_after or 0.0, LONGEST)
        self._probes_at = gate.now() + seconds
        self.message = str(self)
        self.reopen_time = datetime.now() + timedelta(seconds=seconds)  # noqa: DTZ005 - naive and local, like theirs

    @classmethod
    def like(cls, error: CircuitOpenError) -> CircuitBreakerError:
        """`error`, for handlers of both kinds."""
        both = cls(error.policy, error.retry_after)
        both.reason, both.failure = error.reason, error.failure
        both.message = str(both)
        return both

    @property
    def time_remaining(self) -> timedelta:
        """How long it stays open still, whatever is done to the wall clock."""
        return timedelta(seconds=max(0.0, self._probes_at - gate.now()))
