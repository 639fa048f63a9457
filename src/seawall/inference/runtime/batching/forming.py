"""Which requests run next, and together. Pure: it is told the time, and holds no lock and no thread."""

from __future__ import annotations

import math
from typing import Generic, Protocol, TypeVar

from .joining import Shape


class Waits(Protocol):
    """What of a request counts here."""

    @property
    def shape(self) -> Shape: ...  # noqa: D102
    @property
    def arrived(self) -> float: ...  # noqa: D102
    @property
    def patience(self) -> float: ...  # noqa: D102 - seconds that it waits for others at most


R = TypeVar("R", bound=Waits)


class Group(Generic[R]):
    """Waiting requests that fit together, in the order they came."""

    __slots__ = ("padded", "requests", "rows")

    def __init__(self, padded: int) -> None:
        self.padded = padded
        self.requests: dict[R, None] = {}
        self.rows = 0


class Waiting(Generic[R]):
    """The requests that wait for a batch, first come first served.

    A batch is due once its group holds all that fits in one, or its oldest request has waited as long as it may:
    its patience, and `max_delay` at most.
    Of the batches that are due the one whose oldest request came first is taken, so a stream of full batches
    cannot hold up a request of another shape for longer than that.
    """

    def __init__(self, *, max_size: int, max_delay: float, max_tokens: int | None) -> None:
        self.max_size = max_size
        self.max_delay = max_delay
        self.max_tokens = max_tokens
        self.rows = 0
        self.requests = 0
        self._groups: dict[tuple[object, ...], Group[R]] = {}

    def most_rows(self, padded: int) -> int:
        """Rows of one batch whose rows have `padded` positions; 0 where not even one fits."""
        return self.max_size if self.max_tokens is None else min(self.max_size, self.max_tokens // padded)

    def add(self, request: R) -> bool:
        """Take a request in; True where that makes a batch due, or due earlier than any was before."""
        shape = request.shape
        group = self._groups.get(shape.key)
        first = group is None
        if group is None:
            group = self._groups[shape.key] = Group(shape.padded)
        group.requests[request] = None
        group.rows += shape.rows
        self.rows += shape.rows
        self.requests += 1
        return (first and len(self._groups) == 1) or self._full(group)

    def discard(self, request: R) -> None:
        """The request is gone."""
        group = self._groups[request.shape.key]
        del group.requests[request]
        group.rows -= request.shape.rows
        self.rows -= request.shape.rows
        self.requests -= 1
        if not group.requests:
            del self._groups[request.shape.key]

    def all(self) -> list[R]:
        """All that wait."""
        return [request for group in self._groups.values() for request in group.requests]

    def due(self) -> float:
        """When the next batch is due; infinity where nothing waits."""
        return min((self._due(group) for group in self._groups.values()), default=math.inf)

    def take(self, now: float) -> list[R]:
        """The requests of the batch that is due, which wait no longer; none where none is."""
        ready = [group for group in self._groups.values() if self._due(group) <= now]
        if not ready:
            return []
        group = min(ready, key=lambda group: next(iter(group.requests)).arrived)
        room = self.most_rows(group.padded)
        taken: list[R] = []
        for request in group.requests:
            room -= request.shape.rows
            if room < 0:
                break
            taken.append(request)
        for request in taken:
            self.discard(request)
        return taken

    def _full(self, group: Group[R]) -> bool:
        return group.rows >= self.most_rows(group.padded)

    def _due(self, group: Group[R]) -> float:
        if self._full(group):
            return -math.inf
        oldest = next(iter(group.requests))
        return oldest.arrived + min(oldest.patience, self.max_delay)
