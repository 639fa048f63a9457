"""Which burn rate alerts fire, judged over the window pairs. Pure, and told the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from seawall.core.events import Event
from seawall.slo.tracker import BudgetTracker
from seawall.slo.windows import Severity, WindowPair


@dataclass(frozen=True, slots=True)
class BurnAlertFired(Event):
    """The budget burns faster than `factor` over both look backs, given in seconds; `burn_rate` is the long one's."""

    severity: Severity
    long: float
    short: float
    factor: float
    burn_rate: float


@dataclass(frozen=True, slots=True)
class BurnAlertResolved(Event):
    """An alert that fired is over."""

    severity: Severity
    long: float
    short: float


class BurnAlerts:
    """The alerts of some window pairs: each fires while both look backs burn faster than its factor.

    Args:
        pairs: look backs and factors, such as `pairs_for(window)`.
    """

    __slots__ = ("_firing", "_judged", "pairs")

    def __init__(self, pairs: tuple[WindowPair, ...]) -> None:
        self.pairs = pairs
        self._firing = [False] * len(pairs)
        self._judged: tuple[int, float] | None = None  # bad calls and tolerance as it last was judged

    @property
    def severities(self) -> frozenset[Severity]:
        """Of the alerts that fire."""
        return frozenset(pair.severity for pair, fires in zip(self.pairs, self._firing, strict=True) if fires)

    def judge(
        self, tracker: BudgetTracker, now: float, tolerated: float, minimum_calls: int
    ) -> Iterator[tuple[WindowPair, float | None]]:
        """The pairs whose alert began, with the burn rate of the long look back, or ended, with None."""
        judged = (tracker.counts[1], tolerated)
        if judged == self._judged and not any(self._firing):  # no bad call came, so none can begin
            return
        self._judged = judged
        for index, pair in enumerate(self.pairs):
            burn = _burning(tracker, now, tolerated, pair, minimum_calls)
            if (burn is not None) is not self._firing[index]:
                self._firing[index] = burn is not None
                yield pair, burn


def _burning(
    tracker: BudgetTracker, now: float, tolerated: float, pair: WindowPair, minimum_calls: int
) -> float | None:
    """The burn rate of the long look back where both are above the factor."""
    if tracker.burn_rate(now, pair.short, tolerated) <= pair.factor:
        return None
    good, bad = tracker.since(now, pair.long)
    burn = bad / (good + bad) / tolerated if bad else 0.0
    return burn if burn > pair.factor and good + bad >= minimum_calls else None
