"""What a call inherits from the calls around it: when all must be over, and how much it matters.

Both live in context variables, so tasks and threads that copy their context inherit them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Priority(enum.IntEnum):
    """How much a call matters when not all can be served."""

    SHEDDABLE = 0  # nobody waits for it: prefetch, batch
    LOW = 1
    NORMAL = 2
    HIGH = 3
    CRITICAL = 4  # shed last: payments, health checks


class Limit:
    """A deadline of a call. One that is over holds nowhere any more, also in contexts it was left behind in."""

    __slots__ = ("outer", "over", "until")

    def __init__(self, until: float, outer: Limit | None) -> None:
        self.until = until
        self.outer = outer
        self.over = False


class _Deadline:
    """When the calls around this code must be over, on the gate's clock; infinite outside of any."""

    def __init__(self) -> None:
        self._limit: ContextVar[Limit | None] = ContextVar("seawall_deadline", default=None)

    def _inner(self) -> Limit | None:
        limit = self._limit.get()
        while limit is not None and limit.over:
            limit = limit.outer
        return limit

    def get(self) -> float:
        """The deadline that holds here."""
        limit = self._limit.get()
        if limit is not None and limit.over:
            limit = self._inner()
        return math.inf if limit is None else limit.until

    def set(self, until: float) -> Limit:
        """Let `until` hold here, until it is `reset`."""
        limit = Limit(until, self._inner())
        self._limit.set(limit)
        return limit

    def reset(self, limit: Limit) -> None:
        """`limit` is over, wherever it was seen."""
        limit.over = True
        if self._limit.get() is limit:
            self._limit.set(self._inner())


deadline = _Deadline()
current_priority: ContextVar[Priority] = ContextVar("seawall_priority", default=Priority.NORMAL)


@contextmanager
def priority(level: Priority | int) -> Iterator[None]:
    """Give the calls of this block a priority, for the bulkheads and shedders they meet.

    Examples:
        >>> with priority(Priority.CRITICAL):
        ...     print(current_priority.get().name)
        CRITICAL
    """
    token = current_priority.set(Priority(level))
    try:
        yield
    finally:
        current_priority.reset(token)
