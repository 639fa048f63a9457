"""Chaos: makes some calls slow, failing or wrong on purpose, to see what the policies around them do."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from random import Random
from typing import Any, Literal, NoReturn, Self, TypeAlias, TypeVar

from seawall.core import checks, events, gate
from seawall.core.events import Event, Listener
from seawall.core.policy import AroundPolicy
from seawall.core.sleeping import pause

T = TypeVar("T")
Injected: TypeAlias = Literal["latency", "exception", "result"]
Enabled: TypeAlias = bool | Callable[[], bool] | ContextVar[bool]
LONGEST = 86400.0  # seconds of latency


@dataclass(frozen=True, slots=True)
class ChaosInjected(Event):
    """A call was disturbed: `what` with, and for how many `seconds` if that was latency."""

    what: Injected
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ChaosSnapshot:
    """How often each was injected. Counters only grow."""

    latency: int
    exception: int
    result: int


class Chaos(AroundPolicy):
    """Disturbs a share `rate` of the calls while it is enabled, and nothing unless it is.

    A disturbed call takes `latency` longer; then it raises `exception` or returns `result` instead of making the
    call, or makes it if neither is given. With `after` the call is made first, and it is its answer that comes late
    or gets lost: the way to find out who tries again what has happened already.

    Put it innermost, where the fault of a dependency would be, so that every policy meets it.

    Args:
        name: labels events, metrics and logs.
        rate: share of calls to disturb.
        latency: seconds to add, or a function that returns them.
        exception: what to raise: an exception class, or a function that makes one for each call.
        result: a function that makes what to return instead.
        after: disturb the answer instead of the call. A call that fails by itself keeps its own exception.
        enabled: True, or a function or context variable that says so for each call. Off by default, so that it may
            stay in place; `update(enabled=True)` switches it on.
        rng: decides which calls; give a seeded one to repeat a run.
        listeners: called with its `ChaosInjected` events.

    A plain function on a thread that runs an event loop gets no latency, since that would stop the loop; an async
    generator is disturbed before it starts.

    Examples:
        >>> flaky = Chaos("flaky", rate=1.0, exception=ConnectionError, enabled=True)
        >>> flaky(len)("four")
        Traceback (most recent call last):
        ConnectionError
    """

    kind = "chaos"

    def __init__(
        self,
        name: str,
        *,
        rate: float = 0.001,
        latency: float | timedelta | Callable[[], float | timedelta] | None = None,
        exception: Callable[[], BaseException] | None = None,
        result: Callable[[], object] | None = None,
        after: bool = False,
        enabled: Enabled = False,
        rng: Random | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.rate = checks.fraction("rate", rate)
        self.latency = latency if latency is None or callable(latency) else checks.seconds("latency", latency)
        for setting, made in (("exception", exception), ("result", result)):
            if not (made is None or callable(made)):
                raise TypeError(f"{setting} must be a function that makes one for each call, got {made!r}")
        if exception is not None and result is not None:
            raise TypeError("a call can't raise and return: give exception or result, not both; use two Chaos objects")
        if not isinstance(after, bool):
            raise TypeError(f"after must be True or False, got {after!r}")
        if not (isinstance(enabled, (bool, ContextVar)) or callable(enabled)):
            raise TypeError(f"enabled must be a bool, a function or a ContextVar, got {enabled!r}")
        if not isinstance(rng, Random | None):
            raise TypeError(f"rng must be a random.Random, got {rng!r}")
        if self.latency is not None and not callable(self.latency) and self.latency > LONGEST:
            raise ValueError(f"latency must be {LONGEST:g} s or less, got {latency!r}")
        self.exception, self.result, self.after, self.enabled = exception, result, after, enabled
        self.streams = result is None and not after  # a stream has no one result, nor a time after
        self.rng = Random() if rng is None else rng
        self._injected: dict[str, int] = {"latency": 0, "exception": 0, "result": 0}
        self._register()

    def around(self, call: Callable[[], Awaitable[T]]) -> Awaitable[T]:  # type: ignore[override]
        """Run `call`, disturbed or not. While it is off this is the call itself, with no frame of ours around it."""
        return call() if self.enabled is False or not self._hits() else self._disturbed(call)

    def around_sync(self, call: Callable[[], T]) -> T:
        """The same for plain functions."""
        if self.enabled is False or not self._hits():
            return call()
        replace = self._replacement()
        if not self.after:
            self._delay_sync()
            return call() if replace is None else replace()
        answer = call()
        self._delay_sync()
        return answer if replace is None else replace()

    async def open_stream(
        self, call: Callable[[], AsyncGenerator[T, Any]]
    ) -> tuple[AsyncGenerator[T, Any] | None, list[T]]:
        """The stream that `call` opens; only its start is disturbed."""
        if self.enabled is not False and self._hits():
            replace = self._replacement() if self.result is None else None
            await self._delay()
            if replace is not None:
                replace()
        return call(), []

    async def _disturbed(self, call: Callable[[], Awaitable[T]]) -> T:
        replace = self._replacement()
        if not self.after:
            await self._delay()
            return await call() if replace is None else replace()
        answer = await call()
        await self._delay()
        return answer if replace is None else replace()

    def _hits(self) -> bool:
        """Whether this call is to be disturbed."""
        return (self.enabled is True or _says_yes(self.enabled)) and self.rng.random() < self.rate

    def _replacement(self) -> Callable[[], Any] | None:
        """What runs instead of the call, if anything does."""
        exception, result = self.exception, self.result  # read once: an update may come between
        if exception is not None:
            return partial(self._raise, exception)
        return None if result is None else partial(self._return, result)

    def _raise(self, exception: Callable[[], BaseException]) -> NoReturn:
        self._record("exception")
        raise exception()

    def _return(self, result: Callable[[], object]) -> object:
        self._record("result")
        return result()

    async def _delay(self) -> None:
        if seconds := self._seconds():
            self._record("latency", seconds)
            await pause(seconds)

    def _delay_sync(self) -> None:
        if (seconds := self._seconds()) and gate.pause_sync(seconds):
            self._record("latency", seconds)

    def _seconds(self) -> float:
        latency = self.latency  # read once: an update may come between
        return events.ask(_as_seconds, latency, otherwise=0.0) if callable(latency) else latency or 0.0

    def _record(self, what: Injected, seconds: float = 0.0) -> None:
        with self._lock:
            self._injected[what] += 1
        self._tell(ChaosInjected, what, seconds)

    def _adopt(self, fresh: Self, now: float) -> None:
        self.rate, self.latency, self.exception, self.result = fresh.rate, fresh.latency, fresh.exception, fresh.result
        self.after, self.enabled, self.rng = fresh.after, fresh.enabled, fresh.rng

    def snapshot(self) -> ChaosSnapshot:
        """What was injected so far."""
        with self._lock:
            return ChaosSnapshot(**self._injected)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        with self._lock:
            return dict(self._injected)

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters: whether it is on; NaN where that depends on the call."""
        return {"enabled": float(self.enabled) if isinstance(self.enabled, bool) else math.nan}


def _says_yes(enabled: Enabled) -> bool:
    if isinstance(enabled, ContextVar):
        try:
            return bool(enabled.get())
        except LookupError:
            return False
    return callable(enabled) and bool(events.ask(enabled, otherwise=False))


def _as_seconds(latency: Callable[[], float | timedelta]) -> float:
    """What a function says, or 0 for what is no time to wait."""
    seconds = latency()
    if isinstance(seconds, timedelta):
        seconds = seconds.total_seconds()
    return min(seconds, LONGEST) if seconds > 0 else 0.0
