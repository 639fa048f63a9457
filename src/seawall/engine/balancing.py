"""Which replica answers next. Pure: told the time and who may be asked; no clock, no lock, no model.

`RoundRobin` takes turns by weight, `LeastLoaded` asks whoever has the fewest calls, `PeakEwma` whoever is quick at the
moment. Your own is a class with the two methods of `Rule`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

from seawall.core import checks

_PENALTY = 1e9  # seconds: one that was never heard of gets a call, and the next one once that is answered


class Standing:
    """How one replica stands: what a rule looks at.

    Attributes:
        name: the replica's.
        weight: its share of the work, over that of the others.
        active: calls in flight, streams included until they end.
        turn: in weighted turns, before which it should not be asked again; kept by `RoundRobin`.
        latency: seconds that its answers took lately, as of `heard`; kept by `PeakEwma`.
    """

    __slots__ = ("_unanswered", "active", "heard", "latency", "name", "turn", "weight")

    def __init__(self, name: str, weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight
        self.active = 0
        self.turn = 0.0
        self.latency = 0.0
        self.heard = -math.inf
        self._unanswered: dict[object, float] = {}  # calls that have had no answer yet, oldest first

    def begin(self, call: object, now: float) -> None:
        """A call begins."""
        self.active += 1
        self._unanswered[call] = now

    def answered(self, call: object, now: float) -> float | None:
        """Its answer, or the first piece of it, is there; seconds since it began, None if that was said before."""
        began = self._unanswered.pop(call, None)
        return None if began is None else now - began

    def end(self, call: object) -> None:
        """It ended, however."""
        self.active -= 1
        self._unanswered.pop(call, None)

    def longest_wait(self, now: float) -> float:
        """Seconds since the oldest call began that has had no answer yet."""
        return now - next(iter(self._unanswered.values()), now)


class Rule(Protocol):
    """Chooses among replicas. Called with the process-wide lock held: it must not block or wait."""

    def choose(self, candidates: Sequence[Standing], now: float) -> Standing:
        """The one to ask, of one or more."""
        ...

    def heard(self, standing: Standing, seconds: float, now: float) -> None:
        """A call was answered well after `seconds`; of a stream, its first piece came."""
        ...


def checked_rule(rule: Rule) -> Rule:
    """The rule itself; TypeError for what is none, such as a class without its parentheses."""
    methods = getattr(rule, "choose", None), getattr(rule, "heard", None)
    if isinstance(rule, type) or not all(map(callable, methods)):
        raise TypeError(f"rule must have choose and heard, as LeastLoaded() does, got {rule!r}")
    return rule


class RoundRobin:
    """In turn; with weights, in proportion to them, and never more than one call ahead or behind.

    That is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): one that comes back after a while joins the
    round where it is, and makes up for nothing.

    Examples:
        >>> rule, replicas = RoundRobin(), [Standing("big", weight=3), Standing("small")]
        >>> [rule.choose(replicas, now=0.0).name for _ in range(8)]
        ['big', 'small', 'big', 'big', 'big', 'small', 'big', 'big']
    """

    def __init__(self) -> None:
        self._round = 0.0

    def choose(self, candidates: Sequence[Standing], now: float) -> Standing:
        """The one whose turn it is; of equals the first."""
        chosen = min(candidates, key=lambda one: one.turn)
        self._round = max(self._round, chosen.turn)
        chosen.turn = self._round + 1 / chosen.weight
        return chosen

    def heard(self, standing: Standing, seconds: float, now: float) -> None:
        """It takes no interest."""


class LeastLoaded:
    """Whoever has the fewest calls in flight for its weight; of equals, in turn.

    Examples:
        >>> rule, replicas = LeastLoaded(), [Standing("a"), Standing("b")]
        >>> replicas[0].begin("call", now=0.0)
        >>> rule.choose(replicas, now=0.0).name
        'b'
    """

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def choose(self, candidates: Sequence[Standing], now: float) -> Standing:
        """The least loaded."""
        loads = [(one.active + 1) / one.weight for one in candidates]
        least = min(loads)
        equals = [one for one, load in zip(candidates, loads, strict=True) if load == least]
        return self._turns.choose(equals, now)

    def heard(self, standing: Standing, seconds: float, now: float) -> None:
        """It takes no interest."""


class PeakEwma:
    """The better of two chosen at random, by latency times calls in flight: follows whoever is quick at the moment.

    A slow answer counts at once, quick ones win the trust back slowly, as in Finagle's balancer; a call that
    waits for longer than any answer took counts as well, so one that hangs is found out before it answers. Two choices
    instead of the best of all, because everybody would run to that one at once (Mitzenmacher, 2001).

    Args:
        decay: seconds after which a latency counts a third.
        rng: for the two choices; one of its own unless told.
    """

    def __init__(self, *, decay: float | timedelta = 10.0, rng: random.Random | None = None) -> None:
        self.decay = checks.seconds("decay", decay)
        self._rng = rng or random.Random()

    def choose(self, candidates: Sequence[Standing], now: float) -> Standing:
        """The cheaper of two."""
        if len(candidates) > 2:
            candidates = self._rng.sample(candidates, 2)
        elif self._rng.random() < 0.5:  # equals share
            candidates = candidates[::-1]
        return min(candidates, key=lambda one: self.cost(one, now))

    def heard(self, standing: Standing, seconds: float, now: float) -> None:
        """Take a latency in: a peak as it is, less than that bit by bit."""
        if seconds < standing.latency:
            kept = math.exp(-(now - standing.heard) / self.decay)
            seconds = standing.latency * kept + seconds * (1 - kept)
        standing.latency, standing.heard = seconds, now

    def cost(self, standing: Standing, now: float) -> float:
        """Seconds that the work on it and one more call are expected to take, for its weight."""
        latency = max(standing.latency * math.exp(-(now - standing.heard) / self.decay), standing.longest_wait(now))
        if standing.heard == -math.inf and standing.active:
            latency = max(latency, _PENALTY)
        return latency * (standing.active + 1) / standing.weight
