"""What comes after an attempt, as a pure function of how it ended: a pause, or a reason to give up."""

from __future__ import annotations

import enum
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar, runtime_checkable

from seawall.core import checks
from seawall.core.errors import Rejected
from seawall.core.events import ask

if TYPE_CHECKING:
    from tenacity import RetryCallState

R = TypeVar("R")


class Reason(enum.StrEnum):
    """Why a call was given up though its outcome was one to retry."""

    ATTEMPTS = "attempts"  # all were made, or `stop` said so
    TIMEOUT = "timeout"  # of the retry itself
    DEADLINE = "deadline"  # that the call inherited
    RETRY_AFTER = "retry_after"  # later than there is time for, or never, or nobody knows when
    BUDGET = "budget"
    EVENT_LOOP = "event_loop"  # a pause would block it


@dataclass(frozen=True, slots=True)
class Attempt:
    """How an attempt ended: what `wait` and `stop` rules of your own are called with.

    Attributes:
        number: of the attempt, from 1.
        error: what it raised, or None.
        result: what it returned, or None.
        elapsed: seconds since the call began.
        slept: seconds of that spent in pauses.
        pause: seconds before the next attempt; 0 while `wait` decides that.
    """

    number: int
    error: Exception | None
    result: object
    elapsed: float
    slept: float = 0.0
    pause: float = 0.0


@runtime_checkable
class Budget(Protocol):
    """What a retry asks of a budget, such as a `RetryBudget`."""

    def call_began(self, now: float) -> None:
        """A call began: its first attempt, which needs no leave."""

    def call_ended(self) -> None:
        """A call that began is over, however it ended."""

    def allow_extra(self, now: float) -> bool:
        """May one more attempt be added? If so it counts from now on, its pause before it included."""

    def extra_ended(self) -> None:
        """An attempt that was allowed is over, or never came."""


# `...`, because tenacity's objects take a state of their own, and a predicate may take a narrower type.
On: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[..., bool]
Duration: TypeAlias = float | timedelta
Wait: TypeAlias = float | timedelta | Callable[..., float]
Stop: TypeAlias = Callable[..., bool]


class Rules:
    """The settings of a retry, and what follows from them. Knows no call, no clock and no lock."""

    def __init__(
        self,
        *,
        on: On,
        on_result: Callable[..., bool] | None,
        attempts: int | None,
        timeout: Duration | None,
        wait_initial: Duration,
        wait_max: Duration,
        jitter: bool,
        wait: Wait | None,
        stop: Stop | None,
        retry_after: Callable[..., Duration | None] | None,
        budget: Budget | None,
    ) -> None:
        self.on = on
        self.on_result = on_result
        self.attempts = attempts if attempts is None else checks.count("attempts", attempts)
        self.timeout = timeout if timeout is None else checks.seconds("timeout", timeout)
        self.wait_initial = checks.seconds("wait_initial", wait_initial)
        self.wait_max = checks.seconds("wait_max", wait_max)
        self.jitter = jitter
        self.wait = wait if wait is None or callable(wait) else checks.seconds("wait", wait, zero=True)
        self.stop = stop
        self.retry_after = retry_after
        self.budget = budget
        self._check_together()
        self._classes, self._predicate, self._rule = _sorted_out(on)
        self._wait = _rule("wait", self.wait, "wait_base") if callable(self.wait) else None
        self._stop = None if stop is None else _rule("stop", stop, "stop_base")
        for setting in ("on_result", "retry_after"):
            if getattr(self, setting) is not None:
                checks.function(setting, getattr(self, setting))
        self.judges_results = on_result is not None or self._rule is not None
        # Whether a call is watched from its start, or costs nothing until it first fails.
        self.watches = self.judges_results or any(
            rule is not None for rule in (self.timeout, budget, self._wait, self._stop)
        )

    def _check_together(self) -> None:
        if self.attempts is None and self.timeout is None and self.stop is None:
            raise ValueError("attempts=None never ends: give a timeout or a stop rule with it")
        if self.wait_initial > self.wait_max:
            raise ValueError(
                f"wait_initial must be at most wait_max ({self.wait_max:g} s), got {self.wait_initial:g} s"
            )
        if not isinstance(self.jitter, bool):
            raise TypeError(
                f"jitter must be True or False, got {self.jitter!r}; wait_initial and wait_max set its range"
            )
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise TypeError(f"budget must be a RetryBudget or do what one does, got {self.budget!r}")

    def wants(self, number: int, error: Exception | None, result: object) -> bool:
        """Whether attempt `number`, which ended so, is one to retry."""
        if self._rule is not None:
            return bool(ask(self._rule, Attempt(number, error, result, 0.0), otherwise=False))
        if error is None:
            return self.on_result is not None and bool(ask(self.on_result, result, otherwise=False))
        if self._predicate is not None:
            return bool(ask(self._predicate, error, otherwise=False))
        return isinstance(error, self._classes or ())

    def follow(self, attempt: Attempt, drawn: float, left: float) -> tuple[float, float] | Reason:
        """The pause after an attempt to retry, and what to call `drawn` the next time; or why there is none.

        `drawn` is the last pause that was drawn here, 0 at first; `left` is what remains of the call's time.
        """
        if self._stop is None and self.attempts is not None and attempt.number >= self.attempts:
            return Reason.ATTEMPTS
        hint = self._hint(attempt)
        if hint is not None:
            pause = self._when_told(hint, left)
        elif isinstance(attempt.error, Rejected) and not self._names_refusals(attempt.error):
            return Reason.RETRY_AFTER
        elif (told := self._waited(attempt)) is not None:
            pause = told
        else:
            pause = drawn = self._draw(drawn, left)
        if self._stop is not None and ask(self._stop, replace(attempt, pause=pause), otherwise=True):
            return Reason.ATTEMPTS
        if pause < left:
            return pause, drawn
        return Reason.TIMEOUT if hint is None and pause < math.inf else Reason.RETRY_AFTER

    def _hint(self, attempt: Attempt) -> float | None:
        """When the callee said to come back, in seconds; infinity for never, None where it did not say."""
        outcome = attempt.result if attempt.error is None else attempt.error
        if self.retry_after is not None:
            told = self.retry_after
            hint = ask(lambda: _checked("retry_after", told(outcome)), otherwise=None)
            if hint is not None:
                return hint
        return ask(_attribute, outcome, otherwise=None)

    def _when_told(self, hint: float, left: float) -> float:
        """Not before the callee said, and not all at once then; infinity if that is too late to wait for."""
        longest = left if left < math.inf else self.wait_max
        if hint >= longest:
            return math.inf
        spread = min(self.wait_initial, longest - hint) if self.jitter else 0.0
        return hint + spread * random.random()

    def _names_refusals(self, error: Rejected) -> bool:
        """Whether a refusal is to be retried though nobody knows when: `on` names it, or has looked at it."""
        return self._classes is None or any(
            issubclass(one, Rejected) and isinstance(error, one) for one in self._classes
        )

    def _waited(self, attempt: Attempt) -> float | None:
        """The pause that `wait` says, if it is given and makes sense."""
        if isinstance(self.wait, float):
            return self.wait
        rule = self._wait
        return None if rule is None else ask(lambda: _checked("wait", rule(attempt)), otherwise=None)

    def _draw(self, drawn: float, left: float) -> float:
        """Decorrelated jitter, from `wait_initial` to thrice the last one.

        The range is capped, not what is drawn from it, so clients at the cap stay apart; and it ends at what is left,
        so the last pause leaves time for an attempt.
        """
        if not self.jitter:
            return min(self.wait_max, 2 * drawn) if drawn else self.wait_initial
        longest = min(self.wait_max, 3 * (drawn or self.wait_initial), left)
        if longest <= self.wait_initial:
            return self.wait_initial
        return self.wait_initial + (longest - self.wait_initial) * random.random()


_Sorted: TypeAlias = tuple[
    tuple[type[BaseException], ...] | None, Callable[..., bool] | None, Callable[[Attempt], bool] | None
]


def _sorted_out(on: On) -> _Sorted:
    """`on` as one of three: classes, a predicate on errors, or a rule of tenacity's on attempts."""
    if isinstance(on, (type, tuple)):
        classes = checks.exceptions("on", on)
        for one in classes:
            if not issubclass(one, Exception):
                raise TypeError(
                    f"on must be exceptions, and {one.__name__} ends a program or a task: nothing retries it"
                )
        return classes, None, None
    if _of_tenacity(on):
        return None, None, _rule("on", on, "retry_base")
    if not callable(on):
        raise TypeError(f"on must be an exception class, a tuple of them or a function of one, got {on!r}")
    return None, checks.function("on", on), None


def _rule(setting: str, rule: Callable[..., R], base: str) -> Callable[[Attempt], R]:
    """`rule` as a function of an `Attempt`. tenacity's are given what they expect instead."""
    checks.function(setting, rule)
    if not _of_tenacity(rule):
        return rule
    if not _of_tenacity(rule, base):
        raise TypeError(f"{setting} must be one of tenacity's {base[:-5]}_* objects, got {rule!r}")
    return lambda attempt: rule(_state(attempt))


def _of_tenacity(rule: object, base: str = "") -> bool:
    """Whether `rule` is one of tenacity's. Without importing it: while it is not loaded, nothing is."""
    if "tenacity" not in sys.modules:
        return False
    from tenacity.retry import retry_base
    from tenacity.stop import stop_base
    from tenacity.wait import wait_base

    bases = {"stop_base": stop_base, "wait_base": wait_base, "retry_base": retry_base}
    return isinstance(rule, bases[base] if base else tuple(bases.values()))


def _state(attempt: Attempt) -> RetryCallState:
    """What tenacity's rules look at. The function and its arguments are none of their business."""
    from tenacity import Future, RetryCallState

    state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
    state.attempt_number = attempt.number
    state.idle_for = attempt.slept
    state.upcoming_sleep = attempt.pause
    state.start_time, state.outcome_timestamp = 0.0, attempt.elapsed
    state.outcome = Future(attempt.number)
    if attempt.error is None:
        state.outcome.set_result(attempt.result)
    else:
        state.outcome.set_exception(attempt.error)
    return state


def _attribute(outcome: object) -> float | None:
    """The `retry_after` of `outcome`; None where it knows no time, or means something else by that name."""
    value = getattr(outcome, "retry_after", None)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        return None
    return checks.seconds("retry_after", value, zero=True, infinite=True)


def _checked(setting: str, value: Duration | None) -> float | None:
    return value if value is None else checks.seconds(setting, value, zero=True, infinite=True)
