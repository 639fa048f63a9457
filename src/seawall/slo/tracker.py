"""Good and bad calls over a rolling window, in a fixed amount of memory. Pure, and told the time."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from seawall.slo.windows import HOUR, pairs_for

_NEVER = -math.inf


class Ring:
    """What good and bad calls were counted when each of the last `slots` slots began.

    Like `core.counts.RollingWindow`, in 16 bytes a slot: an objective has 1,368 of them, which as tuples would take
    150 kB. Marks before the process began are negative: history of an earlier one.
    """

    __slots__ = ("_marks", "_newest", "seconds", "slot", "slots", "turns_at")

    def __init__(self, seconds: float, slots: int) -> None:
        self.seconds = seconds
        self.slots = slots
        self.slot = seconds / slots
        self.turns_at = _NEVER  # when the slot in progress ends
        self._newest = 0  # number of the slot in progress, counted from the clock's zero
        self._marks = array("q", bytes(16 * slots))

    def _number(self, now: float) -> int:
        number = math.floor(now / self.slot)
        return number + 1 if now >= (number + 1) * self.slot else number  # the division may round down

    def turn(self, now: float, counts: Sequence[int]) -> None:
        """Begin the slot `now` lies in; slots that passed without a call began with the same counts."""
        current = self._number(now)
        oldest = current - self.slots + 1
        if self.turns_at != _NEVER:
            if current <= self._newest:  # the clock went back
                return
            oldest = max(oldest, self._newest + 1)
        for number in range(oldest, current + 1):
            place = 2 * (number % self.slots)
            self._marks[place], self._marks[place + 1] = counts
        self._newest = current
        self.turns_at = (current + 1) * self.slot

    def since(self, now: float, counts: Sequence[int], seconds: float) -> tuple[int, int]:
        """How many good and bad calls the last `seconds` had; right to within a slot."""
        back = min(self.slots, max(1, math.ceil(seconds / self.slot - 1e-9)))
        oldest = self._number(now) - back + 1
        if self.turns_at == _NEVER or oldest > self._newest:
            return 0, 0
        place = 2 * (max(oldest, self._newest - self.slots + 1) % self.slots)
        return counts[0] - self._marks[place], counts[1] - self._marks[place + 1]

    def left_after(self, now: float, counts: Sequence[int], slots: int) -> tuple[int, int]:
        """Of the calls in the ring now, those that are still in it `slots` slots later."""
        oldest = self._number(now) - self.slots + 1 + slots
        if self.turns_at == _NEVER or oldest > self._newest:
            return 0, 0
        place = 2 * (max(oldest, self._newest - self.slots + 1) % self.slots)
        return counts[0] - self._marks[place], counts[1] - self._marks[place + 1]

    def copy(self) -> Ring:
        """One that stays as this is now."""
        ring = object.__new__(Ring)
        ring.seconds, ring.slots, ring.slot, ring.turns_at = self.seconds, self.slots, self.slot, self.turns_at
        ring._newest, ring._marks = self._newest, self._marks[:]
        return ring

    def growth(self, counts: Sequence[int]) -> list[list[int]]:
        """Good and bad calls of each slot, oldest first; nothing before the first turn."""
        if self.turns_at == _NEVER:
            return []
        numbers = range(self._newest - self.slots + 1, self._newest + 1)
        marks = [self._marks[2 * (n % self.slots) : 2 * (n % self.slots) + 2].tolist() for n in numbers]
        ends = [*marks[1:], counts]
        return [[end[0] - mark[0], end[1] - mark[1]] for mark, end in zip(marks, ends, strict=True)]

    def phase(self, now: float) -> float:
        """Seconds since the newest slot began."""
        return max(0.0, now - self._newest * self.slot) if self.turns_at != _NEVER else 0.0

    def add_history(self, now: float, growth: Sequence[Sequence[int]], began: float) -> None:
        """Add what an earlier process counted: `growth`, whose newest slot began at `began`. Turn first.

        Slots of two processes do not begin at the same moments, so history gets up to a slot younger.
        """
        newest = min(self._newest, math.ceil(began / self.slot - 1e-9))
        good = bad = 0
        for number in range(newest, self._newest - self.slots, -1):
            index = len(growth) - 1 - (newest - number)
            if index >= 0:
                good, bad = good + growth[index][0], bad + growth[index][1]
            place = 2 * (number % self.slots)
            self._marks[place] -= good
            self._marks[place + 1] -= bad


@dataclass(frozen=True, slots=True)
class RingState:
    """A ring at one moment, apart from its clock: good and bad calls of each slot, and the age of the newest."""

    slot: float
    phase: float
    growth: list[list[int]]


@dataclass(frozen=True, slots=True)
class TrackerState:
    """A tracker at one moment, apart from its clock. `covered` seconds of the window were observed."""

    window: float
    covered: float
    rings: list[RingState]


class BudgetTracker:
    """Counts good and bad calls and looks back over them: how much of the error budget is gone, and how fast it goes.

    Three rings, of the shortest pairs of look backs (360 slots of 10 s for an objective over a month), of the middle
    ones (288 of 5 min) and of the window (720 of an hour): 24 kB. A call costs one comparison and one addition; a look
    back is right to within a slot of its ring.

    Args:
        window: seconds over which the budget is reckoned.

    Examples:
        >>> tracker = BudgetTracker(30 * 86400.0)
        >>> for second in range(100):
        ...     tracker.add(float(second), bad=second % 50 == 0)
        >>> tracker.since(99.0, 3600.0), round(tracker.burn_rate(99.0, 3600.0, tolerated=0.001), 6)
        ((98, 2), 20.0)
    """

    __slots__ = ("_rings", "began", "counts", "turns_at", "window")

    def __init__(self, window: float) -> None:
        self.window = window
        self.counts = [0, 0]  # good and bad, of this process, since ever
        pairs = pairs_for(window)
        self._rings: tuple[Ring, ...] = (Ring(pairs[0].long, 360), Ring(pairs[2].long, 288), Ring(window, 720))
        self.turns_at = _NEVER
        self.began = math.inf  # when it began to observe

    def add(self, now: float, *, bad: bool = False) -> None:
        """Count one call."""
        if now >= self.turns_at:
            self.turn(now)
        self.counts[bad] += 1

    def turn(self, now: float) -> None:
        """Begin the slots that `now` lies in; due before counting once `now >= turns_at`."""
        self.began = min(self.began, now)
        for ring in self._rings:
            if now >= ring.turns_at:
                ring.turn(now, self.counts)
        self.turns_at = min(ring.turns_at for ring in self._rings)

    def since(self, now: float, seconds: float) -> tuple[int, int]:
        """Good and bad calls of the last `seconds`, at most the window."""
        for ring in self._rings:
            if seconds <= ring.seconds:
                return ring.since(now, self.counts, seconds)
        return self._rings[-1].since(now, self.counts, seconds)

    def burn_rate(self, now: float, seconds: float, tolerated: float) -> float:
        """Share of bad calls in the last `seconds` over the share that is `tolerated`; 0 without calls."""
        good, bad = self.since(now, seconds)
        return bad / (good + bad) / tolerated if bad else 0.0

    def covered(self, now: float) -> float:
        """Seconds of the window that were observed."""
        return min(self.window, max(0.0, now - self.began))

    def copy(self) -> BudgetTracker:
        """One that stays as this is now, to reckon with outside of a lock."""
        tracker = object.__new__(BudgetTracker)
        tracker.window, tracker.began, tracker.turns_at = self.window, self.began, self.turns_at
        tracker.counts, tracker._rings = self.counts[:], tuple(ring.copy() for ring in self._rings)
        return tracker

    def exhausted_in(self, now: float, tolerated: float, seconds: float = HOUR) -> float:
        """Seconds until the budget is used up, if calls go on as they did in the last `seconds`.

        Old calls leave the window meanwhile, the bad as well as the good, so this is no mere division. 0 when it is
        used up, infinite if it never will be.
        """
        good, bad = self.since(now, seconds)
        span = min(seconds, max(now - self.began, self._rings[0].slot)) if good + bad else 1.0
        calls, wrong = (good + bad) / span, bad / span
        ring = self._rings[-1]
        before = 0.0
        for slots in range(ring.slots + 1):
            good, bad = ring.left_after(now, self.counts, slots)
            later = slots * ring.slot
            over = bad + wrong * later - tolerated * (good + bad + calls * later)
            if over >= 0 and (bad or wrong):
                return later - ring.slot * over / (over - before) if slots else 0.0
            before = over
        return math.inf

    def state(self, now: float) -> TrackerState:
        """All that is needed to go on in another process."""
        rings = [RingState(ring.slot, ring.phase(now), ring.growth(self.counts)) for ring in self._rings]
        return TrackerState(self.window, self.covered(now), rings)

    def restore(self, state: TrackerState, now: float, ago: float) -> None:
        """Add what an earlier process counted, `ago` seconds ago; to what this one did, if it already did.

        ValueError if it was kept in other slots than this one's.
        """
        mine, theirs = [ring.slot for ring in self._rings], [one.slot for one in state.rings]
        if mine != theirs:
            raise ValueError(f"its slots are of {theirs} s, and those of this window of {mine} s")
        self.turn(now)
        for ring, saved in zip(self._rings, state.rings, strict=True):
            ring.add_history(now, saved.growth, now - ago - saved.phase)
        if state.covered:
            self.began = min(self.began, now - ago - state.covered)
