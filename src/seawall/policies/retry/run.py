"""One call through a retry: what is remembered of it, and what its time limit does."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio

from seawall.core import ambient, gate
from seawall.core.errors import CallTimeoutError
from seawall.core.events import Event
from seawall.core.protocol import SharedExpiry
from seawall.core.sleeping import on_asyncio, on_trio
from seawall.core.timers import arm, disarm, show
from seawall.policies.retry.rules import Attempt, Reason

if TYPE_CHECKING:
    from seawall.policies.retry.policy import Retry

LONGEST = 1e9  # seconds that `time.sleep` can be asked for; a generation


@dataclass(frozen=True, slots=True)
class RetryScheduled(Event):
    """Attempt number `attempt` is followed by another after `delay` seconds. No error: its result was not accepted."""

    attempt: int
    error: Exception | None
    delay: float


@dataclass(frozen=True, slots=True)
class RetryGivenUp(Event):
    """A call ended with an outcome that would be retried, after `attempts` attempts, for `reason`."""

    attempts: int
    error: Exception | None
    reason: Reason


class Run:
    """One call through a retry: which attempt it is at, how the last one ended, when all must be over."""

    __slots__ = (
        "_began",
        "_blocks",
        "_budget",
        "_drawn",
        "_extra",
        "_slept",
        "ended",
        "expiry",
        "limit",
        "number",
        "pause",
        "policy",
        "timeout",
    )

    def __init__(self, policy: Retry, *, blocks: bool = False) -> None:
        self.policy = policy
        # as they were when the call began
        self.timeout = math.inf if policy.timeout is None else policy.timeout
        self._budget = policy.budget
        self._began = gate.now()
        self.limit = self._began + self.timeout
        self.expiry: _Limit | None = None  # cancels the attempt in flight
        self.ended: Attempt | None = None  # the last that ended
        self.pause: float | None = None  # before the next attempt, once that is decided
        self._blocks = blocks  # its pauses block the thread
        self.number = 1
        self._drawn = 0.0
        self._slept = 0.0
        self._extra = False  # whether an attempt that the budget allowed is not over
        if self._budget is not None:
            self._budget.call_began(self._began)

    def after(self, error: Exception | None, result: object) -> float | None:
        """An attempt ended. Seconds to pause before the next one, or None: so ends the call."""
        self._give_back()
        self.pause = None
        policy = self.policy
        if (error is None and not policy.judges_results) or not policy.wants(self.number, error, result):
            policy._count(failed=error is not None, retried=self.number > 1)
            return None
        now = gate.now()
        self.ended = attempt = Attempt(self.number, error, result, now - self._began, self._slept)
        verdict = self._follow(attempt, now)
        if isinstance(verdict, Reason):
            self.give_up(verdict)
        else:
            self.pause, self._drawn = verdict
            policy._tell(RetryScheduled, attempt.number, error, self.pause)
        return self.pause

    def _follow(self, attempt: Attempt, now: float) -> tuple[float, float] | Reason:
        if self.expiry is not None and self.expiry.expired:  # timers ring a little early, and clocks differ
            return Reason.TIMEOUT
        inherited = ambient.deadline.get()
        verdict = self.policy.follow(attempt, self._drawn, min(self.limit, inherited) - now)
        if verdict is Reason.TIMEOUT and inherited < self.limit:
            return Reason.DEADLINE
        if isinstance(verdict, Reason):
            return verdict
        if self._blocks and (on_asyncio() or on_trio()):
            return Reason.EVENT_LOOP
        if self._budget is not None:
            if not self._budget.allow_extra(now):
                return Reason.BUDGET
            self._extra = True
        return verdict

    def resume(self) -> bool:
        """The pause is over. False if so is the time of the call, which then ends as `last` says."""
        self._slept += self.pause or 0.0
        self.pause = None
        inherited = ambient.deadline.get()
        if gate.now() >= min(self.limit, inherited):
            self.give_up(Reason.DEADLINE if inherited < self.limit else Reason.TIMEOUT)
            return False
        self.number += 1
        with self.policy._lock:
            self.policy._retries += 1
        return True

    def give_up(self, reason: Reason) -> None:
        """The call ends with the last outcome, though it is one to retry."""
        self.policy._count(failed=True, retried=self.number > 1)
        self.policy._tell(RetryGivenUp, self.number, self.ended and self.ended.error, reason)

    def last(self) -> Any:  # whatever the user's function returns
        """The last attempt's outcome, as it was."""
        ended, self.ended = self.ended, None
        assert ended is not None
        try:
            if ended.error is not None:
                raise ended.error
            return ended.result
        finally:
            del ended  # or the error, its traceback and this frame would be a cycle

    def close(self) -> None:
        """The call is over, however it ended."""
        self.ended = None
        self._give_back()
        budget, self._budget = self._budget, None
        if budget is not None:
            budget.call_ended()

    def _give_back(self) -> None:
        if self._extra and self._budget is not None:
            self._extra = False
            self._budget.extra_ended()


class _Limit(SharedExpiry):
    """A run's time limit as the loop's timers and the calls inside see it."""

    __slots__ = ()

    def left(self, now: float) -> float:
        """The same for every call, so that they share a queue of the loop's timers."""
        return self.after


class TimeLimit:
    """Bounds a block by a run's time limit: calls inside see it as their deadline, and asynchronous ones are cancelled.

    If an attempt has ended before, its outcome is what the caller gets: the block ends quietly, for `last` to tell.
    """

    __slots__ = ("_cancel", "_cancels", "_run")

    def __init__(self, run: Run, *, after: float, cancels: bool) -> None:
        run.expiry = _Limit(after, run.limit)
        self._run = run
        self._cancels = cancels
        self._cancel: anyio.CancelScope | None = None

    def __enter__(self) -> None:
        expiry = self._expiry
        if not self._cancels:
            show(expiry)
        elif not arm(expiry, gate.now(), gate.clock):
            show(expiry)
            self._cancel = anyio.move_on_after(expiry.after).__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> bool:
        expired = self._expired(kind, exc, trace)
        if expired:
            self._run.give_up(Reason.TIMEOUT)
            if self._run.ended is None:
                raise CallTimeoutError(self._run.policy.name, self._run.timeout) from exc
        return expired

    def _expired(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> bool:
        disarm(self._expiry)
        if self._cancel is None:
            return self._expiry.expired and isinstance(exc, asyncio.CancelledError)
        self._cancel.__exit__(kind, exc, trace)
        return self._cancel.cancelled_caught

    @property
    def _expiry(self) -> _Limit:
        assert self._run.expiry is not None
        return self._run.expiry
