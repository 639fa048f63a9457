"""One run of a function that several callers wait for: a single flight."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from seawall.core import ambient, gate
from seawall.core.sleeping import Sleeper, ThreadSleeper, async_sleeper
from seawall.core.tasks import Work, spawn

T = TypeVar("T")
Landed = Callable[["Flight[Any]", Any, BaseException | None], None]


class Leg:
    """What a flight's own code, and all it calls, knows of it: enough to tell who waits for whom."""

    __slots__ = ("over", "waits_for")

    def __init__(self) -> None:
        self.over = False
        self.waits_for: list[Leg] = []


_GROUND = Leg()  # of code that no flight waits for
_aboard: ContextVar[tuple[Leg, ...]] = ContextVar("seawall_flights", default=())  # outermost first


class Flight(Generic[T]):
    """One run, its outcome, and who waits for it. What several threads see changes under the gate's lock.

    Args:
        landed: called with the flight and how its run ended, before anybody else knows; it may `answer` instead.
    """

    __slots__ = (
        "_context",
        "_error",
        "_kept",
        "_landed",
        "_result",
        "_sleepers",
        "_trace",
        "_work",
        "done",
        "given_up",
        "leg",
        "stale",
    )

    def __init__(self, landed: Landed) -> None:
        self.leg = Leg()
        self.done = False
        self.given_up = False  # the last who waited has left
        self.stale = False  # its outcome is an old value
        self._landed = landed
        self._result: T | None = None
        self._error: BaseException | None = None
        self._trace: TracebackType | None = None
        self._context: BaseException | None = None
        self._sleepers: dict[Sleeper | ThreadSleeper, None] = {}
        self._work: Work | None = None
        self._kept = False

    def start(self, call: Callable[[], Awaitable[T]], *, keep: bool = False) -> None:
        """Run `call` in a task of its own; with `keep`, it goes on though nobody waits.

        It runs in a copy of the caller's context, but without its deadline, which is not that of the others.
        """
        self._kept = keep
        context = copy_context()
        context.run(_aboard.set, self._on_top())
        if ambient.deadline.get() < math.inf:
            context.run(ambient.deadline.set, math.inf)
        self._work = spawn(call, self.land, context)
        if keep:
            self._work.keep()

    def run(self, call: Callable[[], T]) -> None:
        """Run `call`, a plain function, here and now."""
        joined = self.join()
        token = _aboard.set(self._on_top())
        try:
            result = call()
        except BaseException as exc:
            self.land(None, exc)
        else:
            self.land(result, None)
        finally:
            _aboard.reset(token)
            self.leave(joined)
            del self, joined, token  # an error's traceback refers to this frame

    def _on_top(self) -> tuple[Leg, ...]:
        """The flights that this one's code runs in."""
        return (*[leg for leg in _aboard.get() if not leg.over], self.leg)

    def land(self, result: T | None, exc: BaseException | None) -> bool:
        """The run ended, so everybody who waits gets its outcome; whether anybody does."""
        self._result, self._error = result, exc
        if exc is not None:
            self._trace, self._context = exc.__traceback__, exc.__context__
        self._landed(self, result, exc)
        with gate.lock:
            self.done = self.leg.over = True
            sleepers, self._sleepers = self._sleepers, {}
            for sleeper in sleepers:
                sleeper.ring()
        return bool(sleepers)

    def answer(self, value: T, *, stale: bool) -> None:
        """Give everybody this value in place of the error."""
        self._result, self.stale = value, stale
        self._error = self._trace = self._context = None

    def join(self) -> Leg | None:
        """Say that the code that runs here waits for this flight from now on: then `wait`, and `leave` with the answer.

        None if the flight can't land before that code ends: it would wait for ever.
        """
        aboard = _aboard.get()
        if not aboard:
            return _GROUND
        seen: set[Leg] = set()
        ahead = [self.leg]
        with gate.lock:
            while ahead:
                leg = ahead.pop()
                if leg in aboard:
                    return None
                if leg not in seen:
                    seen.add(leg)
                    ahead.extend(leg.waits_for)
            aboard[-1].waits_for.append(self.leg)
        return aboard[-1]

    def leave(self, joined: Leg | None) -> None:
        """The code that `joined` waits no longer. Perhaps in another context, if it was dropped."""
        if joined is not None and joined is not _GROUND:
            with gate.lock:
                joined.waits_for.remove(self.leg)

    async def wait(self) -> None:
        """Wait until it has landed. Who is cancelled leaves the others waiting; the last one calls the run off."""
        sleeper = async_sleeper()
        with gate.lock:
            if self.done:
                return
            self._sleepers[sleeper] = None
        try:
            await sleeper.sleep(math.inf)
        except BaseException as exc:
            with gate.lock:
                self._sleepers.pop(sleeper, None)
                self.given_up = not (self._sleepers or self._kept)
            if self.given_up:
                await self._call_off(wait=not isinstance(exc, GeneratorExit))
            raise
        finally:
            sleeper.rise()

    async def _call_off(self, *, wait: bool) -> None:
        assert self._work is not None
        self._work.cancel()
        if wait:
            await self._work.ended()
        else:
            self._work.keep()

    def wait_sync(self) -> bool:
        """Wait in this thread until it has landed; False if its run was interrupted, and says nothing."""
        sleeper = ThreadSleeper()
        with gate.lock:
            if self.done:
                sleeper.ring()
            else:
                self._sleepers[sleeper] = None
        try:
            sleeper.sleep_sync(math.inf)
        finally:
            with gate.lock:
                self._sleepers.pop(sleeper, None)
        return self._error is None or isinstance(self._error, Exception)

    def outcome(self) -> T:
        """What everybody gets: the result, or the error as it was when the run ended, whoever raised it since."""
        error, trace, context = self._error, self._trace, self._context
        if error is None:
            return cast(T, self._result)
        try:
            raise error.with_traceback(trace)
        finally:
            error.__context__ = context
            del self, error, trace, context  # the error's traceback refers to this frame
