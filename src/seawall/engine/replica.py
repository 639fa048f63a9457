"""One model among several: its place, its health, its breaker, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from seawall.core.errors import Rejected
from seawall.core.events import Event
from seawall.core.scope import Permit
from seawall.engine.balancing import Standing
from seawall.engine.ejection import Health
from seawall.engine.generations import Signal, Tally
from seawall.inference.errors import ModelError
from seawall.policies.circuit_breaker import CircuitBreaker, State

M = TypeVar("M")


class NoReplicaError(Rejected):
    """No replica may be asked now: all are ejected or their breakers are open, or there is none.

    `retry_after` is when the first of them may be asked again, where that is known.
    """

    reason = "has no replica that may be asked"


class ReplicasClosedError(ModelError):
    """They were closed, or drain; they take no more calls."""


@dataclass(frozen=True, slots=True)
class ReplicaEjected(Event):
    """`replica` is left out for `seconds`, since it fails where the others do not."""

    replica: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ReplicaRestored(Event):
    """`replica` may be asked again."""

    replica: str


@dataclass(frozen=True, slots=True)
class PanicChanged(Event):
    """Too few replicas are left: while `panicking`, ejected ones are asked as well, lest the rest be overrun."""

    panicking: bool
    available: int
    replicas: int


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """One replica at one moment. `latency` is in seconds, 0 where the rule keeps none; counts only grow."""

    name: str
    weight: float
    active: int
    success: int
    failure: int
    neither: int
    latency: float
    ejected: bool
    state: State | None


class Replica(Generic[M]):
    """One model and what is known of it. Changed with the lock held."""

    def __init__(self, name: str, model: M, weight: float, breaker: CircuitBreaker | None) -> None:
        self.model = model
        self.standing = Standing(name, weight)
        self.health = Health()
        self.tally = Tally()
        self.breaker = breaker
        self.leaving = False
        self.idle = Signal()

    @property
    def name(self) -> str:
        """Its name."""
        return self.standing.name

    def leave(self) -> None:
        """Take no new calls."""
        self.leaving = True
        if not self.standing.active:
            self.idle.set()

    def snapshot(self) -> ReplicaSnapshot:
        """What there is to know of it."""
        standing, tally = self.standing, self.tally
        return ReplicaSnapshot(
            self.name,
            standing.weight,
            standing.active,
            tally.success,
            tally.failure,
            tally.neither,
            standing.latency,
            self.health.until is not None,
            None if self.breaker is None else self.breaker.state,
        )

    def admits(self) -> bool:
        """Whether its breaker would let a call in."""
        state = State.CLOSED if self.breaker is None else self.breaker.state
        if self.breaker is None or state not in (State.OPEN, State.HALF_OPEN, State.ISOLATED):
            return True
        snapshot = self.breaker.snapshot()
        if state is State.HALF_OPEN:
            return snapshot.probes < self.breaker.probes
        return snapshot.retry_after == 0


class Lease(Generic[M]):
    """One call's place on one replica: it ends once."""

    __slots__ = ("permit", "replica")

    def __init__(self, replica: Replica[M], permit: Permit | None) -> None:
        self.replica = replica
        self.permit = permit
