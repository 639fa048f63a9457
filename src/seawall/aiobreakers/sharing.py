"""What one breaker of ours and a storage of theirs tell each other."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import aiobreaker
from aiobreaker.storage.base import CircuitBreakerStorage

from seawall.aiobreakers.view import LONGEST, Theirs, opened_at, timeout_of, utcnow
from seawall.core.events import logger
from seawall.policies.circuit_breaker import CircuitBreaker, State
from seawall.policies.circuit_breaker.calls import Outcome

T = TypeVar("T")
_OPENED = (State.OPEN, State.HALF_OPEN)
_AT_ONCE = math.ulp(0.0)  # seconds: more than none, but too few to move a clock


class News(NamedTuple):
    """What a storage said: its state, what it was before, and the seconds that an open circuit has left."""

    state: aiobreaker.CircuitBreakerState
    before: aiobreaker.CircuitBreakerState | None
    left: float


class Shared:
    """One breaker's part in a storage.

    `look`, `tell` and `publish` do I/O, one at a time; they change nothing of the breaker, so they may run in any
    thread. `heed` and `trips` act on what they found, in the caller's.
    """

    def __init__(self, breaker: CircuitBreaker, storage: CircuitBreakerStorage) -> None:
        self._breaker = breaker
        self._storage = storage
        self._one_at_a_time = threading.Lock()
        self._known: aiobreaker.CircuitBreakerState | None = None  # the storage's state, as last read or written
        self._opened = breaker.snapshot().opened  # how often ours opened, as far as the storage knows or caused it
        self._closed = False  # ours did, and the storage may not know

    def changed(self, state: State) -> None:
        """Our breaker is in a new state."""
        if state is State.CLOSED:
            self._closed = True

    def look(self) -> News | None:
        """Ask the storage; None where it failed."""
        return self._alone(self._look)

    def tell(self, outcome: Outcome, opened: int) -> int | None:
        """Count a call that began when ours had opened `opened` times. The failures in a row of all who share."""
        return self._alone(self._tell, outcome, opened)

    def publish(self) -> None:
        """Tell the storage what ours did."""
        self._alone(self._publish)

    def _alone(self, work: Callable[..., T], *arguments: object) -> T | None:
        try:
            with self._one_at_a_time:
                return work(*arguments)
        except Exception:
            logger.exception("the storage of breaker %r failed; the call goes on without it", self._breaker.name)
            return None

    def _look(self) -> News:
        self._publish()
        state, before, left = self._storage.state, self._known, 0.0
        if state is Theirs.OPEN and (opened := self._storage.opened_at) is not None:
            timeout = timeout_of(self._breaker)
            # No longer than the timeout, however their wall clocks differ from ours.
            left = min(timeout, max(0.0, timeout - (utcnow() - opened).total_seconds()))
        self._known = state
        return News(state, before, left)

    def _tell(self, outcome: Outcome, opened: int) -> int | None:
        failures = None
        now = self._breaker.snapshot()
        if now.state is State.CLOSED and now.opened == opened:
            if outcome is Outcome.FAILURE:
                self._storage.increment_counter()
                failures = int(self._storage.counter)
            else:
                self._storage.reset_counter()
        self._publish()
        return failures

    def heed(self, news: News | None) -> None:
        """Open or close our breaker because others did."""
        if news is None:
            return
        now = self._breaker.snapshot()
        if news.state is Theirs.OPEN:
            due = now.state is State.HALF_OPEN or (now.state is State.OPEN and not now.retry_after)
            if now.state is State.CLOSED or (due and news.left > 0):
                self._opened += 1  # before it does: nobody should take it for news
                self._breaker.force_open(news.left or _AT_ONCE)
        elif news.state is Theirs.CLOSED and news.before is not Theirs.CLOSED and now.state in _OPENED:
            self._breaker.force_closed()

    def trips(self, failures: int | None) -> bool:
        """Open ours if all who share have failed often enough; whether it did."""
        most = self._breaker.consecutive_failures
        if failures is None or most is None or failures < most or self._breaker.state is not State.CLOSED:
            return False
        self._breaker.force_open()
        return True

    def _publish(self) -> None:
        now = self._breaker.snapshot()
        if now.opened > self._opened:
            self._opened = now.opened
            if now.state is State.OPEN:
                left = LONGEST if now.retry_after is None else now.retry_after
                self._storage.opened_at = opened_at(self._breaker, left)
                self._storage.state = self._known = Theirs.OPEN
        if self._closed and now.state is State.CLOSED:
            self._closed = False
            if self._known is not Theirs.CLOSED:
                self._storage.state = self._known = Theirs.CLOSED
                self._storage.reset_counter()
