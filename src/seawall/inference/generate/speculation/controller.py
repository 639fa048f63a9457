"""Decides, round by round, whether to draft, with which drafter, and how far. Pure: told outcomes and times.

A drafted token is worth what it saves: the chance that it and all before it are accepted, times the seconds that a
token takes at the pace reached so far. It costs a step of the drafter and a longer verification. The controller
drafts while the next token is worth more than it costs, with whichever drafter gains most, and not at all
where none gains. Maximising the gain at the pace reached, and not each round's own ratio, is what maximises tokens
per second over all rounds (Dinkelbach's method for fractional programs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .costs import Costs
from .drafter import Proposal

_MEMORY = 0.97  # of what was seen: about the last 33 proposals of a class
_PRIOR = 4.0  # proposals that the drafter's own expectation counts for
_ALLOWANCE = 0.01  # share of the time that speculation may lose against plain decoding
_GRACE = 0.25  # plain passes that it may lose besides, so that it can begin at all; a short answer loses hardly more
_GRACE_PAID = 0.6  # the same for a drafter that costs, whose first token would not be paid for by less
_FADES = 0.995  # of a gain, what is left a round later: what was won long ago is no excuse for losing now
_WORST = 1.5  # times what a round should have taken
_LIKELY = 0.85  # acceptance of a drafter of which nothing is known
_EXPERIMENTS = 0.01  # share of the time that may go into drafts that are not expected to pay
_SHORT, _LONG = 8, 512  # rounds between experiments: doubled by every failure
_HOPE = 0.97  # acceptance, if all goes well


class Plan(NamedTuple):
    """What to do in a round.

    Attributes:
        drafter: which one drafts, None for none.
        most: how many tokens at most.
        experiment: whether this is tried although it is not expected to pay.
    """

    drafter: int | None
    most: int = 0
    experiment: bool = False


class _Class:
    """How often proposals of one class of strength are accepted; what is long ago counts less."""

    def __init__(self, expected: float) -> None:
        self._hits = expected * _PRIOR
        self._tries = _PRIOR

    @property
    def chance(self) -> float:
        return self._hits / self._tries

    def saw(self, hit: bool) -> None:
        self._hits = self._hits * _MEMORY + hit
        self._tries = self._tries * _MEMORY + 1


class Controller:
    """One sequence's controller.

    Args:
        chances: for each drafter, how often a proposal of each strength is expected to be accepted.
        costs: what passes and drafted tokens take; a drafter whose tokens take nothing is free.
        most: tokens of a draft.
        length: None to decide; a number to always draft so many, with the first drafter that has something.
    """

    def __init__(
        self, chances: Sequence[Sequence[float]], costs: Costs, *, most: int, length: int | None = None
    ) -> None:
        self.costs = costs
        self.free = [costs.draft(drafter) == 0 for drafter in range(len(chances))]
        self._classes = [[_Class(chance) for chance in classes] for classes in chances]
        self._typical = [_Class(_LIKELY) for _ in chances]
        self._most = most
        self._length = length
        self._spent = 0.0  # these three in seconds of an idle machine
        self._ahead = 0.0
        self._experiments = 0.0
        self._recent = [1.0, self.costs.plain()]  # tokens and seconds of the last rounds: the pace reached
        self._quiet = [_SHORT] * len(chances)
        self._wait = [_SHORT] * len(chances)

    def chance(self, drafter: int, strength: int) -> float:
        """How likely a proposal of this strength is to be accepted, if all before it are."""
        classes = self._classes[drafter]
        return classes[min(strength, len(classes) - 1)].chance

    def plan(self, offers: Sequence[Sequence[Proposal] | None], room: int) -> Plan:
        """What to do, given what each free drafter offers; None for one that has to be paid for.

        `room` is how many tokens may be drafted at all.
        """
        most = min(room, self._most)
        if self._length is not None:
            return self._fixed(offers, min(most, self._length))
        best, gain = Plan(None), 0.0
        for drafter, offer in enumerate(offers):
            if offer is None or offer:
                affordable = self._affordable(drafter, most)
                chances = self._chances(drafter, offer, affordable)
                length, found = self._outlook(drafter, chances)
                if found > gain:
                    best, gain = Plan(drafter, length if self.free[drafter] else affordable), found
        return self._experiment(offers, most) if best.drafter is None else best

    def useful(self, drafter: int, proposals: Iterator[Proposal]) -> list[Proposal]:
        """What a free drafter proposes, as far as any plan would use it: the rest is not asked for.

        The first token alone where nothing that may follow could make up for it, and none behind one that is reached,
        and right, too seldom to pay for its place in a pass: chances only fall along a draft.
        """
        if self._length is not None:
            return list(proposals)
        least = self._price(drafter) / self._pace()
        offer: list[Proposal] = []
        survival = 1.0
        for proposal in proposals:
            offer.append(proposal)
            survival *= self.chance(drafter, proposal.strength)
            if survival < least:
                break
            if len(offer) == 1 and self._outlook(drafter, [survival, *[_HOPE] * (self._most - 1)])[1] <= 0:
                break
        return offer

    def another(self, plan: Plan, survival: float, drafted: int) -> bool:
        """Whether one more token is worth its price; `survival` is the chance that all before it are accepted."""
        drafter = plan.drafter
        assert drafter is not None
        if drafted >= plan.most:
            return False
        if self.free[drafter] or self._length is not None or plan.experiment:
            return True
        return survival * self._typical[drafter].chance * self._pace() > self._price(drafter)

    def score(self, drafter: int, strength: int, hit: bool) -> None:
        """A proposal whose turn came was what the target said, or was not."""
        classes = self._classes[drafter]
        classes[min(strength, len(classes) - 1)].saw(hit)
        self._typical[drafter].saw(hit)

    def learn(
        self, plan: Plan, drafted: int, decided: int, draft_seconds: float, target_seconds: float, *, passes: int = 1
    ) -> None:
        """How a round went: tokens drafted and decided, and the time of the draft and of the pass.

        Several plain rounds may be told at once, as so many `passes`.
        """
        if drafted:
            self.costs.saw_verify(drafted + 1, target_seconds)
        else:
            self.costs.saw_plain(target_seconds / passes)
        if plan.drafter is not None and drafted and not self.free[plan.drafter]:
            self.costs.saw_draft(plan.drafter, drafted, draft_seconds)
        seconds = (draft_seconds + target_seconds) / self.costs.load
        plain = self.costs.plain() / self.costs.load
        self._spent += seconds
        if self._ahead > 0:  # losses do not fade: the allowance is for all of them together
            self._ahead *= _FADES**passes
        if drafted:  # plain passes win and lose nothing, however long they took
            assert plan.drafter is not None
            expected = (self.costs.verify(drafted + 1) + drafted * self.costs.draft(plan.drafter)) / self.costs.load
            self._ahead += decided * plain - min(seconds, _WORST * expected)  # an interrupted pass proves nothing
            self._ahead = min(self._ahead, plain * 64)
        elif plan.drafter is not None:  # it was paid, and had nothing to say
            self._ahead -= draft_seconds / self.costs.load
        kept = 0.9**passes
        self._recent = [kept * self._recent[0] + decided, kept * self._recent[1] + seconds]
        for drafter, wait in enumerate(self._wait):
            if drafter != plan.drafter:
                self._quiet[drafter] += passes
                continue
            self._quiet[drafter] = 0
            if plan.experiment:
                self._experiments += max(0.0, seconds - decided * plain)
                self._wait[drafter] = _SHORT if decided > drafted > 0 else min(2 * wait, _LONG)

    def expect(self, plan: Plan, offers: Sequence[Sequence[Proposal] | None]) -> tuple[float, float]:
        """Tokens and seconds that a round is expected to give and take."""
        if plan.drafter is None:
            return 1.0, self.costs.plain()
        chances = self._chances(plan.drafter, offers[plan.drafter], plan.most)
        length = plan.most
        if not self.free[plan.drafter] and self._length is None and not plan.experiment:
            length = max(1, self._outlook(plan.drafter, chances)[0])
        survival, tokens = 1.0, 1.0
        for chance in chances[:length]:
            survival *= chance
            tokens += survival
        length = min(length, len(chances))
        return tokens, self.costs.verify(length + 1) + length * self.costs.draft(plan.drafter)

    def _stake(self, drafter: int) -> float:
        """Seconds that may be lost in a round: what speculation has won, and what it is allowed to lose."""
        plain = self.costs.plain() / self.costs.load
        grace = _GRACE if self.free[drafter] else _GRACE_PAID
        return (self._ahead + _ALLOWANCE * self._spent + grace * plain) * self.costs.load

    def _affordable(self, drafter: int, most: int) -> int:
        """Tokens that may be drafted if all of them may be refused."""
        if (stake := self._stake(drafter)) <= 0:
            return 0
        base, more = self.costs.verify(2), self.costs.verify(3) - self.costs.verify(2)
        price = self.costs.draft(drafter) + more
        return min(most, max(0, int((stake + self.costs.plain() - base + more) / price)))

    def _price(self, drafter: int) -> float:
        """Seconds that one more drafted token takes, its place in the pass included."""
        return self.costs.draft(drafter) + self.costs.verify(3) - self.costs.verify(2)

    def _pace(self) -> float:
        """Seconds a token takes at present: never more than a plain pass."""
        return min(self.costs.plain(), self._recent[1] / self._recent[0] * self.costs.load)

    def _chances(self, drafter: int, offer: Sequence[Proposal] | None, most: int) -> list[float]:
        if offer is None:
            return [self._typical[drafter].chance] * most
        return [self.chance(drafter, proposal.strength) for proposal in offer[:most]]

    def _outlook(self, drafter: int, chances: Sequence[float]) -> tuple[int, float]:
        """The length that gains most over a plain pass, and the seconds it gains; 0 and 0 if none does."""
        pace, price = self._pace(), self.costs.draft(drafter)
        base, more = self.costs.verify(2), self.costs.verify(3) - self.costs.verify(2)
        best, most, gain, survival = 0, 0.0, self.costs.plain() - base + more, 1.0
        for length, chance in enumerate(chances, 1):
            survival *= chance
            gain += survival * pace - price - more
            if gain > most:
                best, most = length, gain
            elif survival * pace < price + more:
                break
        return best, most

    def _experiment(self, offers: Sequence[Sequence[Proposal] | None], most: int) -> Plan:
        """Try a drafter that is thought to lose, if it could pay at its best, it is time, and there is time left."""
        for drafter, offer in enumerate(offers):
            if offer is not None or self._quiet[drafter] < self._wait[drafter] or most < 2:
                continue
            if self._experiments > _EXPERIMENTS * self._spent or self._outlook(drafter, [_HOPE] * most)[1] <= 0:
                continue
            return Plan(drafter, 2, experiment=True)
        return Plan(None)

    def _fixed(self, offers: Sequence[Sequence[Proposal] | None], length: int) -> Plan:
        for drafter, offer in enumerate(offers):
            if length and (offer is None or offer):
                return Plan(drafter, length)
        return Plan(None)
