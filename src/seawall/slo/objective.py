"""The objective as a guard: it refuses nothing and sees every call the way its caller does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import Self

from seawall.core import checks, events
from seawall.core.counts import RollingWindow
from seawall.core.errors import Rejected
from seawall.core.events import Event, Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token

HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True, slots=True)
class BudgetExhausted(Event):
    """The error budget of the window is used up."""

    burn_rate: float


@dataclass(frozen=True, slots=True)
class SLOSnapshot:
    """An objective at one moment. `good`, `bad` and `neither` only grow; the budget is of the window."""

    good: int
    bad: int
    neither: int
    target: float
    error_budget: float
    burn_rate_1h: float


class SLO(GuardPolicy):
    """Tracks a service level objective: a share `target` of calls succeed, and within `latency` seconds.

    Put it outermost, where it sees what the user sees: a call that a policy further in refused is bad here,
    though every other policy counts it as neither. Cancelled and abandoned calls count as neither.

    Counts are kept in three rings (10 s slots for an hour, 5 min for six hours, an hour for the window), so any
    look back is right to within one slot. `update` judges the calls from then on; another `window` looks back anew.

    Args:
        name: labels metrics, events and logs.
        target: share of calls in (0, 1) that must be good.
        latency: seconds within which a good call ends; None judges success alone.
        window: seconds over which the error budget is reckoned.
        on: exceptions that make a call bad.
        ignore: exceptions that count as neither all the same: of those, or refusals that are the caller's own fault.
        listeners: called with its `BudgetExhausted` events.

    Examples:
        >>> answers = SLO("answers", target=0.999, latency=0.5)
        >>> answers.snapshot().error_budget
        1.0
    """

    kind = "slo"

    def __init__(
        self,
        name: str,
        *,
        target: float,
        latency: float | timedelta | None = None,
        window: float | timedelta = 30 * DAY,
        on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        ignore: type[BaseException] | tuple[type[BaseException], ...] = (),
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.target = checks.fraction("target", target, one=False)
        self.latency = None if latency is None else checks.seconds("latency", latency)
        self.window = checks.window("window", window)
        self.on = checks.exceptions("on", on)
        self.ignore = checks.exceptions("ignore", ignore)
        self._judge_by()
        self._counts = [0, 0]  # good, bad
        self._neither = 0
        self._exhausted = False
        self._look_back()
        self._register()

    def _judge_by(self) -> None:
        self._tolerated = float(1 - Fraction(repr(self.target)))  # in floats 1 - 0.99 is more than 0.01
        self._slow_from = float("inf") if self.latency is None else self.latency

    def _look_back(self) -> None:
        spans = [(min(HOUR, self.window), 360), (min(6 * HOUR, self.window), 72), (self.window, 720)]
        self._rings = [RollingWindow(seconds, slots=slots, width=2) for seconds, slots in spans]
        self._turns_at = -float("inf")

    def _adopt(self, fresh: Self, now: float) -> None:
        self.target, self.latency, self.on, self.ignore = fresh.target, fresh.latency, fresh.on, fresh.ignore
        self._judge_by()
        if fresh.window != self.window:  # the past was not kept in slots of that length
            self.window = fresh.window
            self._look_back()
        self._exhausted = self._exhausted and self._budget(now) <= 0

    def enter(self, now: float) -> Token:
        """When the call began."""
        return now

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Good or bad, as the caller sees it."""
        if now >= self._turns_at:
            self._turn(now)
        if exc is None:
            if now - token <= self._slow_from:  # type: ignore[operator]
                self._counts[0] += 1
            else:
                self._bad(now)
        elif isinstance(exc, (Rejected, *self.on)) and not isinstance(exc, self.ignore):
            self._bad(now)
        else:
            self._neither += 1

    def _turn(self, now: float) -> None:
        for ring in self._rings:
            if now >= ring.turns_at:
                ring.turn(now, self._counts)
        self._turns_at = min(ring.turns_at for ring in self._rings)
        self._exhausted = self._exhausted and self._budget(now) <= 0

    def _bad(self, now: float) -> None:
        self._counts[1] += 1
        if not self._exhausted and events.audience(self._listeners) and self._budget(now) <= 0:
            self._exhausted = True
            self._emit(BudgetExhausted, now, self._burn(now, HOUR))

    def _burn(self, now: float, seconds: float) -> float:
        ring = next((ring for ring in self._rings if seconds <= ring.seconds), self._rings[-1])
        good, bad = ring.since(now, self._counts, seconds)
        return bad / (good + bad) / self._tolerated if good + bad else 0.0

    def _budget(self, now: float) -> float:
        return 1 - self._burn(now, self.window)

    def burn_rate(self, seconds: float | timedelta | None = None) -> float:
        """How fast the budget went over the last `seconds`; an hour, or the window if shorter, unless told.

        1 uses the budget up exactly at the window's end.

        Look backs are answered to within a slot (10 s up to an hour); one longer than the window is an error.
        """
        span = min(HOUR, self.window) if seconds is None else checks.seconds("seconds", seconds)
        if span > self.window:
            raise ValueError(f"seconds must be at most the window ({self.window:g} s), got {span:g}")
        with self._lock:
            return self._burn(self._now(), span)

    @property
    def error_budget(self) -> float:
        """Share of the window's error budget that is left; below 0 when overspent, 1 before any call."""
        with self._lock:
            return self._budget(self._now())

    def at_rest(self, now: float) -> bool:
        """Whether a new one would do as well: nothing bad is in the window."""
        with self._lock:
            return not self._rings[-1].since(now, self._counts)[1]

    def snapshot(self) -> SLOSnapshot:
        """Counters and budget at one moment."""
        with self._lock:
            now = self._now()
            good, bad = self._counts
            burn = self._burn(now, min(HOUR, self.window))
            return SLOSnapshot(good, bad, self._neither, self.target, self._budget(now), burn)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {"good": snapshot.good, "bad": snapshot.bad, "neither": snapshot.neither}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        return {"error_budget": snapshot.error_budget, "burn_rate.1h": snapshot.burn_rate_1h}
