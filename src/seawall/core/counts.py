"""Counters that only grow, and windows that look back over them.

Count once, derive the views: a call adds to one cumulative integer; a window remembers what the integers
were when each of its slots began, and a rolling figure is a difference. So an exporter reads the same
numbers a breaker decides on, and nothing is ever counted twice or reset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class RollingWindow:
    """Looks back over growing counters in `slots` slots that together span `seconds`.

    The caller tells the time and keeps the counters. `turn` must be called before a counter changes once
    `now >= turns_at`; between turns a call costs one comparison. A look back reaches to the start of the
    oldest slot still inside the window, so it covers between `seconds - seconds / slots` and `seconds`.

    Examples:
        >>> served = [0]
        >>> window = RollingWindow(10.0, slots=10, width=1)
        >>> window.turn(0.0, served); served[0] += 5
        >>> window.since(9.0, served), window.since(12.0, served)
        ([5], [0])
    """

    __slots__ = ("_marks", "_newest", "_slot", "_slots", "seconds", "turns_at")

    def __init__(self, seconds: float, *, slots: int, width: int) -> None:
        self.seconds = seconds
        self._slots = slots
        self._slot = seconds / slots
        self._newest = 0  # number of the slot in progress, counted from the clock's zero
        self._marks: list[Sequence[int]] = [(0,) * width] * slots  # counters at the start of each slot
        self.turns_at = -math.inf  # when the slot in progress ends

    def turn(self, now: float, counters: Sequence[int]) -> None:
        """Begin the slot `now` lies in; slots that passed without a call began with the same counters."""
        current = math.floor(now / self._slot)
        if now >= (current + 1) * self._slot:
            current += 1  # rounding: the division says the slot before, whose end has come
        if current <= self._newest and self.turns_at > -math.inf:
            self.turns_at = max(self.turns_at, (self._newest + 1) * self._slot)
            if now < self.turns_at:
                return
            current = self._newest + 1  # rounding: the slot is over though the division says not yet
        mark = tuple(counters)
        first = current if self.turns_at == -math.inf else self._newest + 1
        for slot in range(max(first, current - self._slots + 1), current + 1):
            self._marks[slot % self._slots] = mark
        if self.turns_at == -math.inf:
            self._marks = [mark] * self._slots
        self._newest = current
        self.turns_at = (current + 1) * self._slot

    def since(self, now: float, counters: Sequence[int], seconds: float | None = None) -> list[int]:
        """How much each counter grew in the last `seconds` (the whole window unless told)."""
        if self.turns_at == -math.inf:
            return [0] * len(counters)
        back = self._slots if seconds is None else min(self._slots, max(1, math.ceil(seconds / self._slot - 1e-9)))
        oldest = math.floor(now / self._slot) - back + 1
        if oldest > self._newest:
            return [0] * len(counters)
        mark = self._marks[max(oldest, self._newest - self._slots + 1) % self._slots]
        return [value - before for value, before in zip(counters, mark, strict=True)]
