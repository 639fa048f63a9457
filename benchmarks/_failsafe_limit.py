"""The rule of failsafe-go's AdaptiveLimiter (0.9.7), for comparison: its constants, order and windows.

Its percentile comes from all samples of a window instead of a t-digest, which is exact and no faster here.
"""

import math
import statistics
from collections import deque


def _log10(limit: float) -> int:
    return max(1, int(math.log10(max(1.0, limit))))


class _Average:
    """A mean of the first ten, exponentially weighted from then on."""

    def __init__(self, age: int) -> None:
        self._factor = 2 / (age + 1)
        self._count = 0
        self.value = 0.0

    def add(self, value: float) -> float:
        self._count += 1
        weight = 1 / self._count if self._count <= 10 else self._factor
        self.value += weight * (value - self.value)
        return self.value


class _Correlation:
    """Of the last fifty pairs; 0 while there are fewer than ten or they hardly vary."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=50)

    def add(self, one: float, other: float) -> tuple[float, float]:
        """The correlation, and the coefficient of variation of the second."""
        self._pairs.append((one, other))
        if len(self._pairs) < 10:
            return 0.0, 0.0
        ones, others = zip(*self._pairs, strict=True)
        spreads = [statistics.pstdev(values) / statistics.fmean(values) for values in (ones, others)]
        if min(spreads) < 0.01:
            return 0.0, spreads[1]
        return statistics.correlation(ones, others), spreads[1]


class FailsafeLimit:
    """Raises or lowers the limit by log10 of it, going by the queue it reckons and three correlation guards."""

    def __init__(self, initial_limit: int = 20, min_limit: int = 1, max_limit: int = 200) -> None:
        self._estimate, self._bounds = float(initial_limit), (min_limit, max_limit)
        self._latencies: list[float] = []
        self._most_inflight = 0
        self._next = 0.0
        self._medians: deque[float] = deque(maxlen=5)
        self._recent, self._baseline = _Average(5), _Average(10)
        self._throughput, self._latency = _Correlation(), _Correlation()

    @property
    def limit(self) -> int:
        return int(self._estimate)

    def observe(self, now: float, latency: float, inflight: int, dropped: bool) -> None:
        if not dropped:
            self._latencies.append(latency)
            self._most_inflight = max(self._most_inflight, inflight)
        if now <= self._next or len(self._latencies) < 50:
            return
        least = min(self._latencies)
        p90 = sorted(self._latencies)[int(0.9 * len(self._latencies))]
        self._medians.append(p90)
        recent = self._recent.add(statistics.median(self._medians) if len(self._medians) == 5 else p90)
        self._update(recent, self._most_inflight, full=inflight >= self.limit)
        self._latencies, self._most_inflight = [], 0
        self._next = now + min(30.0, max(2 * least, 1.0))

    def _update(self, recent: float, inflight: int, *, full: bool) -> None:
        queue = math.ceil(self._estimate * (1 - self._baseline.add(recent) / recent))
        with_throughput, throughput_spread = self._throughput.add(inflight, inflight / recent)
        with_latency, _ = self._latency.add(inflight, recent)
        step = _log10(self._estimate)
        overloaded = full and (
            with_throughput < 0
            or (with_throughput < 0.3 and with_latency > 0.5)
            or (throughput_spread < 0.2 and with_latency > 0.5)
        )
        change = step if queue < 3 * step else 0
        if queue > 6 * step or overloaded:
            change = -step
        most = 5.0 * inflight
        if self._estimate + change > most:
            change = -step if self._estimate > most else int(most - self._estimate)
        low, high = self._bounds
        self._estimate = min(max(self._estimate + change, low), high)
