"""Bulkhead: at most so many calls at once, so that one slow dependency can't take every task and thread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from seawall.core import checks
from seawall.core.events import Listener
from seawall.core.places import BulkheadFullError, Places

__all__ = ["Bulkhead", "BulkheadFullError", "BulkheadSnapshot"]


MOST = 10**12  # places; a gauge is a float


@dataclass(frozen=True, slots=True)
class BulkheadSnapshot:
    """A bulkhead at one moment: places taken, calls in the queue, places there are. Counters only grow."""

    active: int
    waiting: int
    limit: int
    finished: int
    rejections: int


class Bulkhead(Places):
    """Lets `max_concurrent` calls run at once; up to `max_queued` more wait, first come first served.

    A call that ends hands its place straight to the one that has waited longest, so a newcomer never overtakes
    and only one waiter wakes. Calls of higher `priority` go first, but waiting counts too (`aging`), so nobody
    starves. One bulkhead may serve several event loops and threads at once.

    Args:
        name: labels errors, metrics and logs.
        max_concurrent: calls that run at once; or places, where calls take several (`costing`).
        max_queued: calls that may wait for a place; 0 refuses at once when full. When the queue is full too, a
            newcomer displaces the waiter that would be served last, if that would be after itself.
        max_wait: seconds a call waits at most; `math.inf` for ever. Never past the deadline the call runs under.
        aging: seconds of waiting that are worth one level of priority. 0 serves in the order of arrival,
            `math.inf` strictly by priority, so that the lowest may starve.
        listeners: called with its `CallRejected` events.

    Raises:
        BulkheadFullError: from a guarded call that finds no place. A plain function on a thread that runs an
            event loop never waits (it would block the loop): it is refused at once.

    Examples:
        >>> reports = Bulkhead("reports", max_concurrent=2, max_queued=8, max_wait=0.5)
        >>> with reports.scope():
        ...     print(reports.snapshot().active)
        1
    """

    __slots__ = ()
    kind = "bulkhead"

    def __init__(
        self,
        name: str,
        *,
        max_concurrent: int,
        max_queued: int = 0,
        max_wait: float | timedelta = 1.0,
        aging: float | timedelta = 1.0,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(
            name,
            listeners,
            limit=_places(max_concurrent),
            max_queued=checks.count("max_queued", max_queued, least=0),
            max_wait=checks.seconds("max_wait", max_wait, zero=True, infinite=True),
            aging=checks.seconds("aging", aging, zero=True, infinite=True),
        )
        self._register()

    @property
    def max_concurrent(self) -> int:
        """Calls, or places, at once."""
        return self.limit

    def _adopt(self, fresh: Self, now: float) -> None:
        self._set_queue(fresh.max_queued, fresh.max_wait, fresh.aging)
        self.resize(fresh.limit, now)

    def snapshot(self) -> BulkheadSnapshot:
        """Places and queue at one moment."""
        with self._lock:
            return BulkheadSnapshot(
                active=self._active,
                waiting=self._queued,
                limit=self.limit,
                finished=self._finished,
                rejections=self._rejections,
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {"finished": snapshot.finished, "rejected": snapshot.rejections}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        return {"active": snapshot.active, "waiting": snapshot.waiting, "limit": snapshot.limit}


def _places(max_concurrent: int) -> int:
    if checks.count("max_concurrent", max_concurrent) > MOST:
        raise ValueError(f"max_concurrent must be {MOST} or less, got {max_concurrent!r}")
    return max_concurrent
