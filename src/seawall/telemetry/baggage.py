"""Priority and deadline that travel between services in OpenTelemetry's baggage. Everything in it is hostile.

Two keys are read, and no others; what is malformed is ignored. Nothing of it gets into metrics, spans or logs.

| key | says |
| --- | --- |
| `seawall.priority` | a name of `Priority`, in any case: `high` |
| `seawall.deadline` | seconds that the caller still waits, when it called: `1.250` |
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from opentelemetry.baggage import get_baggage, remove_baggage, set_baggage
from opentelemetry.context import attach, get_current

from seawall.core import gate
from seawall.core.ambient import Priority, current_priority, deadline, priority

PRIORITY, DEADLINE = "seawall.priority", "seawall.deadline"
LONGEST = 86_400.0  # seconds
_LEVELS = {level.name: level for level in Priority}
_SECONDS = re.compile(r"\d{1,8}(?:\.\d{1,9})?", re.ASCII)


def told_priority() -> Priority | None:
    """The priority in the baggage that is current here; None without one."""
    value = get_baggage(PRIORITY)
    return _LEVELS.get(value.upper()) if isinstance(value, str) and len(value) < 20 else None


def told_seconds() -> float | None:
    """The seconds in the baggage that is current here, a day at most; None without any."""
    value = get_baggage(DEADLINE)
    if not isinstance(value, str) or not _SECONDS.fullmatch(value):
        return None
    return min(float(value), LONGEST)


@contextmanager
def inherited(*, highest: Priority = Priority.HIGH) -> Iterator[None]:
    """Work for a caller: the block has the priority and the deadline that came in the baggage.

    Policies and functions inside see both, as in `priority` and a `Deadline`; the block itself is not cancelled. For
    where a request comes in, after OpenTelemetry has taken over its context, and only for callers you trust.

    Args:
        highest: what a caller may claim; of more it gets this much.

    Examples:
        >>> from opentelemetry.baggage import set_baggage
        >>> from opentelemetry.context import attach, detach
        >>> token = attach(set_baggage("seawall.priority", "low"))
        >>> with inherited():
        ...     print(current_priority.get().name)
        LOW
        >>> detach(token)
    """
    claimed, seconds = told_priority(), told_seconds()
    with ExitStack() as held:
        if claimed is not None:
            held.enter_context(priority(min(claimed, highest)))
        if seconds is not None:
            until = gate.clock() + seconds
            if until < deadline.get():
                held.callback(deadline.reset, deadline.set(until))
        yield


@contextmanager
def passed_on() -> Iterator[None]:
    """Ask another service: what the block sends carries this call's priority, and the seconds that it has left.

    For an outgoing request whose client injects OpenTelemetry's context.
    """
    before = get_current()
    level, left = current_priority.get(), deadline.get() - gate.clock()
    context = set_baggage(PRIORITY, level.name.lower(), before)
    if left == math.inf:
        context = remove_baggage(DEADLINE, context)
    else:
        context = set_baggage(DEADLINE, f"{min(max(left, 0.0), LONGEST):.3f}", context)
    attach(context)
    try:
        yield
    finally:
        if get_current() is context:  # and not closed in another task, where nothing of ours is current
            attach(before)
