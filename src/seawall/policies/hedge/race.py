"""One hedged call: its attempts, and which of them decides it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast, runtime_checkable

from seawall.core import ambient, gate, watching
from seawall.core.sleeping import Sleeper, async_sleeper
from seawall.core.tasks import Work, spawn

if TYPE_CHECKING:
    from seawall.policies.hedge.policy import Hedge

T = TypeVar("T")
_MISSING = object()


@runtime_checkable
class Budget(Protocol):
    """What a hedge asks of a budget, such as a `RetryBudget`."""

    def call_began(self, now: float) -> None:
        """A call began: its first attempt, which needs no leave."""

    def call_ended(self) -> None:
        """A call that began is over, however it ended."""

    def allow_extra(self, now: float) -> bool:
        """May one more attempt be added? If so it counts from now on."""

    def extra_ended(self) -> None:
        """An attempt that was allowed is over."""


class Attempt(Generic[T]):
    """One of the attempts of a call, from number 1."""

    __slots__ = ("began", "context", "number", "race", "work")

    def __init__(self, race: Race[T], number: int, began: float) -> None:
        self.race = race
        self.number = number
        self.began = began
        self.context = race.home.copy()
        self.work: Work | None = None

    def ended(self, result: T | None, exc: BaseException | None) -> bool:
        """How it ended; whether the call takes the exception."""
        return self.race.ended(self, result, exc)

    def cancel(self) -> Work:
        """Cancel it; it may take its time to end."""
        assert self.work is not None
        self.work.cancel()
        return self.work


class Race(Generic[T]):
    """The attempts of one call. Lives on one event loop, so it needs no lock."""

    __slots__ = (
        "_call",
        "_changed",
        "_closed",
        "_error",
        "_failed",
        "_hedge",
        "_result",
        "_sleeper",
        "attempts",
        "began",
        "budget",
        "delay",
        "home",
        "latency",
        "over",
        "running",
        "winner",
    )

    def __init__(self, hedge: Hedge, call: Callable[[], Awaitable[T]]) -> None:
        self.budget = hedge.budget
        self.delay = hedge.current_delay
        self.began = gate.clock()
        self.home = copy_context()
        self.attempts = 0  # that were started
        self.running: dict[Attempt[T], None] = {}
        self.winner = 0  # the number of the attempt that decided it
        self.over = False  # its caller goes on, so nobody takes what comes now
        self.latency: float | None = None  # of the first attempt, if it was good
        self._hedge = hedge
        self._call = call
        self._changed: Context | None = None  # the winner's
        self._closed = False  # to more attempts
        self._failed: list[BaseException | None] = []  # the errors of attempts that failed since we last looked
        self._result: T | None = None  # of the winner; while there is none, of the first attempt
        self._error: BaseException | None = None
        self._sleeper: Sleeper | None = None

    async def run(self) -> None:
        """Start attempts until one decides the call, or all have failed."""
        self._start(self.began)
        while True:
            if not self.winner and not self._failed:
                await self._look()
            if self.winner:
                return
            error = self._failed[-1] if self._failed else None
            self._failed.clear()
            now = gate.clock()
            if self._may_start(now):
                self._start(now)
                self._hedge._tell_started(self, now, error)
            elif self.running:
                self._closed = True
            else:
                return

    async def _look(self) -> None:
        """Wait until an attempt ends, or the next one is due."""
        wait = self.delay
        if self._closed or self.attempts >= self._hedge.attempts:
            wait = math.inf
        self._sleeper = sleeper = async_sleeper()
        try:
            await sleeper.sleep(wait, wait)
        finally:
            sleeper.rise()

    def _may_start(self, now: float) -> bool:
        if self._closed or self.attempts >= self._hedge.attempts or now >= ambient.deadline.get():
            return False
        if self.budget is None or self.budget.allow_extra(now):
            return True
        self._hedge._count_suppressed()
        return False

    def _start(self, now: float) -> None:
        self.attempts += 1
        attempt = Attempt(self, self.attempts, now)
        self.running[attempt] = None
        call = self._call
        if self.attempts > 1:
            call = partial(watching.attempt, "hedge", self._hedge.name, self.attempts, self._call)
        attempt.work = spawn(call, attempt.ended, attempt.context)

    def ended(self, attempt: Attempt[T], result: T | None, exc: BaseException | None) -> bool:
        """How an attempt ended; whether the call takes the exception. Runs in the attempt's task."""
        del self.running[attempt]
        extra = attempt.number > 1
        if extra and self.budget is not None:
            self.budget.extra_ended()
        if self.over or self.winner:
            if self.winner:
                self._hedge._tell_lost(attempt, exc)
            return False
        good = self._hedge._accepts(result) if exc is None else not isinstance(exc, self._hedge.on)
        if good:
            self.winner, self._changed = attempt.number, attempt.context
        else:
            self._failed.append(exc)
        if good or not extra:
            self._result, self._error = result, exc
        if good and not extra and exc is None:
            self.latency = gate.clock() - attempt.began
        if self._sleeper is not None:
            self._sleeper.ring()
        return True

    @property
    def error(self) -> BaseException | None:
        """What the call raises, once it is decided."""
        return self._error

    def decide(self) -> T:
        """The outcome. Who still runs has lost; the caller's context gets what the winner changed in its own."""
        self.over = True
        for loser in self.running:
            loser.cancel().keep()
        if self._changed is not None:
            for variable, value in self._changed.items():
                if self.home.get(variable, _MISSING) is not value:
                    variable.set(value)
        error, self._error = self._error, None
        if error is None:
            return cast(T, self._result)
        try:
            raise error
        finally:
            del error  # or this frame, its traceback and the error would be a cycle

    async def call_off(self, *, wait: bool) -> None:
        """The caller leaves, so its attempts are cancelled; `wait` until they have ended."""
        self.over, self.winner, self._error = True, 0, None
        self._failed.clear()
        for work in [attempt.cancel() for attempt in self.running]:
            if wait:
                await work.ended()
            else:
                work.keep()
