"""Retry budget: how much the extra attempts of retries and hedges may add to the load, all together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, Self

from seawall.core import checks, events
from seawall.core.counts import RollingWindow
from seawall.core.events import Event, Listener
from seawall.core.policy import PolicyBase

_SLOTS = 10
_CALLS, _EXTRAS = 0, 1


class Budget(Protocol):
    """What retries and hedges ask of a budget, and all they need to know of it.

    They say when each call of theirs begins and ends, ask before each attempt after a call's first one, and say
    when such an attempt is over. Ask and tell without the gate's lock. A policy that takes one declares this
    protocol for itself: no policy imports another.
    """

    def call_began(self, now: float) -> None:
        """A call began: its first attempt, which needs no leave."""

    def call_ended(self) -> None:
        """A call that began is over, however it ended."""

    def allow_extra(self, now: float) -> bool:
        """May one more attempt be added? If so it counts from now on, its pause before it included."""

    def extra_ended(self) -> None:
        """An attempt that was allowed is over, or never came."""


@dataclass(frozen=True, slots=True)
class RetryBudgetExhausted(Event):
    """An extra attempt was not allowed, the first since the last one that was."""

    ratio: float


@dataclass(frozen=True, slots=True)
class RetryBudgetSnapshot:
    """A budget at one moment: `balance` extra attempts could start now. Counters only grow."""

    balance: float
    in_flight: int
    extra_in_flight: int
    calls: int
    extras: int
    refused: int


class RetryBudget(PolicyBase):
    """Lets extra attempts be at most `ratio` of the calls, or `floor` where calls are few.

    When everything fails, three attempts a call are three times the load, which keeps down what is down already. One
    budget shared by the retries and hedges of a dependency bounds that: an exhausted one suppresses only the new
    attempt, never one that runs. It is no decorator: give it to them as `budget=`.

    It counts what began in a `window` of seconds; or, where the window is None, what is in flight, which needs no time
    and adapts at once, but lets short failures through faster than the calls they belong to.

    Args:
        name: labels events and metrics.
        ratio: extra attempts per call, as a fraction.
        floor: extra attempts that are always allowed: per second of the window (1 unless told), or in flight
            together (3 unless told).
        window: seconds to look back over, in ten slots; None counts what is in flight instead.
        listeners: called with its `RetryBudgetExhausted` events.

    Examples:
        >>> budget = RetryBudget("payments", ratio=0.2, floor=0, window=10.0)
        >>> for _ in range(5):
        ...     budget.call_began(now=0.0)
        >>> budget.allow_extra(now=1.0), budget.allow_extra(now=1.0)
        (True, False)
    """

    kind = "retry_budget"

    def __init__(
        self,
        name: str,
        *,
        ratio: float = 0.2,
        floor: float | None = None,
        window: float | timedelta | None = 10.0,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.ratio = checks.fraction("ratio", ratio)
        self.floor = floor if floor is None else _amount("floor", floor)
        self.window = window if window is None else checks.window("window", window)
        self._counts = [0, 0]  # calls and extra attempts that ever began
        self._refused = 0
        self._in_flight = 0
        self._extra_in_flight = 0
        self._exhausted = False
        self._begin_window()
        self._register()

    def _begin_window(self) -> None:
        self._window = None if self.window is None else RollingWindow(self.window, slots=_SLOTS, width=2)
        least = self.floor if self.floor is not None else 3.0 if self.window is None else 1.0
        self._least = least if self.window is None else least * self.window

    def call_began(self, now: float) -> None:
        """A call began; it earns `ratio` of an extra attempt."""
        with self._lock:
            if self._window is not None and now >= self._window.turns_at:
                self._window.turn(now, self._counts)
            self._counts[_CALLS] += 1
            self._in_flight += 1

    def call_ended(self) -> None:
        """A call that began is over, however it ended."""
        with self._lock:
            self._in_flight -= 1

    def allow_extra(self, now: float) -> bool:
        """Whether one more attempt may be added now; if so, it is."""
        with self._lock:
            if self._window is not None and now >= self._window.turns_at:
                self._window.turn(now, self._counts)
            allowed = self._balance(now) > 1 - 1e-9  # five calls at 0.2 are one attempt, rounding or not
            if allowed:
                self._counts[_EXTRAS] += 1
                self._extra_in_flight += 1
            else:
                self._refused += 1
                if not self._exhausted:
                    self._emit(RetryBudgetExhausted, now, self.ratio)
            self._exhausted = not allowed
        if events.pending:
            events.deliver()
        return allowed

    def extra_ended(self) -> None:
        """An attempt that was allowed is over, or never came."""
        with self._lock:
            self._extra_in_flight -= 1

    def _balance(self, now: float) -> float:
        """Extra attempts that could start now."""
        if self._window is None:
            return max(self._least, self.ratio * self._in_flight) - self._extra_in_flight
        calls, extras = self._window.since(now, self._counts)
        return self._least + self.ratio * calls - extras

    def _adopt(self, fresh: Self, now: float) -> None:
        anew = fresh.window != self.window
        self.ratio, self.floor, self.window = fresh.ratio, fresh.floor, fresh.window
        window = self._window
        self._begin_window()
        if not anew:
            self._window = window

    def snapshot(self) -> RetryBudgetSnapshot:
        """Balance and counters at one moment."""
        with self._lock:
            return RetryBudgetSnapshot(
                balance=max(0.0, self._balance(self._now())),
                in_flight=self._in_flight,
                extra_in_flight=self._extra_in_flight,
                calls=self._counts[_CALLS],
                extras=self._counts[_EXTRAS],
                refused=self._refused,
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {"first": snapshot.calls, "extra": snapshot.extras, "refused": snapshot.refused}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        return {
            "balance": snapshot.balance,
            "in_flight": snapshot.in_flight,
            "extra_in_flight": snapshot.extra_in_flight,
        }


def _amount(setting: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{setting} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{setting} must be 0 or more and finite, got {value!r}")
    return float(value)
