"""Bulkhead: at most so many calls at once, so that one slow dependency can't take every task and thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from seawall.core import checks
from seawall.core.errors import Rejected
from seawall.core.events import Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token, Wait


class BulkheadFullError(Rejected):
    """Every place is taken and the queue is full, or no place came free within the wait."""

    reason = "is full"


@dataclass(frozen=True, slots=True)
class BulkheadSnapshot:
    """A bulkhead at one moment. Counters only grow."""

    active: int
    waiting: int
    limit: int
    finished: int
    rejections: int


class _Waiting(Wait):
    """A place in the queue. `granted` once the place of a call that ended was handed over."""

    def __init__(self, bulkhead: Bulkhead, until: float) -> None:
        super().__init__(until)
        self.bulkhead = bulkhead
        self.granted = False

    def resume(self, now: float) -> Token:
        if self.granted:
            return None
        if now < self.until:
            raise self
        self.bulkhead._waiting.pop(self, None)
        raise self.refuse(now)

    def abandon(self, now: float) -> None:
        self.bulkhead._waiting.pop(self, None)
        if self.granted:
            self.granted = False
            self.bulkhead._hand_over()

    def refuse(self, now: float) -> Rejected:
        return self.bulkhead._refused(BulkheadFullError(self.bulkhead.name), now)


class Bulkhead(GuardPolicy):
    """Lets `max_concurrent` calls run at once; up to `max_queued` more wait, first come first served.

    A call that ends hands its place straight to the one that has waited longest, so a newcomer never overtakes
    and only one waiter wakes. One bulkhead may serve several event loops and threads at once.

    Args:
        name: labels errors, metrics and logs.
        max_concurrent: calls that run at once.
        max_queued: calls that may wait for a place; 0 refuses at once when full.
        max_wait: seconds a call waits at most; `math.inf` for ever.
        listeners: called with its `CallRejected` events.

    Raises:
        BulkheadFullError: from a guarded call that finds no place. A plain function on a thread that runs an
            event loop never waits (it would block the loop): it is refused at once.

    >>> reports = Bulkhead("reports", max_concurrent=2, max_queued=8, max_wait=0.5)
    >>> with reports.scope():
    ...     print(reports.snapshot().active)
    1
    """

    kind = "bulkhead"

    def __init__(
        self,
        name: str,
        *,
        max_concurrent: int,
        max_queued: int = 0,
        max_wait: float | timedelta = 1.0,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.max_concurrent = checks.count("max_concurrent", max_concurrent)
        self.max_queued = checks.count("max_queued", max_queued, least=0)
        self.max_wait = checks.seconds("max_wait", max_wait, zero=True, infinite=True)
        self._active = 0
        self._finished = 0
        self._waiting: OrderedDict[_Waiting, None] = OrderedDict()  # first come first served, O(1) to leave
        self._register()

    def enter(self, now: float) -> Token:
        """Take a place, or queue for one, or raise `BulkheadFullError`."""
        if self._active < self.max_concurrent:
            self._active += 1
            return None
        if len(self._waiting) >= self.max_queued or not self.max_wait:
            raise self._refused(BulkheadFullError(self.name), now)
        wait = _Waiting(self, now + self.max_wait)
        self._waiting[wait] = None
        raise wait

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Hand the place to the next in the queue."""
        self._finished += 1
        if self._waiting:
            self._hand_over()
        else:
            self._active -= 1

    def _hand_over(self) -> None:
        while self._waiting:
            wait, _ = self._waiting.popitem(last=False)
            wait.granted = True
            if wait.wake():
                return
            wait.granted = False  # its event loop is gone; the next one has it
        self._active -= 1

    def snapshot(self) -> BulkheadSnapshot:
        """Places and queue at one moment."""
        with self._lock:
            return BulkheadSnapshot(
                active=self._active,
                waiting=len(self._waiting),
                limit=self.max_concurrent,
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
