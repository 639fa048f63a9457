"""An aiobreaker breaker as a policy among ours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import aiobreaker

from seawall.aiobreakers.errors import CircuitBreakerError
from seawall.aiobreakers.view import utcnow
from seawall.core import checks
from seawall.core.events import CallRejected, Listener
from seawall.core.policy import AroundPolicy

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AiobreakerSnapshot:
    """One of aiobreaker's breakers at one moment; `admitted` and `rejections` are of the calls that came through us."""

    state: str
    fail_counter: int
    admitted: int
    rejections: int


class AiobreakerPolicy(AroundPolicy):
    """Guards with an `aiobreaker.CircuitBreaker`, by its rules and with its state, listeners and storage.

    What it still decorates elsewhere shares that state. Two things are ours: a refusal is also a `CircuitOpenError`,
    so that a retry or an SLO around it knows it for one, and the call that trips the breaker keeps its own exception.
    All else is theirs, flaws included: probes by the herd, and storage that is read on the event loop. `to_seawall`
    puts a breaker of ours in its place.

    Args:
        breaker: the breaker.
        name: labels errors, metrics and logs; the breaker's own unless told.
        listeners: called with its `CallRejected` events.

    Raises:
        CircuitBreakerError: from a guarded call, while open.
    """

    kind = "aiobreaker"

    def __init__(
        self, breaker: aiobreaker.CircuitBreaker, *, name: str | None = None, listeners: Iterable[Listener] = ()
    ) -> None:
        if not isinstance(breaker, aiobreaker.CircuitBreaker):
            raise TypeError(f"an AiobreakerPolicy takes an aiobreaker.CircuitBreaker, got {breaker!r}")
        super().__init__(checks.name("AiobreakerPolicy", name or breaker.name or "aiobreaker"), listeners)
        self.breaker = breaker
        self._admitted = self._rejections = 0
        self._register()

    async def around(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run `call` if the breaker lets it."""
        failure: list[Exception] = []

        async def watched() -> T:
            self._admit()
            try:
                return await call()
            except Exception as exc:
                failure.append(exc)
                raise

        try:
            try:
                return await self.breaker.call_async(watched)  # type: ignore[no-any-return]
            except aiobreaker.CircuitBreakerError:
                if not failure:
                    self._refuse()
            raise failure.pop()
        finally:
            failure.clear()  # or the exception, its traceback and this frame would be a cycle

    def around_sync(self, call: Callable[[], T]) -> T:
        """Run `call` if the breaker lets it."""
        failure: list[Exception] = []

        def watched() -> T:
            self._admit()
            try:
                return call()
            except Exception as exc:
                failure.append(exc)
                raise

        try:
            try:
                return self.breaker.call(watched)  # type: ignore[no-any-return]
            except aiobreaker.CircuitBreakerError:
                if not failure:
                    self._refuse()
            raise failure.pop()
        finally:
            failure.clear()

    def _admit(self) -> None:
        with self._lock:
            self._admitted += 1

    def _refuse(self) -> NoReturn:
        """Raise our error in place of theirs."""
        refusal = CircuitBreakerError(self.name, _seconds_left(self.breaker))
        with self._lock:
            self._rejections += 1
        self._tell(CallRejected, refusal)
        try:
            raise refusal from None
        finally:
            del refusal  # or this frame, the traceback and the error would be a cycle

    def snapshot(self) -> AiobreakerSnapshot:
        """State and counters at one moment. Reads the breaker's storage."""
        state, failures = self.breaker.current_state.name.lower(), self.breaker.fail_counter
        with self._lock:
            return AiobreakerSnapshot(state, failures, self._admitted, self._rejections)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        return {"admitted": self._admitted, "rejected": self._rejections}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters: nothing, since their storage would be read at each scrape."""
        return {}


def from_aiobreaker(
    breaker: aiobreaker.CircuitBreaker, *, name: str | None = None, listeners: Iterable[Listener] = ()
) -> AiobreakerPolicy:
    """`breaker` as a policy: a decorator, and a member of pipelines.

    Examples:
        >>> from seawall import Bulkhead, Pipeline
        >>> theirs = aiobreaker.CircuitBreaker(fail_max=1, name="bank")
        >>> @Pipeline(Bulkhead("bank", max_concurrent=8), from_aiobreaker(theirs))
        ... def pay():
        ...     raise ConnectionError("no route")
        >>> try: pay()
        ... except ConnectionError: print(theirs.current_state.name)
        OPEN
        >>> try: pay()
        ... except aiobreaker.CircuitBreakerError as error: print(round(error.retry_after))
        60
    """
    return AiobreakerPolicy(breaker, name=name, listeners=listeners)


def _seconds_left(breaker: aiobreaker.CircuitBreaker) -> float:
    """Seconds until it probes. Its own `opens_at` takes universal for local time."""
    opened_at = breaker._state_storage.opened_at
    if opened_at is None:
        return 0.0
    left: timedelta = opened_at + breaker.timeout_duration - utcnow()
    return max(0.0, left.total_seconds())
