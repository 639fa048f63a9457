"""The line in front of a meter: who waits for a turn, first come first served."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Protocol

from seawall.core.errors import Rejected
from seawall.core.protocol import Token, Wait
from seawall.policies.rate_limiter._meters import Meter

PATIENCE = 1.0  # seconds: how long the first in line may fail to come before the others go past it


class Limited(Protocol):
    """What a refusal says of a limiter."""

    name: str
    rate: float
    per: float


class RateLimitedError(Rejected):
    """The rate is used up. `retry_after` is exact: a call then is let in if nobody else comes first.

    Attributes:
        rate: calls that the limiter lets start per period.
        per: seconds of the period.
        key: whose rate it was, where there is one per key.
    """

    reason = "is over its rate"
    rate: float | None = None
    per: float | None = None
    key: Hashable | None = None

    @classmethod
    def of(cls, limiter: Limited, retry_after: float | None, key: Hashable | None = None) -> RateLimitedError:
        """The error of a call that `limiter` refuses."""
        error = cls(limiter.name, retry_after)
        error.rate, error.per, error.key = limiter.rate, limiter.per, key
        return error


class Waiting(Wait):
    """A place in the line. It wakes by itself when its turn was to come, and when it comes earlier."""

    def __init__(self, line: Line, cost: int, since: float, deadline: float) -> None:
        super().__init__()
        self.line = line
        self.cost = cost
        self.since = since
        self.deadline = deadline  # of the call, from its context
        self.limit = deadline  # when it gives up
        self.passed = False  # it did not come when it was due

    def resume(self, now: float) -> Token:
        return self.line.resume(self, now)

    def abandon(self, now: float) -> None:
        self.line.leave(self, now)

    def seconds(self, now: float) -> float | None:
        """For a call like this one, if it came now: until it would start. None: never, for it costs too much."""
        return self.line.starts(now, self.cost) - now if self.cost <= self.line.meter.capacity else None

    def let_in(self, now: float) -> Token:
        """The turn has come: take it from the meter."""
        raise NotImplementedError


class Line:
    """First come, first served: a newcomer never overtakes, whatever it costs.

    Each waiting call knows when it will start, and sleeps until then. Whoever leaves early calls the next one if
    that may now start sooner; the others learn it when they are first. So a change costs one wake-up, not all.
    """

    __slots__ = ("_behind", "_last", "_started", "meter", "waiting")

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.waiting: OrderedDict[Waiting, None] = OrderedDict()
        self._behind: Meter | None = None  # the meter as it will be when all who wait have started
        self._last = -math.inf  # when the last of them will
        self._started = 0  # calls from the line since that was worked out

    def starts(self, now: float, cost: int) -> float:
        """When a call that comes now will start, behind all who wait."""
        if self.waiting:
            self._pass_over(now)
        if not self.waiting:
            return self.meter.opens(now, cost)
        if self._behind is None:
            self._behind, self._last = self.meter.copy(), now
            self._started = 0
            for wait in self.waiting:
                self._last = self._behind.opens(self._last, wait.cost)
                self._behind.add(self._last, wait.cost)
        return self._behind.opens(max(now, self._last), cost)

    def join(self, wait: Waiting, now: float, max_wait: float) -> Waiting:
        """Queue; whoever could not start in time has been refused."""
        wait.limit = min(now + max_wait, wait.deadline)
        wait.until = self._last = self.starts(now, wait.cost)
        if self._behind is None:
            self._behind, self._started = self.meter.copy(), 0
        self._behind.add(wait.until, wait.cost)
        self._add(wait)
        return wait

    def resume(self, wait: Waiting, now: float) -> Token:
        """Let `wait` start if it is first and its turn has come."""
        if wait.passed:
            wait.passed = False
            self._add(wait)
            self.waiting.move_to_end(wait, last=False)
            self._behind = None
        elif wait not in self.waiting:  # `replan` took it out
            raise wait.refuse(now)
        self._pass_over(now, wait)
        first = next(iter(self.waiting)) is wait
        if not first and now + self.meter.tolerance < wait.until:
            raise wait
        start = self._start_of(wait, now)
        if start - now <= self.meter.tolerance:
            if first:
                return self._start(wait, now)
            wait.until = now + PATIENCE  # those before it are due too, and the last of them will call it
        elif start - wait.limit > self.meter.tolerance:
            self.leave(wait, now)
            raise wait.refuse(now)
        else:
            wait.until = start
        raise wait

    def _start(self, wait: Waiting, now: float) -> Token:
        behind, started = self._behind, self._started + 1
        self._remove(wait)
        if started <= len(self.waiting):  # starting late moves the others on, so look again now and then
            self._behind, self._started = behind, started
        token = wait.let_in(now)
        self.call_next(now)
        return token

    def _start_of(self, wait: Waiting, now: float) -> float:
        """When `wait` will start if everybody before it does as soon as it may."""
        if next(iter(self.waiting)) is wait:
            return self.meter.opens(now, wait.cost)
        meter, start = self.meter.copy(), now
        for one in self.waiting:
            start = meter.opens(start, one.cost)
            if one is wait:
                break
            meter.add(start, one.cost)
        return start

    def leave(self, wait: Waiting, now: float) -> None:
        """`wait` will not start: everybody behind it moves up."""
        if wait not in self.waiting:
            return
        first = next(iter(self.waiting)) is wait
        self._remove(wait)
        if first:
            self.call_next(now)

    def call_next(self, now: float) -> None:
        """Wake the first in line if it may start before it wakes by itself."""
        while self.waiting:
            head = next(iter(self.waiting))
            if head.until <= self.meter.opens(now, head.cost) + self.meter.tolerance or head.wake():
                return
            self._remove(head)

    def _pass_over(self, now: float, wait: Waiting | None = None) -> None:
        """Let nobody wait for a head that was due and does not come: its event loop is closed, or hangs."""
        gone = False
        while self.waiting and (head := next(iter(self.waiting))) is not wait and head.until <= now:
            if head.wake():
                if now - head.until < PATIENCE:
                    break
                head.passed = True  # if it comes after all, it is first again
            self._remove(head)
            gone = True
        if gone:
            self.call_next(now)

    def _add(self, wait: Waiting) -> None:
        if not self.waiting:
            self.meter.bar(1)  # newcomers must ask here
        self.waiting[wait] = None

    def _remove(self, wait: Waiting) -> None:
        del self.waiting[wait]
        self._behind = None
        if not self.waiting:
            self.meter.bar(-1)

    def changed(self, now: float) -> None:
        """Turns came back, or more were charged: whoever is first learns it now, the others in their turn."""
        self._behind = None
        self.call_next(now)

    def allow(self, max_wait: float, now: float) -> None:
        """The meter, and how long a call may wait, have new settings."""
        for wait in self.waiting:
            wait.limit = min(wait.since + max_wait, wait.deadline)
        self.replan(now)

    def replan(self, now: float) -> None:
        """Turns were taken away: whoever can't start in time any more is refused now."""
        self._behind = None
        meter, start = self.meter.copy(), now
        for wait in list(self.waiting):
            start_of_this = meter.opens(start, wait.cost) if wait.cost <= meter.capacity else math.inf
            if start_of_this - wait.limit > meter.tolerance:
                self._remove(wait)
                wait.wake()  # to find itself gone
                continue
            start = start_of_this
            meter.add(start, wait.cost)
            wait.until = max(wait.until, start)
        self.call_next(now)
