"""Limits that find themselves from what calls report: pure, without a clock, a lock or dice.

Each is told how every call ended, `observe(now, latency, inflight, dropped)`, and says in `limit` how many may run
at once. A call that timed out is a drop and its duration no latency; one that was cancelled or failed is not told.
"""

from __future__ import annotations

import math
from typing import Protocol

from seawall.core import checks

MOST = 1_000_000
SHORTEST, LONGEST = 1e-9, 1e9  # seconds: what a latency is cut to, so that no ratio of two overflows


class Limit(Protocol):
    """How many calls may run at once, learnt from how calls end. All its methods run under the gate's lock."""

    @property
    def limit(self) -> int:
        """Calls that may run at once now."""

    def observe(self, now: float, latency: float, inflight: int, dropped: bool) -> None:
        """A call ended that began `latency` seconds ago, as one of `inflight`; `dropped` if it timed out."""


class _Window:
    """Calls that began and ended since `since`, summed up in six numbers.

    Latency is summed as logarithm: one call that hangs then weighs as one call, and the ratio of two means has a
    standard error whatever the unit is.
    """

    __slots__ = ("calls", "drops", "most_inflight", "since", "squares", "total")

    def __init__(self, since: float) -> None:
        self.since = since
        self.calls = self.drops = self.most_inflight = 0
        self.total = self.squares = 0.0

    def add(self, now: float, latency: float, inflight: int, dropped: bool) -> None:
        if now - latency < self.since:
            return  # it began under another limit
        self.most_inflight = max(self.most_inflight, inflight)
        if dropped:
            self.drops += 1
            return
        logarithm = math.log(min(max(latency, SHORTEST), LONGEST))
        self.calls += 1
        self.total += logarithm
        self.squares += logarithm * logarithm

    def is_full(self, now: float, seconds: float, minimum_calls: int) -> bool:
        """Whether enough calls over enough time are in it: twice a call's latency, but 30 windows at most."""
        if self.calls + self.drops < minimum_calls or now - self.since < seconds:
            return False
        return not self.calls or now - self.since >= min(2 * math.exp(self.mean()), 30 * seconds)

    def mean(self) -> float:
        """Logarithm of the geometric mean latency."""
        return self.total / self.calls

    def variance(self) -> float:
        """Square of the standard error of `mean`."""
        return max(0.0, self.squares / self.calls - self.mean() ** 2) / self.calls


class _Bounded:
    """What the three share: an estimate between two bounds."""

    def __init__(self, initial_limit: int, min_limit: int, max_limit: int) -> None:
        self.min_limit = checks.count("min_limit", min_limit)
        self.max_limit = checks.count("max_limit", max_limit)
        self.initial_limit = checks.count("initial_limit", initial_limit)
        if not min_limit <= initial_limit <= max_limit:
            raise ValueError(
                "initial_limit must lie between min_limit and max_limit, "
                f"got {min_limit} <= {initial_limit} <= {max_limit}"
            )
        if max_limit > MOST:
            raise ValueError(f"max_limit must be {MOST} or less, got {max_limit!r}")
        self._estimate = float(initial_limit)

    @property
    def limit(self) -> int:
        """Calls that may run at once now."""
        return int(self._estimate)

    def _move(self, estimate: float) -> None:
        self._estimate = min(max(estimate, self.min_limit), self.max_limit)


DRAIN = 0.75  # of the limit, while the latency without a queue is looked at
LOOK_EVERY = 20  # windows; at DRAIN that costs an eightieth of the places
LOOK_AGAIN = 2  # windows between two looks while the limit falls
DROPS = 0.1  # share of drops that makes a window a bad one
BACKOFF = 0.8  # what a bad window leaves of the limit


class GradientLimit(_Bounded):
    """Follows the ratio of latency to its baseline: grows while calls are as fast as with fewer beside them.

    Each window (`window` seconds, `minimum_calls` calls) yields one latency. Up to `tolerance` above the baseline
    the limit grows, by a tenth at most and only if calls wanted more; beyond, it is cut in proportion. A window
    with too many timeouts cuts it by a fifth.

    The baseline is looked at, not remembered: for one window in twenty, and as soon as the limit has fallen, the
    limit is a quarter lower, and what calls take then is the baseline. So a server that became slower costs a few
    windows and an overload of hours never becomes the normal. A window in which fewer calls came anyway serves as well.

    Args:
        initial_limit: the limit until the first window is full.
        min_limit: never below.
        max_limit: never above.
        window: seconds of a window, at least; calls that take longer make it longer.
        minimum_calls: calls that a window needs; with fewer, noise decides.
        tolerance: how much slower than with a quarter less beside it a call may be. 0.15 suits servers whose latency
            grows smoothly with their throughput, such as one that batches.

    Examples:
        >>> limit = GradientLimit(initial_limit=10)
        >>> limit.limit  # a quarter lower: the first window looks at the baseline
        7
    """

    def __init__(
        self,
        initial_limit: int = 20,
        min_limit: int = 1,
        max_limit: int = 1000,
        *,
        window: float = 1.0,
        minimum_calls: int = 50,
        tolerance: float = 0.06,
    ) -> None:
        super().__init__(initial_limit, min_limit, max_limit)
        self.window = checks.seconds("window", window)
        self.minimum_calls = checks.count("minimum_calls", minimum_calls)
        self.tolerance = checks.fraction("tolerance", tolerance)
        self._looking = True
        self._baseline = 0.0  # logarithm, with the square of its standard error
        self._baseline_variance = 0.0
        self._baseline_inflight = 0  # calls beside which it was measured
        self._windows = 0  # since it was
        self._seen: _Window | None = None

    @property
    def limit(self) -> int:
        """Calls that may run at once now."""
        return max(self.min_limit, int(self._estimate * DRAIN)) if self._looking else int(self._estimate)

    @property
    def baseline(self) -> float:
        """Seconds a call takes while there is no queue; NaN before the first window."""
        return math.exp(self._baseline) if self._baseline_inflight else math.nan

    def observe(self, now: float, latency: float, inflight: int, dropped: bool) -> None:
        """See `Limit.observe`."""
        seen = self._seen
        if seen is None:
            seen = self._seen = _Window(now - latency)
        seen.add(now, latency, inflight, dropped)
        if seen.is_full(now, self.window, self.minimum_calls):
            self._decide(seen)
            self._seen = _Window(now)

    def _decide(self, seen: _Window) -> None:
        limit = self.limit
        self._windows += 1
        if seen.drops > DROPS * (seen.calls + seen.drops):
            self._looking = False
            self._move(self._estimate * BACKOFF)
        elif self._looking or not self._baseline_inflight or seen.most_inflight <= int(DRAIN * limit):
            self._looking = False
            self._look(seen)
        else:
            self._follow(seen, wanted_more=seen.most_inflight >= limit)
            shrunk = self._estimate * DRAIN < 0.9 * self._baseline_inflight
            self._looking = self._windows >= (LOOK_AGAIN if shrunk else LOOK_EVERY)

    def _follow(self, seen: _Window, *, wanted_more: bool) -> None:
        slower, variance = seen.mean() - self._baseline, seen.variance()
        error = math.sqrt(variance + self._baseline_variance)
        if slower < -3 * error:  # faster with more beside it: the baseline is of slower days
            self._look(seen)
            return
        ratio, bound = math.exp(slower - error), 1 + self.tolerance
        if ratio > bound:
            self._move(self._estimate * bound / ratio)
        elif wanted_more:
            room = min(1.0, (bound - ratio) / self.tolerance)
            self._move(self._estimate + max(1.0, self._estimate / 10) * room)

    def _look(self, seen: _Window) -> None:
        self._baseline, self._baseline_variance = seen.mean(), seen.variance()
        self._baseline_inflight = seen.most_inflight
        self._windows = 0


class VegasLimit(_Bounded):
    """Reckons how many of the calls in flight stand in a queue, and keeps that small (TCP Vegas, as Netflix has it).

    A call without queueing takes the least latency seen; what the mean of a window takes longer is the queue's.
    Steps grow with the logarithm of the limit, so it is gentle and slow. It forgets the least latency every
    `probe_every` windows; under an overload that never pauses, it then takes a queue for the normal.

    Args:
        initial_limit: the limit until the first window is full.
        min_limit: never below.
        max_limit: never above.
        window: seconds of a window, at least; calls that take longer make it longer.
        minimum_calls: calls that a window needs.
        probe_every: windows after which the least latency is taken afresh.

    Examples:
        >>> VegasLimit(initial_limit=10).limit
        10
    """

    def __init__(
        self,
        initial_limit: int = 20,
        min_limit: int = 1,
        max_limit: int = 1000,
        *,
        window: float = 1.0,
        minimum_calls: int = 10,
        probe_every: int = 30,
    ) -> None:
        super().__init__(initial_limit, min_limit, max_limit)
        self.window = checks.seconds("window", window)
        self.minimum_calls = checks.count("minimum_calls", minimum_calls)
        self.probe_every = checks.count("probe_every", probe_every)
        self._least = math.inf  # logarithm
        self._windows = 0
        self._seen: _Window | None = None

    def observe(self, now: float, latency: float, inflight: int, dropped: bool) -> None:
        """See `Limit.observe`."""
        seen = self._seen
        if seen is None:
            seen = self._seen = _Window(now - latency)
        seen.add(now, latency, inflight, dropped)
        if seen.is_full(now, self.window, self.minimum_calls):
            self._decide(seen)
            self._seen = _Window(now)

    def _decide(self, seen: _Window) -> None:
        estimate = self._estimate
        step = max(1, int(math.log10(estimate)))
        if seen.drops:
            self._move(estimate - step)
        if not seen.calls:
            return
        self._windows += 1
        if self._windows >= self.probe_every or seen.mean() < self._least:
            self._least, self._windows = seen.mean(), 0
        elif not seen.drops and seen.most_inflight * 2 >= estimate:
            queue = math.ceil(estimate * (1 - math.exp(self._least - seen.mean())))
            if queue <= step:
                self._move(estimate + 6 * step)
            elif queue < 3 * step:
                self._move(estimate + step)
            elif queue > 6 * step:
                self._move(estimate - step)


class AIMDLimit(_Bounded):
    """Adds one per round of calls that end well, takes a tenth off on a timeout (what TCP Reno does).

    The simple choice, and the right one where latency says nothing and the callee refuses or times out instead:
    it sees nothing below `max_latency`. Drops of calls that began before the last cut say nothing new.

    Args:
        initial_limit: where it starts.
        min_limit: never below.
        max_limit: never above.
        max_latency: seconds; a call that took longer is a drop though it ended well.
        backoff: what a drop leaves of the limit.

    Examples:
        >>> limit = AIMDLimit(initial_limit=10)
        >>> limit.observe(now=0.2, latency=0.1, inflight=10, dropped=True)
        >>> limit.limit
        9
    """

    def __init__(
        self,
        initial_limit: int = 20,
        min_limit: int = 1,
        max_limit: int = 1000,
        *,
        max_latency: float = 5.0,
        backoff: float = 0.9,
    ) -> None:
        super().__init__(initial_limit, min_limit, max_limit)
        self.max_latency = checks.seconds("max_latency", max_latency, infinite=True)
        self.backoff = checks.fraction("backoff", backoff, one=False)
        self._cut_at = -math.inf

    def observe(self, now: float, latency: float, inflight: int, dropped: bool) -> None:
        """See `Limit.observe`."""
        if dropped or latency > self.max_latency:
            if now - latency >= self._cut_at:
                self._cut_at = now
                self._move(self._estimate * self.backoff)
        elif inflight * 2 >= self._estimate:
            self._move(self._estimate + 1 / self._estimate)
