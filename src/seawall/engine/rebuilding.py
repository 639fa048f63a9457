"""A model that is lost, and the thread that makes a new one: the breaker's probe is the rebuilding itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Generic, TypeVar

import anyio

from seawall.core import checks, events
from seawall.core.events import Event, Listener
from seawall.core.scope import Permit
from seawall.engine.generations import Generation, Signal, start
from seawall.engine.losing import ALIVE, DEAD, ModelLost, ModelRebuilt, RebuildError, RebuildFailed
from seawall.engine.rehearsal import Rehearsal
from seawall.engine.standing_in import Closes, StandIn
from seawall.policies.circuit_breaker import CircuitBreaker, CircuitOpenError, State, StateChanged

M = TypeVar("M", bound=Closes)

_NEVER = 1_000_000_000  # calls: no rate of failures opens the breaker, a death does
_CALM = 60.0  # seconds that a rebuilt model has to live before its death counts as a first one


class Rebuilding(StandIn[M], Generic[M]):
    """The half of a `Supervised` that brings the model back; `_current` is the model that serves, if there is one."""

    def __init__(
        self,
        name: str,
        rehearsal: Rehearsal[M],
        *,
        backoff: Callable[[int], float],
        drain_timeout: float | timedelta,
        listeners: Iterable[Listener],
    ) -> None:
        super().__init__(name, listeners)
        self.drain_timeout = checks.seconds("drain_timeout", drain_timeout, zero=True)
        self.backoff = checks.function("backoff", backoff, of="the number of the attempt")
        self.breaker = CircuitBreaker(
            name,
            consecutive_failures=1,
            minimum_calls=_NEVER,
            on=(*DEAD, RebuildError),
            ignore=ALIVE,
            listeners=[self._hear],
        )
        self._rehearsal = rehearsal
        self._current: Generation[M] | None = None
        self._dead: Generation[M] | None = None  # lost, and not closed yet
        self._opened = False
        self._stopping = Signal()
        self._rebuilding: threading.Thread | None = None
        self._rebuilt_at = -float("inf")
        self._attempts = 0
        self._pause = 0.001  # seconds before the last attempt
        self._lost = self._rebuilt = self._failed = 0

    @property
    def closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._stopping.is_set

    def _hear(self, event: Event) -> None:
        """The breaker opened, whatever the reason: the model is lost, and a thread makes a new one."""
        if not isinstance(event, StateChanged) or event.after is not State.OPEN:
            return
        with self._lock:
            if self._busy or self.closed or not self._opened:
                return
            self._dead, self._current = self._current, None
            if event.at - self._rebuilt_at > _CALM:
                self._attempts = 0
            self._lost += 1
            self._emit(ModelLost, event.at, event.reason)
            self._make_anew(event.at)

    @property
    def _busy(self) -> bool:
        """Whether a thread makes a new model; after a fork none does."""
        return self._rebuilding is not None and self._rebuilding.is_alive()

    def _make_anew(self, since: float) -> None:
        with self._lock:
            if not self._busy:
                self._rebuilding = start(f"{self.name} rebuilds", self._rebuild, since)

    def _rebuild(self, since: float) -> None:
        """In a thread: close the dead model, then try until there is a new one."""
        dead, self._dead = self._dead, None
        if dead is not None:
            self._bury(dead)
        while not self.closed and not self._attempted(since):
            pass

    def _bury(self, dead: Generation[M]) -> None:
        with self._lock:
            dead.leave()
        dead.idle.wait_sync(self.drain_timeout)
        try:
            dead.model.close()
        except Exception:  # a dead session may not even close; what counts is the next one
            events.logger.exception("closing the lost model of %r failed", self.name)

    def _attempted(self, since: float) -> bool:
        """One attempt, after its wait. Whether there is a model again."""
        self._attempts += 1
        seconds = self._pause = self._wait()
        if self.breaker.state is not State.ISOLATED:
            self.breaker.force_open(seconds)
        permit = self._permit()
        if permit is None:
            return True
        try:
            model = anyio.run(self._made)
        except Exception as error:
            self._failed += 1
            self._say(RebuildFailed, self._attempts, error)
            permit.failure(caused(RebuildError(f"{self.name!r} could not be rebuilt: {error}"), error))
            return False
        except BaseException:
            permit.cancel()
            raise
        self._put(model)
        self._rebuilding = None  # before anybody can lose the new one
        permit.success()
        self._say(ModelRebuilt, self._attempts, self._now() - since)
        return True

    def _permit(self) -> Permit | None:
        """The breaker's probe, once it lets one through; None where this was closed before."""
        while not self.closed:
            try:
                return self.breaker.admit()
            except CircuitOpenError as refusal:  # no `retry_after`: isolated by hand
                wait = 1.0 if refusal.retry_after is None else max(0.001, refusal.retry_after)
            if self.breaker.state is State.HALF_OPEN:
                wait = 0.001  # a caller has the probe, for the microseconds that it takes to find no model
            self._stopping.wait_sync(wait)
        return None

    def _wait(self) -> float:
        """Seconds before the attempt that is due; a millisecond at least, which the breaker needs to be open."""
        return events.ask(self._backed_off, max(1, self._attempts), otherwise=_CALM)

    def _backed_off(self, attempt: int) -> float:
        return max(0.001, checks.seconds("backoff", self.backoff(attempt), zero=True))

    async def _made(self) -> M:
        began = self._now()
        model = await self._rehearsal.make()
        self.breaker.update(probe_timeout=max(1.0, 2 * (self._now() - began)))  # what `retry_after` says meanwhile
        return model

    def _put(self, model: M) -> None:
        """It serves; or it is closed, where this was closed meanwhile."""
        with self._lock:
            closed = self.closed
            if not closed:
                self._current = Generation(model, self._rebuilt + 1)
                self._rebuilt += self._opened
                self._rebuilt_at = self._now()
        if closed:
            model.close()

    def _stop(self) -> Generation[M] | None:
        with self._lock:
            self._stopping.set()
            if self._current is not None:
                self._current.leave()
            return self._current


def caused(error: RebuildError, cause: Exception) -> RebuildError:
    """The error, with its cause."""
    error.__cause__ = cause
    return error
