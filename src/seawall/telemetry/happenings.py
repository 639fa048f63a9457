"""Events as exporters tell them: a name, a level and plain attributes."""

from __future__ import annotations

import dataclasses
import enum
import logging
import re

from opentelemetry.trace import get_current_span

from seawall.core.events import Event
from seawall.core.watching import error_type

Plain = str | bool | int | float

_OFTEN = {
    "CallRejected",
    "CallTimedOut",
    "ChaosInjected",
    "DeadlineExceeded",
    "FallbackUsed",
    "HedgeLost",
    "HedgeStarted",
    "HedgeWon",
    "LimitChanged",
    "RetryScheduled",
    "StaleAnswered",
}
_GRAVE = {
    "AnswerShed",
    "BudgetExhausted",
    "BurnAlertFired",
    "FallbackFailed",
    "LimiterDrained",
    "ModelLost",
    "PanicChanged",
    "RebuildFailed",
    "RefreshFailed",
    "ReplicaEjected",
    "RetryBudgetExhausted",
    "RetryGivenUp",
    "SheddingStarted",
    "SnapshotIgnored",
    "StateChanged",
    "StepStuck",
    "SwapRolledBack",
}


def name_of(kind: type[Event]) -> str:
    """The event's name: that of its class in snake case, which is stable.

    Examples:
        >>> from seawall import StateChanged
        >>> name_of(StateChanged)
        'seawall.state_changed'
    """
    return "seawall." + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()


def level_of(kind: type[Event]) -> int:
    """How much it matters, as `logging` has it. What comes with many calls under load is DEBUG."""
    if kind.__name__ in _OFTEN:
        return logging.DEBUG
    return logging.WARNING if kind.__name__ in _GRAVE else logging.INFO


def attributes_of(event: Event) -> dict[str, Plain]:
    """The event's fields. Of an exception the type alone: its text may hold what must not be logged."""
    found: dict[str, Plain] = {"seawall.policy.name": event.policy}
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        if field.name in ("policy", "at") or value is None:
            continue
        if isinstance(value, BaseException):
            found["error.type"] = error_type(value)
        else:
            found[f"seawall.{field.name}"] = _plain(value)
    return found


def _plain(value: object) -> Plain:
    if isinstance(value, enum.Enum):
        value = value.value
    return value if isinstance(value, (str, bool, int, float)) else str(value)


def current_trace() -> dict[str, str]:
    """Trace and span id in hex, where a span is current."""
    context = get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
