"""The time in which a new model may still be sent away: what it is judged by. Pure but for the signal."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from seawall.core import checks
from seawall.engine.generations import Signal, Tally


@dataclass(frozen=True, slots=True)
class Probation:
    """How a new model is watched once it has the traffic.

    It goes at a failed call that brings its share of failures to `failure_rate` above that of the old model, from
    `minimum_calls` calls on. Refusals, cancellations and faults of the caller's are no failures; deadlines that
    passed are.

    Args:
        seconds: how long; the old model stays in memory meanwhile.
        failure_rate: share of calls, in (0, 1].
        minimum_calls: calls that it answers before it is judged.
    """

    seconds: float | timedelta = 10.0
    failure_rate: float = 0.1
    minimum_calls: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", checks.seconds("seconds", self.seconds))
        checks.fraction("failure_rate", self.failure_rate)
        checks.count("minimum_calls", self.minimum_calls)

    @property
    def length(self) -> float:
        """`seconds` as a number."""
        return checks.seconds("seconds", self.seconds)

    def verdict(self, before: Tally, after: Tally) -> str | None:
        """Why the new one goes, by how calls ended on both; None where it may stay."""
        if after.judged >= self.minimum_calls and after.rate >= before.rate + self.failure_rate:
            return f"{after.failure} of {after.judged} calls failed, and {before.rate:.1%} of those before it"
        return None


class Trial:
    """One probation. Judged with the lock held."""

    def __init__(self, settings: Probation, before: Tally, after: Tally) -> None:
        self.settings = settings
        self.over = Signal()  # earlier than its time
        self.why: str | None = None
        self._before = before
        self._after = after

    def judge(self) -> None:
        """A call on the new model failed."""
        if self.why is None:
            self.why = self.settings.verdict(self._before, self._after)
            if self.why is not None:
                self.over.set()
