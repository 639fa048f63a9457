"""Rate limiter: so many calls per period, with a burst, in two floats (GCRA)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from seawall.core import checks
from seawall.core.errors import Rejected
from seawall.core.events import Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token, Wait


class RateLimitedError(Rejected):
    """The rate is used up. `retry_after` is exact: a call then is let in if nobody else comes first."""

    reason = "is over its rate"


@dataclass(frozen=True, slots=True)
class LimiterSnapshot:
    """A limiter at one moment: `available` calls could start now. Counters only grow."""

    available: int
    waiting: int
    admitted: int
    rejections: int


class _Waiting(Wait):
    """A place in the queue. Only the head has a time to wake at; each that leaves calls the next."""

    def __init__(self, limiter: RateLimiter) -> None:
        super().__init__()
        self.limiter = limiter

    def resume(self, now: float) -> Token:
        return self.limiter._resume(self, now)

    def abandon(self, now: float) -> None:
        self.limiter._leave_queue(self)

    def refuse(self, now: float) -> Rejected:
        return self.limiter._refused(RateLimitedError(self.limiter.name, self.limiter._expected(now)), now)


class RateLimiter(GuardPolicy):
    """Lets `rate` calls start per `per` seconds, and up to `burst` of them at once after a pause.

    The generic cell rate algorithm (ITU-T I.371): each call moves a theoretical arrival time on by `per / rate`,
    and may come as much as a burst early. So two floats are all the state, however high the rate, and
    `retry_after` is exact. Callers may wait up to `max_wait` seconds, in order; one that could not be served in
    time is refused at once, and one that is cancelled moves everybody behind it up.

    Args:
        name: labels errors, metrics and logs.
        rate: calls per period; may be a fraction.
        per: seconds of the period.
        burst: calls that may start together after a pause; the rate, rounded down, unless told.
        max_wait: seconds a call may wait for its turn; 0 refuses at once.
        listeners: called with its `CallRejected` events.

    Raises:
        RateLimitedError: from a guarded call over the rate.

    >>> search = RateLimiter("search", rate=10, burst=2)
    >>> search.snapshot().available
    2
    """

    kind = "limiter"

    def __init__(
        self,
        name: str,
        *,
        rate: float,
        per: float | timedelta = 1.0,
        burst: float | None = None,
        max_wait: float | timedelta = 0.0,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.rate = checks.positive("rate", rate)
        self.per = checks.seconds("per", per)
        self.burst = max(1.0, math.floor(self.rate)) if burst is None else checks.positive("burst", burst)
        if self.burst < 1:
            raise ValueError(f"burst must be 1 or more, or no call could ever start, got {burst!r}")
        self.max_wait = checks.seconds("max_wait", max_wait, zero=True, infinite=True)
        self._interval = self.per / self.rate
        # A clock's readings carry a rounding error; a call that comes when it was told to must get in.
        self._early = (self.burst - 1) * self._interval + min(1e-6, self._interval / 2)
        self._arrival = -math.inf  # theoretical arrival time of the next call
        self._admitted = 0
        self._waiting: OrderedDict[_Waiting, None] = OrderedDict()
        self._register()

    def enter(self, now: float) -> Token:
        """Take a turn, or queue for one, or raise `RateLimitedError`."""
        arrival = self._arrival
        if arrival - now <= self._early and not self._waiting:
            self._arrival = (arrival if arrival > now else now) + self._interval
            self._admitted += 1
            return None
        while self._waiting and (head := next(iter(self._waiting))).until <= now and not head.wake():
            del self._waiting[head]  # overdue, and its event loop is gone
        expected = self._expected(now)
        if expected > self.max_wait:
            raise self._refused(RateLimitedError(self.name, expected), now)
        wait = _Waiting(self)
        self._waiting[wait] = None
        if len(self._waiting) == 1:
            wait.until = now + expected
        raise wait

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Nothing: a call that started has used its turn, however it ended."""

    def _expected(self, now: float) -> float:
        """Seconds until a call that came now would start."""
        return max(0.0, self._arrival + len(self._waiting) * self._interval - self._slack() - now)

    def _slack(self) -> float:
        return (self.burst - 1) * self._interval

    def _resume(self, wait: _Waiting, now: float) -> Token:
        if wait not in self._waiting or next(iter(self._waiting)) is not wait:
            raise wait
        if self._arrival - now > self._early:
            wait.until = self._arrival - self._slack()
            raise wait
        self._arrival = max(self._arrival, now) + self._interval
        self._admitted += 1
        self._leave_queue(wait)
        return None

    def _leave_queue(self, wait: _Waiting) -> None:
        """Take `wait` out; if it was the head, the next one finds out its time."""
        if wait not in self._waiting:
            return
        head = next(iter(self._waiting)) is wait
        del self._waiting[wait]
        while head and self._waiting:
            after = next(iter(self._waiting))
            if after.wake():
                return
            del self._waiting[after]  # its event loop is gone

    def snapshot(self) -> LimiterSnapshot:
        """Turns and queue at one moment."""
        with self._lock:
            ahead = max(0.0, self._arrival - self._now())
            available = self.burst - ahead / self._interval + 1e-9
            return LimiterSnapshot(
                available=0 if self._waiting else max(0, math.floor(available)),
                waiting=len(self._waiting),
                admitted=self._admitted,
                rejections=self._rejections,
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {"admitted": snapshot.admitted, "rejected": snapshot.rejections}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        return {"available": snapshot.available, "waiting": snapshot.waiting}
