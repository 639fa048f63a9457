"""Timeout: a call that takes too long is cancelled where it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from seawall.core import checks
from seawall.core.events import Event, Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Deadline, Token


class CallTimeoutError(TimeoutError):
    """A call outlived its `Timeout`. The user's own TimeoutErrors are never relabelled as this.

    Attributes:
        policy: name of the timeout.
        after: seconds it allowed.
    """

    def __init__(self, policy: str, after: float) -> None:
        super().__init__(policy, after)
        self.policy = policy
        self.after = after

    def __str__(self) -> str:
        return f"{self.policy!r}: the call took longer than {self.after:g} s"


@dataclass(frozen=True, slots=True)
class CallTimedOut(Event):
    """A timeout cancelled a call."""

    after: float


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
        CallTimeoutError: from a guarded call that took too long; a `TimeoutError`.
        TypeError: when it decorates a plain function or generator: only an event loop can cancel a call.

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
        return Deadline(self.after)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Turn the cancellation that the deadline caused into `CallTimeoutError`."""
        self._finished += 1
        if token.expired and isinstance(exc, asyncio.CancelledError):  # type: ignore[attr-defined]
            self._expired += 1
            self._emit(CallTimedOut, now, self.after)
            raise CallTimeoutError(self.name, self.after)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        with self._lock:
            return {"finished": self._finished, "timed_out": self._expired}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters: nothing."""
        return {}
