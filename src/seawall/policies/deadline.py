"""Deadline: a call and all that it does, retries and waits included, is over in time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from seawall.core import ambient, checks, gate
from seawall.core.errors import CallTimeoutError, Rejected
from seawall.core.events import Event, Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import SharedExpiry, Token


class DeadlineExceededError(CallTimeoutError):
    """A call and all it did took longer than its `Deadline`."""


class DeadlinePassedError(Rejected):
    """The deadline of the call around this one had passed before this one began."""

    reason = "has no time left: the deadline of the call around it has passed"


@dataclass(frozen=True, slots=True)
class DeadlineExceeded(Event):
    """A deadline cancelled a call."""

    after: float


@dataclass(frozen=True, slots=True)
class DeadlineSnapshot:
    """A deadline at one moment. Counters only grow."""

    finished: int
    exceeded: int
    rejections: int


class Deadline(GuardPolicy):
    """Cancels the calling task when the call, with everything it does, outlives `after` seconds.

    Unlike `Timeout`, everything inside sees it: `time_left` tells what remains, policies further in wait no longer
    than that, a retry starts no attempt after it, and on a stream it holds for the whole, not for each item. An
    inner deadline can only come earlier than the one around it.

    A plain function can't be cancelled: there its policies and `time_left` see the deadline, and a result that comes
    late still counts.

    Args:
        name: labels errors, metrics and logs.
        after: seconds from the start of the call.
        listeners: called with its `DeadlineExceeded` and `CallRejected` events.

    Raises:
        DeadlineExceededError: from a call that took too long; a `CallTimeoutError`.
        DeadlinePassedError: from one that begins when the deadline around it has passed; it is `Rejected`.

    Examples:
        >>> with Deadline("page", 2.0).scope():
        ...     print(1.9 < time_left() <= 2.0)
        True
    """

    kind = "deadline"
    issues_deadlines = True  # the gate arms them

    def __init__(self, name: str, after: float | timedelta, *, listeners: Iterable[Listener] = ()) -> None:
        super().__init__(name, listeners)
        self.after = checks.seconds("after", after)
        self._finished = 0
        self._exceeded = 0
        self._register()

    def enter(self, now: float) -> Token:
        """The deadline the gate arms for this call, unless the one around it has passed."""
        if ambient.deadline.get() <= now:
            raise self._refused(DeadlinePassedError(self.name), now)
        return SharedExpiry(self.after, now + self.after)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Turn the cancellation that the deadline caused into `DeadlineExceededError`."""
        self._finished += 1
        if token.expired and isinstance(exc, asyncio.CancelledError):  # type: ignore[attr-defined]
            self._exceeded += 1
            self._emit(DeadlineExceeded, now, token.after)  # type: ignore[attr-defined]
            raise DeadlineExceededError(self.name, token.after)  # type: ignore[attr-defined]

    def _adopt(self, fresh: Self, now: float) -> None:
        self.after = fresh.after  # calls in flight keep theirs

    def snapshot(self) -> DeadlineSnapshot:
        """Counters at one moment."""
        with self._lock:
            return DeadlineSnapshot(self._finished, self._exceeded, self._rejections)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {"finished": snapshot.finished, "exceeded": snapshot.exceeded, "rejected": snapshot.rejections}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters: nothing."""
        return {}


def time_left() -> float:
    """Seconds until the deadline of the call this runs in; infinite outside of any, never below 0.

    Give it to what seawall can't reach: `client.get(url, timeout=min(5.0, time_left()))`.

    Examples:
        >>> time_left()
        inf
    """
    return max(0.0, ambient.deadline.get() - gate.now())
