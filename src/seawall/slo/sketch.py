"""Latency percentiles from counts in logarithmic buckets, after DDSketch (Masson et al., VLDB 2019)."""

from __future__ import annotations

import math
from array import array

ACCURACY = 0.0195  # of the value, so that 2 % holds with room for rounding
LEAST, MOST = 1e-5, 3600.0  # seconds; what is outside counts as the nearest bound
_GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
_PER_LOG = 1 / math.log(_GAMMA)
_FIRST = math.ceil(math.log(LEAST) * _PER_LOG)  # bucket i holds (gamma ** (i - 1), gamma ** i]
_BUCKETS = math.ceil(math.log(MOST) * _PER_LOG) - _FIRST + 1


class LatencySketch:
    """Durations in 506 buckets, each 4 % wider than the one before: any percentile is right to within 2 %.

    From 10 microseconds to an hour; shorter and longer ones count as these. Sketches of two processes add up to the
    sketch of all they saw.

    Examples:
        >>> sketch = LatencySketch()
        >>> for milliseconds in range(1, 1001):
        ...     sketch.add(milliseconds / 1000)
        >>> abs(sketch.percentile(0.99) - 0.99) < 0.02
        True
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = array("I", bytes(4 * _BUCKETS))

    def add(self, seconds: float) -> None:
        """Count one duration."""
        if seconds <= LEAST:
            self._counts[0] += 1
        elif seconds >= MOST:
            self._counts[-1] += 1
        else:
            self._counts[math.ceil(math.log(seconds) * _PER_LOG) - _FIRST] += 1

    def merge(self, other: LatencySketch) -> None:
        """Count all that `other` counted."""
        for bucket, count in enumerate(other._counts):
            if count:
                self._counts[bucket] += count

    def clear(self) -> None:
        """Forget everything."""
        self._counts = array("I", bytes(4 * _BUCKETS))

    def __len__(self) -> int:
        return sum(self._counts)

    def percentile(self, share: float) -> float:
        """The least duration, in seconds, that at least `share` of all do not exceed; NaN if there are none."""
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share!r}; for the 99th percentile write 0.99")
        left = max(1, math.ceil(share * len(self) - 1e-9))
        for bucket, count in enumerate(self._counts):
            left -= count
            if left <= 0:
                return 2 * _GAMMA ** (bucket + _FIRST) / (_GAMMA + 1)
        return math.nan


class RollingSketch:
    """Percentiles of about the last `seconds`, two thirds of them at least: three sketches in turn.

    Examples:
        >>> recent = RollingSketch(3600.0)
        >>> recent.add(0.0, 0.2)
        >>> round(recent.merged(10.0).percentile(0.5), 2), len(recent.merged(7200.0))
        (0.2, 0)
    """

    __slots__ = ("_number", "_parts", "_seconds", "_turns_at")

    def __init__(self, seconds: float) -> None:
        self._parts = [LatencySketch() for _ in range(3)]
        self._seconds = seconds / len(self._parts)
        self._number = 0
        self._turns_at = -math.inf

    def add(self, now: float, seconds: float) -> None:
        """Count one duration."""
        if now >= self._turns_at:
            self._turn(now)
        self._parts[self._number % 3].add(seconds)

    def _turn(self, now: float) -> None:
        number = math.floor(now / self._seconds)
        number = max(number, self._number + 1) if self._turns_at > -math.inf else number
        for passed in range(max(self._number + 1, number - 2), number + 1):
            self._parts[passed % 3].clear()
        self._number = number
        self._turns_at = (number + 1) * self._seconds

    def merged(self, now: float) -> LatencySketch:
        """All of the last two to three parts, in one."""
        if now >= self._turns_at:
            self._turn(now)
        whole = LatencySketch()
        for part in self._parts:
            whole.merge(part)
        return whole
