"""Several models that answer as one: each call goes to one of them, and one that fails is left alone for a while."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Final, Generic, TypeVar

from seawall.core import checks, events
from seawall.core.errors import Rejected
from seawall.core.events import Listener
from seawall.engine.balancing import LeastLoaded, Rule, checked_rule
from seawall.engine.ejection import Ejection, Outliers
from seawall.engine.generations import Tally, blames, patience
from seawall.engine.rehearsal import checked_model
from seawall.engine.replica import (
    Lease,
    NoReplicaError,
    PanicChanged,
    Replica,
    ReplicaEjected,
    ReplicaRestored,
    ReplicasClosedError,
    ReplicaSnapshot,
)
from seawall.engine.standing_in import Closes, StandIn
from seawall.policies.circuit_breaker import CircuitBreaker, CircuitOpenError

T = TypeVar("T")
M = TypeVar("M", bound=Closes)

_apart: ContextVar[set[object] | None] = ContextVar("seawall_replicas_apart", default=None)


def usual_breaker(name: str) -> CircuitBreaker:
    """Opens where half of 20 calls or more failed, the model's fault; the one that each replica gets unless told."""
    return CircuitBreaker(name, on=blames)


DEFAULT_EJECTION: Final = Ejection()


class Replicas(StandIn[M], Generic[M]):
    """Serves with several models at once: engines on different cores or machines, backends on different devices.

    Ask it as you would one of them. A call goes to the replica that `rule` chooses among those that may be asked,
    and counts there until it ends, a stream until its last piece; a cancelled one gives its place back at once. One
    that refuses (`Rejected`: its queue is full) has done nothing, so the others are asked in its place, each once; a
    failure is the caller's, for a `Retry` or a `Hedge` around. Replicas may be added and removed while they serve.

    Two things keep a bad one out: its own circuit breaker, by rates of failure, and ejection, by failures in a row
    and by comparison with the others. Where fewer than `panic_threshold` of them may be asked, ejection is ignored: a
    few good ones would be overrun with the work of all. It takes the models over, and closes them.

    Args:
        name: labels events and metrics; breakers are named `name.replica`.
        models: by the name of each replica.
        rule: `LeastLoaded()` unless told, `RoundRobin()` or `PeakEwma()`; not shared with others.
        weights: by name, shares of the work; 1 unless told.
        ejection: when one is left out; None for never.
        panic_threshold: share of replicas, from 0 to 1; 0 for no panic.
        breaker: makes a replica's breaker, given its name; None for no breakers.
        listeners: called with its `ReplicaEjected`, `ReplicaRestored` and `PanicChanged` events.

    Raises:
        NoReplicaError: from a call, while none may be asked.
        ReplicasClosedError: from a call, after `drain` or `close`.

    ```python
    import asyncio

    from seawall.engine import Engine, PeakEwma, Replicas
    from seawall.inference import models

    models.add("smollm2-135m")


    async def main() -> None:
        left, right = Engine.load("smollm2-135m", rows=1), Engine.load("smollm2-135m", rows=1)
        async with left, right:
            answers = Replicas("answers", {"left": left, "right": right}, rule=PeakEwma())
            async for piece in answers.stream("Why is the sea salty?", max_tokens=8):
                print(piece.text, end="")


    asyncio.run(main())
    ```
    """

    kind = "replicas"

    def __init__(
        self,
        name: str,
        models: Mapping[str, M],
        *,
        rule: Rule | None = None,
        weights: Mapping[str, float] | None = None,
        ejection: Ejection | None = DEFAULT_EJECTION,
        panic_threshold: float = 0.5,
        breaker: Callable[[str], CircuitBreaker] | None = usual_breaker,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.rule: Rule = LeastLoaded() if rule is None else checked_rule(rule)
        self.panic_threshold = 0.0 if panic_threshold == 0 else checks.fraction("panic_threshold", panic_threshold)
        if not (ejection is None or isinstance(ejection, Ejection)):
            raise TypeError(f"ejection must be an Ejection(...) or None, got {ejection!r}")
        self._outliers = None if ejection is None else Outliers(ejection)
        self._breaker = breaker
        self._replicas: dict[str, Replica[M]] = {}
        self._closing = self._panicking = False
        self._seen = Tally()  # on all replicas, gone ones too
        self._counts = {"refused": 0, "spilled": 0, "ejections.": 0}
        given: object = models
        if not isinstance(given, Mapping) or not given:
            raise ValueError(f"models must be a mapping of names to one model or more, got {models!r}")
        if unknown := (weights or {}).keys() - models.keys():
            raise ValueError(f"there is no replica {', '.join(map(repr, sorted(unknown)))} to weigh")
        for replica, model in models.items():
            self.add(replica, model, weight=(weights or {}).get(replica, 1.0))
        self._register()

    def add(self, replica: str, model: M, *, weight: float = 1.0) -> None:
        """One more replica, from now on. ValueError if the name is taken, by one that drains too."""
        checks.name("replica", replica)
        checked_model(f"replica {replica!r}", model)
        weight = checks.positive("weight", weight)
        breaker = None if self._breaker is None else self._breaker(f"{self.name}.{replica}")
        with self._lock:
            self._refuse_closed()
            if replica in self._replicas:
                raise ValueError(
                    f"{self.name!r} has a replica {replica!r} already: remove it first, or name it otherwise"
                )
            self._replicas = {**self._replicas, replica: Replica(replica, model, weight, breaker)}

    async def remove(self, replica: str, *, timeout: float | timedelta = math.inf) -> M:  # noqa: ASYNC109 - ends no call
        """Take a replica out: no new calls, and wait `timeout` seconds at most for those in flight. It is yours again.

        Calls that take longer go on; closing the model ends them. KeyError if there is no such replica.
        """
        seconds = checks.seconds("timeout", timeout, zero=True, infinite=True)
        with self._lock:
            found = self._replicas[replica]
            found.leave()
        try:
            await found.idle.wait(seconds)
        finally:
            with self._lock:
                if self._replicas.get(replica) is found:
                    self._replicas = {name: one for name, one in self._replicas.items() if one is not found}
        return found.model

    def weigh(self, replica: str, weight: float) -> None:
        """Change a replica's weight. KeyError if there is no such replica."""
        weight = checks.positive("weight", weight)
        with self._lock:
            self._replicas[replica].standing.weight = weight

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Calls of the block go to different replicas, before any is asked again: for a `Hedge` or `Retry` inside it.

        Attempts that run in tasks of their own count as well.
        """
        token = _apart.set(set())
        try:
            yield
        finally:
            _apart.reset(token)

    @property
    def model(self) -> M:
        """One of the models that serve: to look at."""
        with self._lock:
            self._refuse_closed()
            for replica in self._replicas.values():
                if not replica.leaving:
                    return replica.model
        raise NoReplicaError(self.name)

    @property
    def closed(self) -> bool:
        """Whether they take no more calls."""
        return self._closing

    async def call(self, ask: Callable[[M], Awaitable[T]]) -> T:
        """What one of them answers to `ask`."""
        refusals: dict[str, Rejected] = {}
        while True:
            lease = self._lend(refusals)
            try:
                answer = await ask(lease.replica.model)
            except Rejected as refusal:
                self._end(lease, refusal)
                refusals[lease.replica.name] = refusal
            except BaseException as error:
                self._end(lease, error)
                raise
            else:
                self._end(lease, None)
                return answer

    def call_sync(self, ask: Callable[[M], T]) -> T:
        """The same for a plain thread."""
        refusals: dict[str, Rejected] = {}
        while True:
            lease = self._lend(refusals)
            try:
                answer = ask(lease.replica.model)
            except Rejected as refusal:
                self._end(lease, refusal)
                refusals[lease.replica.name] = refusal
            except BaseException as error:
                self._end(lease, error)
                raise
            else:
                self._end(lease, None)
                return answer

    async def iterate(self, ask: Callable[[M], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """The same for a stream: another replica is asked until the first piece has come, by refusal only."""
        refusals: dict[str, Rejected] = {}
        while True:
            lease = self._lend(refusals)
            begun = False
            try:
                async with aclosing(ask(lease.replica.model)) as pieces:
                    async for piece in pieces:
                        if not begun:
                            begun = True
                            self._heard(lease)
                        yield piece
            except BaseException as error:
                self._end(lease, error)
                if begun or not isinstance(error, Rejected):
                    raise
                refusals[lease.replica.name] = error
            else:
                self._end(lease, None)
                return

    def _lend(self, refusals: Mapping[str, Rejected]) -> Lease[M]:
        """A place on a replica; NoReplicaError, or where all that may be asked have refused, the mildest refusal."""
        shut: set[str] = set()
        try:
            while True:
                with self._lock:
                    replica = self._chosen(refusals, shut)
                    call = Lease(replica, None)
                    replica.standing.begin(call, self._now())
                try:
                    if replica.breaker is not None:
                        call.permit = replica.breaker.admit()
                except CircuitOpenError:  # another call was quicker to take the place of the probe
                    shut.add(replica.name)
                    self._give_back(call)
                except BaseException:
                    self._give_back(call)
                    raise
                else:
                    return call
        finally:
            events.deliver()

    def _chosen(self, refusals: Mapping[str, Rejected], shut: set[str]) -> Replica[M]:
        self._refuse_closed()
        now = self._now()
        here = [one for one in self._replicas.values() if not one.leaving]
        self._turn(here, now)
        admitting = [one for one in here if one.name not in shut and one.admits()]
        good = [one for one in admitting if one.health.until is None]
        self._panic(len(good), len(here), now)
        able = [one for one in (admitting if self._panicking else good) if one.name not in refusals]
        if not able:
            raise self._refusal(here, refusals, now)
        tried = _apart.get()
        if tried is not None:
            if tried.issuperset(able):  # a new round
                tried.difference_update(able)
            able = [one for one in able if one not in tried]
        standing = self.rule.choose([one.standing for one in able], now)
        chosen = self._replicas[standing.name]
        if tried is not None:
            tried.add(chosen)
        self._counts["spilled"] += bool(refusals)
        return chosen

    def _refusal(self, here: Iterable[Replica[M]], refusals: Mapping[str, Rejected], now: float) -> Rejected:
        self._counts["refused"] += 1
        if refusals:
            return min(refusals.values(), key=lambda one: math.inf if one.retry_after is None else one.retry_after)
        waits = [one.health.until - now for one in here if one.health.until is not None]
        for one in here:
            wait = None if one.breaker is None else one.breaker.snapshot().retry_after
            if wait is not None:
                waits.append(wait)
        return NoReplicaError(self.name, min(waits, default=None))

    def _turn(self, here: Iterable[Replica[M]], now: float) -> None:
        """Let back in whose time is over."""
        if self._outliers is None:
            return
        back = self._outliers.back([one.health for one in here], now)
        for one in here:
            if one.health in back:
                self._emit(ReplicaRestored, now, one.name)

    def _panic(self, available: int, replicas: int, now: float) -> None:
        panicking = replicas > 0 and available < self.panic_threshold * replicas
        if panicking != self._panicking:
            self._panicking = panicking
            self._emit(PanicChanged, now, panicking, available, replicas)

    def _heard(self, lease: Lease[M]) -> None:
        """The answer, or the first piece of a stream, is there."""
        standing = lease.replica.standing
        with self._lock:
            seconds = standing.answered(lease, now := self._now())
            if seconds is not None:
                self.rule.heard(standing, seconds, now)

    def _give_back(self, lease: Lease[M]) -> None:
        with self._lock:
            lease.replica.standing.end(lease)
            if lease.replica.leaving and not lease.replica.standing.active:
                lease.replica.idle.set()

    def _end(self, lease: Lease[M], error: BaseException | None) -> None:
        """The call ended: its place is free, and what it says about the replica is known."""
        replica = lease.replica
        with self._lock:
            self._seen.count(error)
            failed = replica.tally.count(error)
            if self._outliers is not None and not replica.leaving and (error is None or failed):
                self._judge(self._outliers, replica, self._now(), failed=failed)
        try:
            if error is None:
                self._heard(lease)
        finally:  # a rule of the user's may raise
            self._give_back(lease)
            if lease.permit is not None:
                if error is None:
                    lease.permit.success()
                elif failed:
                    lease.permit.failure(error)
                else:
                    lease.permit.cancel()
            events.deliver()

    def _judge(self, outliers: Outliers, replica: Replica[M], now: float, *, failed: bool) -> None:
        here = [one for one in self._replicas.values() if not one.leaving]
        healths = [one.health for one in here]
        reason = outliers.saw(replica.health, healths, now, failed=failed)
        found = [] if reason is None else [(replica.health, reason)]
        found += outliers.compare(healths, now)
        for health, why in found:
            name = next(one.name for one in here if one.health is health)
            self._counts["ejections."] += 1
            assert health.until is not None
            self._emit(ReplicaEjected, now, name, why, health.until - now)

    async def drain(self, timeout: float | timedelta | None = None) -> bool:  # noqa: ASYNC109 - ends no call
        """Take no more calls, and wait for those in flight; False if `timeout` seconds were too few."""
        until = self._now() + patience(timeout)
        waits = [await one.idle.wait(max(0.0, until - self._now())) for one in self._stop()]
        return all(waits)

    def drain_sync(self, timeout: float | timedelta | None = None) -> bool:
        """The same for a plain thread."""
        until = self._now() + patience(timeout)
        waits = [one.idle.wait_sync(max(0.0, until - self._now())) for one in self._stop()]
        return all(waits)

    def close(self) -> None:
        """Close every model; blocks as theirs does. `drain` first spares the calls in flight."""
        with ExitStack() as models:
            for replica in self._stop():
                models.callback(replica.model.close)

    def _stop(self) -> list[Replica[M]]:
        with self._lock:
            self._closing = True
            for replica in self._replicas.values():
                replica.leave()
            return list(self._replicas.values())

    def _refuse_closed(self) -> None:
        if self._closing:
            raise ReplicasClosedError(f"replicas {self.name!r} were closed, or drain: they take no more calls")

    def snapshot(self) -> tuple[ReplicaSnapshot, ...]:
        """Every replica at one moment."""
        with self._lock:
            return tuple(one.snapshot() for one in self._replicas.values())

    def counters(self) -> dict[str, int]:
        """Calls by how they ended, those that went on to another replica, and ejections."""
        with self._lock:
            seen = self._seen
            return {"success": seen.success, "failure": seen.failure, "neither": seen.neither, **self._counts}

    def gauges(self) -> dict[str, float]:
        """Calls in flight, replicas there are, how many may be asked, and whether that is too few."""
        with self._lock:
            here = [one for one in self._replicas.values() if not one.leaving]
            return {
                "active": sum(one.standing.active for one in self._replicas.values()),
                "replicas": len(here),
                "healthy": sum(one.health.until is None and one.admits() for one in here),
                "panicking": float(self._panicking),
            }

    def __repr__(self) -> str:
        return f"<Replicas {self.name!r} of {', '.join(self._replicas) or 'none'}{', closed' if self._closing else ''}>"
