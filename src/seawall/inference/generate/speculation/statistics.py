"""What speculation did for one sequence, counted once and read by whoever wants to know."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DrafterStatistics:
    """One drafter's part.

    Attributes:
        rounds: rounds that it drafted for.
        drafted: tokens it proposed.
        accepted: those that the target agreed with.
        seconds: time it took.
        drafted_at: how often a token was proposed at each position of a draft.
        accepted_at: how often the one there was accepted.
    """

    rounds: int
    drafted: int
    accepted: int
    seconds: float
    drafted_at: tuple[int, ...]
    accepted_at: tuple[int, ...]

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens among the drafted ones; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True, slots=True)
class SpeculationStatistics:
    """What speculation did for one sequence, from its second token on: the first comes with the prompt.

    Attributes:
        tokens: tokens decided.
        rounds: passes of the target; `plain` of them had no draft, in `rejected` the first drafted token was
            refused, in `partial` a later one, in `complete` none.
        drafters: each drafter's part, by name.
        draft_seconds: time spent on drafts.
        target_seconds: time spent on passes of the target.
        plain_seconds: what a pass without a draft is thought to take, at the present load.
        draft_cost: seconds of one drafted token of a model by those of a plain pass (c of the papers); 0 without one.
        verification_cost: seconds of the average verifying pass by those of a plain one (v of the papers).
        predicted_speedup: tokens per second over plain ones, as the controller expected them when it chose.
        observed_speedup: the same as it came out, plain passes taken to cost what they are thought to.
    """

    tokens: int
    rounds: int
    plain: int
    rejected: int
    partial: int
    complete: int
    drafters: dict[str, DrafterStatistics]
    draft_seconds: float
    target_seconds: float
    plain_seconds: float
    draft_cost: float
    verification_cost: float
    predicted_speedup: float
    observed_speedup: float

    @property
    def drafted(self) -> int:
        """Tokens proposed and verified."""
        return sum(part.drafted for part in self.drafters.values())

    @property
    def accepted(self) -> int:
        """Proposed tokens that the target agreed with."""
        return sum(part.accepted for part in self.drafters.values())

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens among the drafted ones; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens decided by each pass of the target; 1 is plain decoding."""
        return self.tokens / self.rounds if self.rounds else 0.0


class Tally:
    """The counts of one drafter, while they grow."""

    def __init__(self) -> None:
        self.rounds = 0
        self.seconds = 0.0
        self._drafted_at: Counter[int] = Counter()
        self._accepted_at: Counter[int] = Counter()

    def add(self, drafted: int, accepted: int, seconds: float) -> None:
        """Count a round."""
        self.rounds += 1
        self.seconds += seconds
        self._drafted_at.update(range(drafted))
        self._accepted_at.update(range(accepted))

    def snapshot(self) -> DrafterStatistics:
        """The counts so far."""
        places = range(max(self._drafted_at, default=-1) + 1)
        return DrafterStatistics(
            self.rounds,
            self._drafted_at.total(),
            self._accepted_at.total(),
            self.seconds,
            tuple(self._drafted_at[place] for place in places),
            tuple(self._accepted_at[place] for place in places),
        )
