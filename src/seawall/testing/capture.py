"""What policies said while a block ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, overload

from seawall.core.events import Event, listen

E = TypeVar("E", bound=Event)


@overload
def capture_events(*, policy: str | None = None) -> AbstractContextManager[list[Event]]: ...
@overload
def capture_events(*kinds: type[E], policy: str | None = None) -> AbstractContextManager[list[E]]: ...
def capture_events(*kinds: Any, policy: str | None = None) -> AbstractContextManager[list[Any]]:
    """Collect the events of a block, from every thread and loop, in the order they happened.

    Args:
        kinds: only these classes of events; all of them unless told.
        policy: only those of policies with this name.

    Examples:
        >>> from seawall import CircuitBreaker, StateChanged
        >>> bank = CircuitBreaker("bank", consecutive_failures=1)
        >>> with capture_events(StateChanged, policy="bank") as events:
        ...     bank.admit().failure(ConnectionError())
        >>> events[0].after.value
        'open'
    """
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, Event)):
            raise TypeError(f"capture_events takes classes of events, such as StateChanged, not {kind!r}")
    return _captured(kinds or (Event,), policy)


@contextmanager
def _captured(kinds: tuple[type[Event], ...], policy: str | None) -> Iterator[list[Event]]:
    events: list[Event] = []

    def hear(event: Event) -> None:
        if isinstance(event, kinds) and (policy is None or event.policy == policy):
            events.append(event)  # one delivers at a time, so nothing is torn

    stop = listen(hear)
    try:
        yield events
    finally:
        stop()
