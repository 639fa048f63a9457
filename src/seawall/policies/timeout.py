"""Timeout: a call that takes too long is cancelled where it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from seawall.core import checks
from seawall.core.errors import CallTimeoutError
from seawall.core.events import Event, Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Expiry, Token


@dataclass(frozen=True, slots=True)
class CallTimedOut(Event):
    """A timeout cancelled a call."""

    after: float


@dataclass(frozen=True, slots=True)
class TimeoutSnapshot:
    """A timeout at one moment. Counters only grow."""

    finished: int
    timed_out: int


class Timeout(GuardPolicy):
    """Cancels the calling task when the call outlives `after` seconds.

    The call keeps its own task and context. Equal delays expire in arrival order, so one dict and one loop
    timer serve every call in flight. On an async generator it holds for each item, not for the whole stream,
    and the consumer's own time between items is free.

    Args:
        name: labels errors, metrics and logs.
        after: seconds a call may take.
        listeners: called with its `CallTimedOut` events.

    Raises:
        CallTimeoutError: from a guarded call that took too long; a `TimeoutError` that counts as a failure.
        TypeError: when it decorates a plain function or generator: only an event loop can cancel a call.

    Examples:
        >>> Timeout("search", 2.0).after
        2.0
    """

    kind = "timeout"
    needs_event_loop = True
    issues_deadlines = True  # the gate arms them

    def __init__(self, name: str, after: float | timedelta, *, listeners: Iterable[Listener] = ()) -> None:
        super().__init__(name, listeners)
        self.after = checks.seconds("after", after)
        self._finished = 0
        self._expired = 0
        self._register()

    def enter(self, now: float) -> Token:
        """The deadline the gate arms for this call."""
        return Expiry(self.after)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Turn the cancellation that the deadline caused into `CallTimeoutError`."""
        self._finished += 1
        if token.expired and isinstance(exc, asyncio.CancelledError):  # type: ignore[attr-defined]
            self._expired += 1
            self._emit(CallTimedOut, now, token.after)  # type: ignore[attr-defined]
            raise CallTimeoutError(self.name, token.after)  # type: ignore[attr-defined]

    def _adopt(self, fresh: Self, now: float) -> None:
        self.after = fresh.after  # calls in flight keep theirs

    def snapshot(self) -> TimeoutSnapshot:
        """Counters at one moment."""
        with self._lock:
            return TimeoutSnapshot(self._finished, self._expired)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {"finished": snapshot.finished, "timed_out": snapshot.timed_out}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters: nothing."""
        return {}
