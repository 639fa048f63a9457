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


deadline: ContextVar[float] = ContextVar("seawall_deadline", default=math.inf)  # on the gate's clock
current_priority: ContextVar[Priority] = ContextVar("seawall_priority", default=Priority.NORMAL)


@contextmanager
def priority(level: Priority | int) -> Iterator[None]:
    """Give the calls of this block a priority, for the bulkheads and shedders they meet.

    >>> with priority(Priority.CRITICAL):
    ...     print(current_priority.get().name)
    CRITICAL
    """
    token = current_priority.set(Priority(level))
    try:
        yield
    finally:
        current_priority.reset(token)
