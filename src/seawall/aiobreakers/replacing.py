"""A breaker of ours where one of theirs was: their listeners hear it, and it shares state in their storage."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import aiobreaker
import anyio.to_thread
from aiobreaker.storage.base import CircuitBreakerStorage

from seawall.aiobreakers.errors import CircuitBreakerError
from seawall.aiobreakers.sharing import Shared
from seawall.aiobreakers.view import THEIRS, view_of
from seawall.core import events
from seawall.core.events import Event, Listener
from seawall.core.pipeline import Pipeline
from seawall.core.policy import AroundPolicy
from seawall.policies.circuit_breaker import BreakerSnapshot, CircuitBreaker, CircuitOpenError, StateChanged
from seawall.policies.circuit_breaker.calls import Outcome, judged, says

T = TypeVar("T")


class BridgedBreaker(AroundPolicy):
    """A `CircuitBreaker` of ours that speaks aiobreaker: to its listeners, its storages and its error handlers.

    The breaker decides by its own rules. Listeners hear each call and each change of state, without the lock; what one
    raises is logged. A storage is asked before each call and told after it: who opens the circuit opens it for all,
    who closes it closes it for all, and failures in a row add up. Half open alone is each one's own affair, or theirs
    would let a herd in. Where an event loop runs, a storage that is not in memory is reached from a worker thread.
    What it raises is logged, and the call goes on without it.

    Args:
        breaker: the breaker that decides; use the bridge in its place.
        listeners: of aiobreaker's kind.
        storage: of aiobreaker's kind.

    Attributes:
        view: an `aiobreaker.CircuitBreaker` that shows this one, to listeners and to code that inspects it. Its
            `open()` and `close()` work; calls through it are none of ours.

    Raises:
        CircuitBreakerError: from a guarded call, while open.

    Examples:
        >>> class Log(aiobreaker.CircuitBreakerListener):
        ...     def state_change(self, breaker, old, new):
        ...         print(f"{breaker.name}: {old.state.name} -> {new.state.name}")
        >>> bank = BridgedBreaker(CircuitBreaker("bank", consecutive_failures=1), listeners=[Log()])
        >>> @bank
        ... def pay():
        ...     raise ConnectionError("no route")
        >>> try: pay()
        ... except ConnectionError: pass
        bank: CLOSED -> OPEN
        >>> try: pay()
        ... except aiobreaker.CircuitBreakerError as error: print(round(error.time_remaining.total_seconds()))
        30
    """

    kind = "breaker"

    def __init__(
        self,
        breaker: CircuitBreaker,
        *,
        listeners: Iterable[aiobreaker.CircuitBreakerListener] = (),
        storage: CircuitBreakerStorage | None = None,
    ) -> None:
        super().__init__(breaker.name)
        if storage is not None and not isinstance(storage, CircuitBreakerStorage):
            raise TypeError(f"storage must be one of aiobreaker's, such as CircuitMemoryStorage, got {storage!r}")
        self.breaker = breaker
        self.listeners = tuple(listeners)
        self.storage = storage
        self.view = view_of(breaker)
        self._shared = None if storage is None else Shared(breaker, storage)
        self._in_memory = isinstance(storage, aiobreaker.storage.CircuitMemoryStorage)
        self._run = Pipeline(breaker, name=breaker.name)(_attempted)
        self._run_sync = Pipeline(breaker, name=breaker.name)(_attempted_sync)
        breaker.listen(self._changed)

    async def around(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run `call` if the breaker lets it."""
        if self._shared is not None:
            self._shared.heed(await self._reach(self._shared.look))
        attempt, outcome = _Attempt(self, call), Outcome.NEITHER
        try:
            result: T = await self._run(attempt)
            outcome = self._succeeded(result)
        except CircuitOpenError as error:
            if attempt.begun:  # another breaker, further in
                raise
            raise CircuitBreakerError.like(error) from None
        except Exception as exc:
            outcome = self._failed(exc)
            raise
        finally:
            if self._shared is not None and outcome is not Outcome.NEITHER:
                failures = await self._reach(self._shared.tell, outcome, attempt.opened)
                if self._shared.trips(failures):
                    await self._reach(self._shared.publish)
        return result

    def around_sync(self, call: Callable[[], T]) -> T:
        """Run `call` if the breaker lets it."""
        if self._shared is not None:
            self._shared.heed(self._shared.look())
        attempt, outcome = _Attempt(self, call), Outcome.NEITHER
        try:
            result: T = self._run_sync(attempt)
            outcome = self._succeeded(result)
        except CircuitOpenError as error:
            if attempt.begun:  # another breaker, further in
                raise
            raise CircuitBreakerError.like(error) from None
        except Exception as exc:
            outcome = self._failed(exc)
            raise
        finally:
            if self._shared is not None and outcome is not Outcome.NEITHER:
                failures = self._shared.tell(outcome, attempt.opened)
                if self._shared.trips(failures):
                    self._shared.publish()
        return result

    async def _reach(self, work: Callable[..., T], *arguments: object) -> T:
        """Do `work` with the storage, off the event loop unless it is in memory."""
        if self._in_memory:
            return work(*arguments)
        return await anyio.to_thread.run_sync(work, *arguments)

    def _succeeded(self, result: object) -> Outcome:
        on_result = self.breaker.on_result
        if on_result is not None and says(on_result, result, otherwise=False):
            return Outcome.FAILURE  # without an exception, so listeners have nothing to be told
        for listener in self.listeners:
            events.ask(listener.success, self.view, otherwise=None)
        return Outcome.SUCCESS

    def _failed(self, exc: Exception) -> Outcome:
        outcome = judged(exc, self.breaker.on, self.breaker.ignore)
        if outcome is Outcome.FAILURE:
            for listener in self.listeners:
                events.ask(listener.failure, self.view, exc, otherwise=None)
        return outcome

    def _changed(self, event: Event) -> None:
        """Hear the breaker's own events."""
        if not isinstance(event, StateChanged):
            return
        if self._shared is not None:
            self._shared.changed(event.after)
        before, after = THEIRS[event.before], THEIRS[event.after]
        if before is not after:
            for listener in self.listeners:
                events.ask(
                    listener.state_change, self.view, before.value(self.view), after.value(self.view), otherwise=None
                )

    def listen(self, listener: Listener) -> None:
        """Hear the breaker's events; see `seawall.listen`."""
        self.breaker.listen(listener)

    def update(self, **settings: object) -> None:
        """Change the breaker's settings; see `CircuitBreaker.update`."""
        self.breaker.update(**settings)
        self.view = view_of(self.breaker)

    def snapshot(self) -> BreakerSnapshot:
        """The breaker at one moment."""
        return self.breaker.snapshot()

    def counters(self) -> dict[str, int]:
        """What only grows; exporters read it from the breaker."""
        return self.breaker.counters()

    def gauges(self) -> dict[str, float]:
        """What goes up and down; exporters read it from the breaker."""
        return self.breaker.gauges()


class _Attempt:
    """One call on its way past the breaker."""

    __slots__ = ("_bridge", "begun", "call", "opened")

    def __init__(self, bridge: BridgedBreaker, call: Callable[[], Any]) -> None:
        self._bridge = bridge
        self.begun = False
        self.call = call
        self.opened = 0  # how often the breaker had opened when the call began

    def begin(self) -> None:
        """The breaker let it pass."""
        bridge, self.begun = self._bridge, True
        if bridge._shared is not None:
            self.opened = bridge.breaker.snapshot().opened
        for listener in bridge.listeners:
            events.ask(listener.before_call, bridge.view, self.call, otherwise=None)


async def _attempted(attempt: _Attempt) -> Any:
    attempt.begin()
    return await attempt.call()


def _attempted_sync(attempt: _Attempt) -> Any:
    attempt.begin()
    return attempt.call()


def to_seawall(breaker: aiobreaker.CircuitBreaker, **settings: Any) -> BridgedBreaker:
    """A breaker of ours with the settings, listeners and storage of `breaker`, to use in its place.

    It opens after `fail_max` failures in a row, stays open for `timeout_duration` and then lets one probe through.
    Excluded exceptions count as neither success nor failure. `settings` are those of `CircuitBreaker` and win.

    Examples:
        >>> theirs = aiobreaker.CircuitBreaker(fail_max=2, exclude=[KeyError], name="bank")
        >>> ours = to_seawall(theirs, success_threshold=2).breaker
        >>> ours.consecutive_failures, ours.reset_timeout, ours.ignore
        (2, 60.0, (<class 'KeyError'>,))
    """
    excluded = breaker.excluded_exceptions
    classes = all(isinstance(one, type) for one in excluded)
    inherited = {
        "consecutive_failures": breaker.fail_max,
        "minimum_calls": sys.maxsize,  # no rate opens it
        "reset_timeout": breaker.timeout_duration,
        "ignore": excluded if classes else lambda exc: not breaker.is_system_error(exc),
    }
    ours = CircuitBreaker(breaker.name or "aiobreaker", **{**inherited, **settings})
    return BridgedBreaker(ours, listeners=breaker.listeners, storage=breaker._state_storage)
