"""The algorithms of the rate limiter: when may a call of some cost start? Each is told the time and knows no queue."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from typing import Literal, Self

Algorithm = Literal["gcra", "fixed_window", "sliding_window"]
SLOTS = 32  # a sliding window keeps at most so many groups of calls, and two


class Meter:
    """Counts what started, and says when the next may start.

    `arrival`, `early` and `interval` stand here for the hot path of `RateLimiter.enter`, which reads them without
    a call: only a GCRA has an arrival that lets a call in there, and only while nothing bars it.
    """

    __slots__ = ("arrival", "bars", "blocked", "capacity", "early", "interval", "per", "tolerance")

    def __init__(self, per: float, capacity: float, interval: float) -> None:
        self.per = per
        self.capacity = capacity  # what may start at once after a pause, and so the dearest call
        self.interval = interval
        # A clock's readings carry a rounding error; a call that comes when it was told to must get in.
        self.tolerance = min(1e-6, interval / 2)
        self.blocked = -math.inf  # nothing starts before
        self.arrival = math.inf
        self.bars = 0
        self.bar(0)

    def bar(self, reasons: int) -> None:
        """So many more reasons (or fewer) why no call may pass by the hot path."""
        self.bars += reasons
        # Nothing is at most NaN, not even the arrival of a bucket that was never used.
        self.early = math.nan if self.bars else (self.capacity - 1) * self.interval + self.tolerance

    def opens(self, now: float, cost: int) -> float:
        """When a call of this cost may start if nobody else comes; not before `now`."""
        raise NotImplementedError

    def add(self, now: float, cost: int) -> None:
        """A call started now."""
        raise NotImplementedError

    def left(self, now: float) -> float:
        """What could start now."""
        raise NotImplementedError

    def hold(self, cost: int) -> None:
        """What was added last may come back."""

    def settle(self, at: float, now: float, cost: int, actual: int) -> None:
        """What was held at `at` cost `actual`: take back the rest, or charge what is missing."""
        raise NotImplementedError

    def drain(self, now: float, seconds: float | None) -> None:
        """Nothing is left; with `seconds`, the next call may start after so many."""
        raise NotImplementedError

    def adopt(self, fresh: Self, now: float) -> None:
        """Take over the settings of `fresh`, without a gift and without a debt for anybody."""
        raise NotImplementedError

    def copy(self) -> Self:
        """One that goes its own way from here."""
        return copy.copy(self)


class Gcra(Meter):
    """The generic cell rate algorithm (ITU-T I.371): a bucket of `burst` turns that refills evenly, in one float.

    `arrival` is when the bucket would be full again. While something is held, `without` is what `arrival` would be
    if nothing held had ever been added, so giving back lets nobody start who could not have started without it: a
    turn held while the bucket overflowed is worth nothing any more.
    """

    __slots__ = ("held", "without")

    def __init__(self, rate: float, per: float, burst: float) -> None:
        super().__init__(per, burst, per / rate)
        self.arrival = -math.inf
        self.held = 0
        self.without = -math.inf

    @classmethod
    def checked(cls, rate: float, per: float, burst: float | None) -> Self:
        """One with these settings, or an error that says what is wrong with them."""
        _check_speed(rate, per)
        most = max(1.0, float(math.floor(rate))) if burst is None else burst
        if most < 1:
            raise ValueError(f"burst must be 1 or more, or no call could ever start, got {burst!r}")
        if most > 1e12:
            raise ValueError(f"burst must be at most 1e12, got {most:g}{' from the rate' if burst is None else ''}")
        return cls(rate, per, most)

    def opens(self, now: float, cost: int) -> float:
        start = self.arrival - (self.capacity - cost) * self.interval
        return start if start > now else now

    def add(self, now: float, cost: int) -> None:
        self.arrival = max(self.arrival, now) + cost * self.interval
        if self.held:
            self.without = max(self.without, now) + cost * self.interval

    def left(self, now: float) -> float:
        return self.capacity - max(0.0, self.arrival - now) / self.interval

    def hold(self, cost: int) -> None:
        self.without = (self.without if self.held else self.arrival) - cost * self.interval
        self.held += cost
        self.bar(1)

    def settle(self, at: float, now: float, cost: int, actual: int) -> None:
        self.held -= cost
        self.without = min(self.arrival, self.without + min(cost, actual) * self.interval)
        if actual < cost:
            back = self.arrival - (cost - actual) * self.interval
            self.arrival = min(self.arrival, max(back, self.without + self.held * self.interval))
        elif actual > cost:
            self.add(now, actual - cost)
        self.bar(-1)

    def drain(self, now: float, seconds: float | None) -> None:
        if seconds is not None:
            self.blocked = max(self.blocked, now + seconds)
        # One turn then, and the next an interval later.
        empty = now + (self.interval if seconds is None else seconds) + (self.capacity - 1) * self.interval
        self.arrival = max(self.arrival, empty)
        self.without = max(self.without, empty)

    def adopt(self, fresh: Self, now: float) -> None:
        since = max(now, self.blocked)  # a time the callee named stays a time
        self.arrival = self.converted(self.arrival, fresh, since)
        self.without = self.converted(self.without, fresh, since)
        self.per, self.capacity, self.interval = fresh.per, fresh.capacity, fresh.interval
        self.tolerance = fresh.tolerance
        self.bar(0)

    def converted(self, arrival: float, fresh: Gcra, now: float) -> float:
        """`arrival` for the settings of `fresh`. What is in the bucket stays: more burst is no gift, less no debt."""
        left = self.capacity - max(0.0, arrival - now) / self.interval
        return now + (fresh.capacity - left) * fresh.interval


class _Window(Meter):
    """What both windows share: a count of `rate` per window."""

    __slots__ = ()

    def __init__(self, rate: float, per: float) -> None:
        super().__init__(per, rate, per)

    def adopt(self, fresh: Self, now: float) -> None:
        self.per, self.capacity, self.interval = fresh.per, fresh.capacity, fresh.interval
        self.tolerance = fresh.tolerance


class FixedWindow(_Window):
    """`rate` calls in each window; windows follow one another from the first call on."""

    __slots__ = ("start", "used")

    def __init__(self, rate: float, per: float) -> None:
        super().__init__(rate, per)
        self.start = -math.inf
        self.used = 0

    def _roll(self, now: float) -> None:
        if self.start == -math.inf:
            self.start = now
        passed = math.floor((now + self.tolerance - self.start) / self.per)
        if passed > 0:
            self.start += passed * self.per
            self.used = 0

    def opens(self, now: float, cost: int) -> float:
        if self.start == -math.inf:
            return max(now, self.blocked)
        self._roll(now)
        earliest = max(now, self.blocked)
        if self.used + cost > self.capacity:
            return max(earliest, self.start + self.per)
        return earliest

    def add(self, now: float, cost: int) -> None:
        self._roll(now)
        self.used += cost

    def left(self, now: float) -> float:
        if self.blocked > now:
            return 0.0
        if self.start != -math.inf:
            self._roll(now)
        return self.capacity - self.used

    def settle(self, at: float, now: float, cost: int, actual: int) -> None:
        self._roll(now)
        same = at + self.tolerance >= self.start  # an older window is over, and what it left unused with it
        self.used += actual - cost if same else max(0, actual - cost)

    def drain(self, now: float, seconds: float | None) -> None:
        self._roll(now)
        self.blocked = max(self.blocked, self.start + self.per if seconds is None else now + seconds)


class SlidingWindow(_Window):
    """Never more than `rate` calls in any `per` seconds, wherever one looks.

    Calls that start within `per / SLOTS` of the first of a group are kept as one group and leave the window
    together, `per` after the last of them. So it never admits too many, a turn comes back at most `per / SLOTS`
    (3 %) late, and time and memory stay the same at any rate.
    """

    __slots__ = ("groups", "total")

    def __init__(self, rate: float, per: float) -> None:
        super().__init__(rate, per)
        self.groups: deque[tuple[float, float, int]] = deque()  # of calls: when the first and last started, how many
        self.total = 0

    def _expire(self, now: float) -> None:
        while self.groups and self.groups[0][1] + self.per <= now + self.tolerance:
            self.total -= self.groups.popleft()[2]

    def opens(self, now: float, cost: int) -> float:
        self._expire(now)
        earliest = max(now, self.blocked)
        excess = self.total + cost - self.capacity
        if excess <= 0:
            return earliest
        for _, last, count in self.groups:
            excess -= count
            if excess <= 0:
                return max(earliest, last + self.per)
        return earliest

    def add(self, now: float, cost: int) -> None:
        self._expire(now)
        self.total += cost
        if self.groups and now - self.groups[-1][0] < self.per / SLOTS:
            first, _, count = self.groups.pop()
            self.groups.append((first, now, count + cost))
        else:
            self.groups.append((now, now, cost))

    def left(self, now: float) -> float:
        self._expire(now)
        return 0.0 if self.blocked > now else self.capacity - self.total

    def settle(self, at: float, now: float, cost: int, actual: int) -> None:
        if actual > cost:
            self.add(now, actual - cost)
            return
        for index, (first, last, count) in enumerate(self.groups):
            if first <= at <= last:
                self.groups[index] = (first, last, count - cost + actual)
                self.total -= cost - actual
                return

    def drain(self, now: float, seconds: float | None) -> None:
        if seconds is not None:
            self.blocked = max(self.blocked, now + seconds)
        elif (left := math.floor(self.left(now))) > 0:
            self.add(now, left)

    def copy(self) -> Self:
        twin = copy.copy(self)
        twin.groups = self.groups.copy()
        return twin


def _check_speed(rate: float, per: float) -> None:
    if not 1e-9 <= rate / per <= 1e9:
        raise ValueError(f"rate and per must make between 1e-9 and 1e9 calls a second, got {rate!r} per {per!r} s")


def metered(algorithm: object, rate: float, per: float, burst: float | None) -> Meter:
    """The meter for these settings, or an error that says what is wrong with them."""
    if algorithm == "gcra":
        return Gcra.checked(rate, per, burst)
    window = WINDOWS.get(algorithm) if isinstance(algorithm, str) else None
    if window is None:
        raise ValueError(f"algorithm must be 'gcra', {' or '.join(map(repr, WINDOWS))}, got {algorithm!r}")
    if burst is not None:
        raise ValueError(f"burst is for algorithm='gcra', a {algorithm} lets `rate` calls start at once; got {burst!r}")
    _check_speed(rate, per)
    if not 1 <= rate <= 1e12:
        raise ValueError(f"rate must be in 1 to 1e12 for a window, or no call could start, got {rate!r}")
    return window(rate, per)


WINDOWS: dict[str, Callable[[float, float], Meter]] = {
    "fixed_window": FixedWindow,
    "sliding_window": SlidingWindow,
}
