"""Time that passes when a test says so, for plain functions."""

from __future__ import annotations

import threading
from datetime import timedelta

from seawall.core import checks


class VirtualClock:
    """A clock to give to `use_clock`: it stands still until somebody advances it or sleeps on it.

    Pauses of plain functions (the back-off of a retry, say) sleep on it, so they take no time and are kept in
    `slept`. For coroutines there is `run`: there the event loop's own clock must be virtual too.

    Examples:
        >>> from seawall import CircuitBreaker, use_clock
        >>> clock, bank = VirtualClock(), CircuitBreaker("bank", consecutive_failures=1, reset_timeout=30)
        >>> with use_clock(clock):
        ...     bank.admit().failure(ConnectionError())
        ...     clock.advance(29)
        ...     print(bank.snapshot().retry_after)
        1.0
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = float(start)
        self._lock = threading.Lock()
        self.slept: list[float] = []

    def __call__(self) -> float:
        """The time in seconds."""
        return self._now

    def advance(self, seconds: float | timedelta) -> None:
        """Let `seconds` pass."""
        passed = checks.seconds("seconds", seconds, zero=True)
        with self._lock:
            self._now += passed

    def sleep(self, seconds: float | timedelta) -> None:
        """Let `seconds` pass and remember it in `slept`; the gate calls this in place of `time.sleep`."""
        self.advance(seconds)
        self.slept.append(checks.seconds("seconds", seconds, zero=True))

    def __repr__(self) -> str:
        return f"<VirtualClock at {self._now:g} s>"
