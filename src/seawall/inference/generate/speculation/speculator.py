"""Rounds: ask the drafters, let the target verify in one pass, keep what it agrees with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, islice
from operator import mul
from typing import Any, NamedTuple

import numpy as np

from seawall.inference.errors import InvalidSettingError
from seawall.inference.runtime import ort

from ..choosing import Chooser
from .controller import Controller, Plan
from .drafter import Drafting, Proposal, Turn
from .settings import Speculation
from .statistics import SpeculationStatistics, Tally
from .target import Rows, Target
from .verify import Probabilities, verify_chosen, verify_drawn

_STREAM = 1
_SUM = 1e-3  # by which probabilities in float32 may miss 1
_TOGETHER = 8  # plain passes that the controller hears of at once: to tell it of each would cost a hundredth of each


class Attempt(NamedTuple):
    """A draft that waits for the target's verdict.

    Attributes:
        plan: what it was drafted for.
        offers: what every drafter proposed.
        draft: the proposals that go to the target.
        seconds: that they took; `late` of these went into reading what the drafter had not seen yet.
    """

    plan: Plan
    offers: Sequence[Sequence[Proposal] | None]
    draft: Sequence[Proposal]
    seconds: float
    late: float

    @property
    def tokens(self) -> list[int]:
        """The drafted tokens."""
        return [proposal.token for proposal in self.draft]


class Speculator:
    """Speculation at work on one sequence.

    Rejected tokens are nowhere seen: the target is rewound over them, the chooser never counts them, and drafters
    hear of decided tokens only.
    """

    def __init__(
        self,
        target: Target,
        chooser: Chooser,
        draftings: Sequence[Drafting],
        controller: Controller,
        settings: Speculation,
        *,
        ends: frozenset[int] = frozenset(),
        vocabulary: int = 1 << 31,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._target = target
        self._chooser = chooser
        self._draftings = draftings
        self._free = controller.free
        self._controller = controller
        self._settings = settings
        self._ends = ends
        self._vocabulary = vocabulary
        self._clock = clock
        self._rng = chooser.generator(_STREAM)
        self._tallies = {drafter.name: Tally() for drafter in settings.drafters}
        self._counts = {"tokens": 0, "plain": 0, "rejected": 0, "partial": 0, "complete": 0}
        self._seconds = {"draft": 0.0, "target": 0.0, "verify": 0.0}
        self._expected = [0.0, 0.0]  # tokens, and plain passes they should cost
        self._timed = 0  # tokens, and verifying passes, that were not shared with other sequences
        self._verifying = 0
        self._late = 0.0  # seconds of a draft that went into reading what the drafter had not seen yet
        self._plain = 0  # passes that the controller has not heard of yet, and their seconds
        self._plain_seconds = 0.0

    def begin(self, token: int) -> None:
        """The first token of the answer, which came with the prompt."""
        for drafting in self._draftings:
            drafting.extend(token)

    def round(self, pending: int, room: int, options: ort.RunOptions) -> list[int]:
        """One pass of the target, drafted for where that pays: the tokens it decides, one at least.

        `pending` is the last decided token, which the target has not read; `room` is how many tokens may be
        decided. The answer ends with its end token, if that is among them.
        """
        attempt = self.propose(room, options)
        begun = self._clock()
        base = self._target.length
        rows = self._target.extend([pending, *attempt.tokens], options)
        try:
            decided = self.settle(attempt, rows, begun)
        except BaseException:
            self._target.rewind(base)  # a choice that fails leaves it there, as a pass does
            raise
        self._target.rewind(base + len(decided))
        return decided

    def propose(self, room: int, options: ort.RunOptions) -> Attempt:
        """A draft as long as pays in a pass of this sequence's own; often none."""
        begun = self._clock()
        self._late = 0.0
        turn = self._turn(options)
        offers = [
            self._controller.useful(index, self._proposals(index, turn)) if free else None
            for index, free in enumerate(self._free)
        ]
        plan = self._controller.plan(offers, room - 1)
        draft = self._draft(plan, offers, turn) if plan.drafter is not None else ()
        return Attempt(plan, offers, draft, self._clock() - begun, self._late)

    def offers(self, options: ort.RunOptions) -> list[list[Proposal] | None]:
        """What each drafter that costs nothing proposes, at most; None for one that costs."""
        turn = self._turn(options)
        return [list(self._proposals(index, turn)) if free else None for index, free in enumerate(self._free)]

    def shared(self, offers: Sequence[Sequence[Proposal] | None], drafter: int | None, length: int) -> Attempt:
        """A draft of what was offered, to be verified in a pass that other sequences share."""
        offer = offers[drafter] if drafter is not None and length > 0 else None
        plan = Plan(drafter, length) if offer else Plan(None)
        return Attempt(plan, offers, list((offer or ())[:length]), 0.0, 0.0)

    def outlook(self, offers: Sequence[Sequence[Proposal] | None], room: int) -> tuple[int | None, list[float]]:
        """The drafter among those that made an offer of which most is expected, and each token's chance."""
        most = min(room - 1, self._settings.most if self._settings.length is None else self._settings.length)
        best: tuple[float, int | None, list[float]] = (0.0, None, [])
        for drafter, offer in enumerate(offers):
            chances = [self._controller.chance(drafter, proposal.strength) for proposal in (offer or ())[:most]]
            expected = sum(accumulate(chances, mul))
            if expected > best[0]:
                best = expected, drafter, chances
        return best[1], best[2]

    def settle(self, attempt: Attempt, rows: Rows, begun: float | None) -> list[int]:
        """What a pass over the last decided token and the draft decides, given the logits after each of them.

        `begun` is when the pass began; None where it was shared, so that its time says nothing of this sequence.
        """
        decided = self._verify(attempt.draft, rows)
        if begun is not None:
            self._learn(attempt, len(decided), self._clock() - begun)
        self._count(attempt, decided)
        self._commit(attempt.plan, attempt.offers, attempt.draft, decided, rows)
        return decided

    def statistics(self) -> SpeculationStatistics:
        """What came of it so far."""
        counts, seconds = self._counts, self._seconds
        rounds = sum(counts[kind] for kind in ("plain", "rejected", "partial", "complete"))
        plain = self._controller.costs.plain()
        spent = seconds["draft"] + seconds["target"]
        paid = [i for i, free in enumerate(self._free) if not free]
        return SpeculationStatistics(
            tokens=counts["tokens"],
            rounds=rounds,
            plain=counts["plain"],
            rejected=counts["rejected"],
            partial=counts["partial"],
            complete=counts["complete"],
            drafters={name: tally.snapshot() for name, tally in self._tallies.items()},
            draft_seconds=seconds["draft"],
            target_seconds=seconds["target"],
            plain_seconds=plain,
            draft_cost=self._controller.costs.draft(paid[0]) / plain if paid else 0.0,
            verification_cost=seconds["verify"] / self._verifying / plain if self._verifying else 0.0,
            predicted_speedup=self._expected[0] / self._expected[1] if self._expected[1] else 1.0,
            observed_speedup=self._timed * plain / spent if spent else 1.0,
        )

    def close(self) -> None:
        """Let every drafter give back what it holds."""
        with ExitStack() as closing:
            for drafting in self._draftings:
                closing.callback(drafting.close)

    def _proposals(self, drafter: int, turn: Turn) -> Iterator[Proposal]:
        """What a drafter says, as far as it is asked: it may know no end, and a user's own may say anything."""
        for proposal in islice(self._draftings[drafter].propose(turn), turn.most):
            if wrong := self._wrong(proposal):
                raise InvalidSettingError(f"drafter {self._settings.drafters[drafter].name!r} proposed {wrong}")
            yield proposal

    def _wrong(self, proposal: Any) -> str | None:
        if not isinstance(proposal, Proposal):
            return f"{proposal!r:.80}, which is no Proposal(token)"
        token: Any = proposal.token
        strength: Any = proposal.strength
        if not isinstance(token, (int, np.integer)) or not 0 <= token < self._vocabulary:
            return f"token {token!r}, which is not one of the model's: an int from 0 to {self._vocabulary - 1}"
        if not isinstance(strength, (int, np.integer)) or strength < 0:
            return f"strength {strength!r}, which is none of its classes: an int from 0"
        whole: Any = proposal.drawn_from
        if whole is None or self._settings.rule != "drawn":
            return None
        if not isinstance(whole, np.ndarray) or whole.shape != (self._vocabulary,) or not _is_distribution(whole):
            return f"token {token} as drawn from what is no distribution over all {self._vocabulary} tokens"
        return None

    def _draft(self, plan: Plan, offers: Sequence[Sequence[Proposal] | None], turn: Turn) -> list[Proposal]:
        assert plan.drafter is not None
        if (offer := offers[plan.drafter]) is not None:
            return list(offer[: plan.most])
        draft: list[Proposal] = []
        survival = 1.0
        turn = Turn(plan.most, turn.chooser, turn.drawn, turn.options)
        taken: list[float] = []
        before = self._clock()
        for proposal in self._proposals(plan.drafter, turn):
            taken.append(self._clock() - before)
            draft.append(proposal)
            survival *= self._controller.chance(plan.drafter, proposal.strength)
            if proposal.token in self._ends or not self._controller.another(plan, survival, len(draft)):
                break
            before = self._clock()
        if len(taken) > 1:  # a cache of its own had to be filled first; that is reading, not drafting
            self._late = max(0.0, taken[0] - 3 * max(taken[1:]))
        return draft

    def _verify(self, draft: Sequence[Proposal], rows: Rows) -> list[int]:
        if not draft and self._settings.rule == "chosen":
            return [self._chooser.choose(rows[0])]
        tokens = [int(proposal.token) for proposal in draft]
        threshold = self._settings.accept_above
        chooser = self._chooser

        def lenient(place: int) -> bool:
            return threshold is not None and (
                chooser.likelihood(rows[place], tokens[place], tokens[:place]) >= threshold
            )

        def offered(place: int) -> Probabilities:
            whole = draft[place].drawn_from
            return certain(tokens[place], rows.shape[1]) if whole is None else whole

        if self._settings.rule == "drawn":
            decided = verify_drawn(
                tokens, offered, lambda place: chooser.probabilities(rows[place], tokens[:place]), self._rng, lenient
            )
        else:
            decided = verify_chosen(tokens, lambda place: chooser.choose(rows[place], tokens[:place]), lenient)
        for place, token in enumerate(decided):
            if token in self._ends:
                return decided[: place + 1]
        return decided

    def _commit(
        self,
        plan: Plan,
        offers: Sequence[Sequence[Proposal] | None],
        draft: Sequence[Proposal],
        decided: Sequence[int],
        rows: Rows,
    ) -> None:
        """Tell everybody what was decided, and the controller whose guesses those were."""
        if plan.drafter is not None and not self._free[plan.drafter]:
            for proposal, token in zip(draft, decided, strict=False):
                self._controller.score(plan.drafter, proposal.strength, proposal.token == token)
        for index, drafting in enumerate(self._draftings):
            guesses = iter(offers[index] or ()) if self._free[index] else None
            for token in decided:
                if guesses is not None and (guess := next(guesses, None)) is not None:
                    self._controller.score(index, guess.strength, guess.token == token)
                    if guess.token != token:
                        guesses = iter(())
                drafting.extend(token)
        for token, logits in zip(decided, rows, strict=False):  # a rejected token has logits too
            self._chooser.decide(token, logits)

    def _learn(self, attempt: Attempt, decided: int, target_seconds: float) -> None:
        plan, draft = attempt.plan, attempt.draft
        self._timed += decided
        self._seconds["draft"] += attempt.seconds
        self._seconds["target"] += target_seconds
        if not draft and plan.drafter is None:
            self._plain += 1
            self._plain_seconds += target_seconds
            if self._plain >= _TOGETHER:
                self._learn_plain()
            return
        self._learn_plain()
        tokens, seconds = self._controller.expect(plan if draft else Plan(None), attempt.offers)
        self._expected[0] += tokens
        self._expected[1] += seconds / self._controller.costs.plain()
        self._controller.learn(plan, len(draft), decided, attempt.seconds - attempt.late, target_seconds)
        if draft:
            self._seconds["verify"] += target_seconds
            self._verifying += 1

    def _learn_plain(self) -> None:
        """Tell the controller of the plain passes since it last heard of any."""
        if self._plain:
            self._controller.learn(Plan(None), 0, self._plain, 0.0, self._plain_seconds, passes=self._plain)
            self._expected[0] += self._plain
            self._expected[1] += self._plain
            self._plain, self._plain_seconds = 0, 0.0

    def _count(self, attempt: Attempt, decided: Sequence[int]) -> None:
        plan, draft = attempt.plan, attempt.draft
        self._counts["tokens"] += len(decided)
        accepted = 0
        while accepted < min(len(draft), len(decided)) and draft[accepted].token == decided[accepted]:
            accepted += 1
        if not draft or plan.drafter is None:
            self._counts["plain"] += 1
            return
        outcome = "complete" if accepted == len(draft) else "partial" if accepted else "rejected"
        self._counts[outcome] += 1
        self._tallies[self._settings.drafters[plan.drafter].name].add(len(draft), accepted, attempt.seconds)

    def _turn(self, options: ort.RunOptions) -> Turn:
        most = self._settings.length or self._settings.most
        return Turn(most, self._chooser, self._settings.rule == "drawn", options)


def _is_distribution(whole: Probabilities) -> bool:
    return bool(whole.min() >= 0 and abs(whole.sum(dtype=np.float64) - 1) < _SUM)  # neither holds of NaN


def certain(token: int, vocabulary: int) -> Probabilities:
    """The distribution of a token that was not drawn."""
    whole = np.zeros(vocabulary)
    whole[token] = 1.0
    return whole
