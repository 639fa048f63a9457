"""The objective as a guard: it refuses nothing and sees every call the way its caller does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import Any, Self

from seawall.core import checks, events
from seawall.core.errors import Rejected
from seawall.core.events import Event, Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token, returns_now
from seawall.slo.alerts import BurnAlertFired, BurnAlertResolved, BurnAlerts
from seawall.slo.burn import Burn, BurnAction
from seawall.slo.sketch import RollingSketch
from seawall.slo.tracker import BudgetTracker, TrackerState
from seawall.slo.windows import DAY, HOUR, SEVERITIES, Severity, duration, pairs_for

PERCENTILES = (0.5, 0.9, 0.99)  # that are exported


@dataclass(frozen=True, slots=True)
class BudgetExhausted(Event):
    """The error budget of the window is used up."""

    burn_rate: float


@dataclass(frozen=True, slots=True)
class SLOSnapshot:
    """An objective at one moment. `good`, `bad` and `neither` only grow; the budget is of the window.

    `severity` is the worst alert that fires; `coverage` the share of the window that was observed.
    """

    good: int
    bad: int
    neither: int
    target: float
    error_budget: float
    burn_rate_1h: float
    severity: Severity | None
    coverage: float


class _Call:
    """The token of a call that `classify` is asked about."""

    __slots__ = ("began", "good")

    def __init__(self, began: float) -> None:
        self.began = began
        self.good: bool | None = None


class SLO(GuardPolicy):
    """Tracks a service level objective: a share `target` of calls succeed, and within `latency` seconds.

    Put it outermost, where it sees what the user sees: a call that a policy further in refused is bad here,
    though every other policy counts it as neither. Cancelled and abandoned calls count as neither.

    Burn rates are judged over the four window pairs of the SRE workbook (`pairs_for`), once a second, on the occasion
    of a call or a look: its alerts are events, and what its `actions` go by. A look back is right to within one slot:
    10 s up to an hour, 5 min up to a day, an hour beyond, for a window of a month. `update` judges the calls from then
    on; another `window` looks back anew.

    Args:
        name: labels metrics, events and logs.
        target: share of calls in (0, 1) that must be good.
        latency: seconds within which a good call ends; None judges success alone.
        window: seconds over which the error budget is reckoned.
        on: exceptions that make a call bad.
        ignore: exceptions that count as neither all the same: of those, or refusals that are the caller's own fault.
        classify: says of a call, by its result and its exception (one of them None), whether it was good: True, False,
            or None for neither; instead of `on` and `ignore`. A good one that took longer than `latency` is bad all the
            same; a cancelled one is not asked about; a block has no result. Given when it is made, or never.
        minimum_calls: with fewer in the long look back no alert fires.
        percentiles: also keep the latencies of calls that succeeded, for `latency_percentile`.
        actions: told how the budget burns: objects with a method `observe(slo, burn)`, see `BurnAction`.
        listeners: called with its `BudgetExhausted`, `BurnAlertFired` and `BurnAlertResolved` events.

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
        classify: Callable[[Any, Exception | None], bool | None] | None = None,
        minimum_calls: int = 10,
        percentiles: bool = False,
        actions: Iterable[BurnAction] = (),
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.target = checks.fraction("target", target, one=False)
        self.latency = None if latency is None else checks.seconds("latency", latency)
        self.window = checks.window("window", window)
        self.on = checks.exceptions("on", on)
        self.ignore = checks.exceptions("ignore", ignore)
        self.classify = None if classify is None else checks.function("classify", classify, of="a result and an error")
        self.judges = classify is not None
        self.minimum_calls = checks.count("minimum_calls", minimum_calls)
        if not isinstance(percentiles, bool):
            raise TypeError(f"percentiles must be True or False, got {percentiles!r}")
        self.percentiles = percentiles
        self.actions = _actions(actions)
        self._judge_by()
        self._neither = 0
        self._shed = 0  # of the bad ones: refused by choice, to spare the rest
        self._exhausted = False
        self._latencies: RollingSketch | None = RollingSketch(HOUR) if self.percentiles else None
        self._tracker = BudgetTracker(self.window)
        self._look_back()
        self._register()

    def _judge_by(self) -> None:
        self._tolerated = float(1 - Fraction(repr(self.target)))  # in floats 1 - 0.99 is more than 0.01
        self._slow_from = float("inf") if self.latency is None else self.latency

    def _look_back(self) -> None:
        self.pairs = pairs_for(self.window)
        self._counts = self._tracker.counts  # good, bad
        self._alerts = BurnAlerts(self.pairs)
        self._every = min(1.0, self.pairs[0].long / 3600)
        self._due = -float("inf")  # when to judge the burn rates again, or a slot ends

    def _check_change(self, fresh: Self) -> None:
        if fresh.judges and not self.judges:
            raise ValueError(f"classify of SLO {self.name!r} can't be added while in use: make it with one")

    def _adopt(self, fresh: Self, now: float) -> None:
        self.classify = fresh.classify
        self.target, self.latency, self.on, self.ignore = fresh.target, fresh.latency, fresh.on, fresh.ignore
        self.minimum_calls, self.actions = fresh.minimum_calls, fresh.actions
        self._judge_by()
        if fresh.percentiles != self.percentiles:
            self.percentiles, self._latencies = fresh.percentiles, fresh._latencies
        if fresh.window != self.window:  # the past was not kept in slots of that length
            self.window = fresh.window
            fresh._tracker.counts[:] = self._counts
            self._tracker = fresh._tracker
            self._look_back()
        self._exhausted = self._exhausted and self._budget(now) <= 0
        self._due = now

    @returns_now
    def enter(self, now: float) -> Token:
        """When the call began."""
        return now if self.classify is None else _Call(now)

    def judge(self, token: Token, result: object, exc: BaseException | None) -> None:
        """Ask `classify`; what raises or answers something else is logged, and the call is bad if it failed."""
        if isinstance(token, _Call) and self.classify is not None and not (exc and not isinstance(exc, Exception)):
            without: bool | None = exc is None
            token.good = events.ask(_verdict, self.classify, result, exc, otherwise=without)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Good or bad, as the caller sees it."""
        if now >= self._due:
            self._judge(now)
        if self.judges and isinstance(token, _Call):
            self._count_classified(token, now, exc)
        elif exc is None:
            took: float = now - token  # type: ignore[operator]
            if took <= self._slow_from:
                self._counts[0] += 1
            else:
                self._bad(now)
            if self._latencies is not None:
                self._latencies.add(now, took)
        elif isinstance(exc, (Rejected, *self.on)) and not isinstance(exc, self.ignore):
            if isinstance(exc, Rejected) and exc.sheds:
                self._shed += 1
            self._bad(now)
        else:
            self._neither += 1

    def _count_classified(self, call: _Call, now: float, exc: BaseException | None) -> None:
        took = now - call.began
        if call.good is None:
            self._neither += 1
        elif call.good and took <= self._slow_from:
            self._counts[0] += 1
        else:
            self._shed += isinstance(exc, Rejected) and exc.sheds
            self._bad(now)
        if exc is None and self._latencies is not None:
            self._latencies.add(now, took)

    def _bad(self, now: float) -> None:
        self._counts[1] += 1
        if not self._exhausted and events.audience(self._listeners) and self._budget(now) <= 0:
            self._exhausted = True
            self._emit(BudgetExhausted, now, self._burn(now, HOUR))

    def _judge(self, now: float) -> None:
        """Begin the slots that `now` lies in; see which alerts fire and tell the actions. With the lock held."""
        if now >= self._tracker.turns_at:
            self._tracker.turn(now)
            self._exhausted = self._exhausted and self._budget(now) <= 0
        self._due = min(self._tracker.turns_at, now + self._every)
        for pair, burn in self._alerts.judge(self._tracker, now, self._tolerated, self.minimum_calls):
            if burn is None:
                self._emit(BurnAlertResolved, now, pair.severity, pair.long, pair.short)
            else:
                self._emit(BurnAlertFired, now, pair.severity, pair.long, pair.short, pair.factor, burn)
        if self.actions:
            good, bad = self._counts
            told = Burn(now, self._alerts.severities, good, bad - self._shed, self._tolerated, self.pairs)
            for action in self.actions:
                events.ask(action.observe, self, told, otherwise=None)  # a call is not to pay for its error

    def _look(self) -> float:
        """Now, as a look at the objective sees it. With the lock held."""
        now = self._now()
        if now >= self._due:
            self._judge(now)
        return now

    def _burn(self, now: float, seconds: float) -> float:
        return self._tracker.burn_rate(now, min(seconds, self.window), self._tolerated)

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

    @property
    def severity(self) -> Severity | None:
        """The worst alert that fires: "page", "ticket" or None."""
        return self.snapshot().severity

    def exhausted_in(self) -> float:
        """Seconds until the error budget is used up if calls go on as in the last hour; infinite if never, 0 if it is.

        What leaves the window meanwhile is reckoned with, the bad calls as well as the good.
        """
        with self._lock:
            now, tolerated, tracker = self._now(), self._tolerated, self._tracker.copy()
        return tracker.exhausted_in(now, tolerated, min(HOUR, self.window))

    def latency_percentile(self, share: float) -> float:
        """The latency, in seconds, that `share` of the successful calls of about the last hour did not exceed.

        Right to within 2 %; NaN without calls. RuntimeError unless the SLO was made with `percentiles=True`.
        """
        with self._lock:
            if self._latencies is None:
                raise RuntimeError(f"SLO {self.name!r} keeps no latencies; make it with percentiles=True")
            recent = self._latencies.merged(self._now())
        return recent.percentile(share)

    def state(self) -> TrackerState:
        """What it counted in the window, apart from this process's clock: for `restore`, after a restart."""
        with self._lock:
            now, tracker = self._now(), self._tracker.copy()
        return tracker.state(now)

    def restore(self, state: TrackerState, *, ago: float | timedelta = 0.0) -> None:
        """Add what an earlier process counted, `ago` seconds ago. Counters stay those of this process.

        ValueError if that was over another window.
        """
        elapsed = checks.seconds("ago", ago, zero=True)
        if state.window != self.window:
            raise ValueError(
                f"SLO {self.name!r} has a window of {self.window:g} s, and the state is of {state.window:g} s"
            )
        with self._lock:
            now = self._now()
            self._tracker.restore(state, now, elapsed)
            self._due = now

    def at_rest(self, now: float) -> bool:
        """Whether a new one would do as well: nothing bad is in the window."""
        with self._lock:
            return not self._tracker.since(now, self.window)[1]

    def snapshot(self) -> SLOSnapshot:
        """Counters and budget at one moment."""
        with self._lock:
            now = self._look()
            severities = self._alerts.severities
            seen = SLOSnapshot(
                good=self._counts[0],
                bad=self._counts[1],
                neither=self._neither,
                target=self.target,
                error_budget=self._budget(now),
                burn_rate_1h=self._burn(now, HOUR),
                severity=next((one for one in SEVERITIES if one in severities), None),
                coverage=self._tracker.covered(now) / self.window,
            )
        events.deliver()
        return seen

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {"good": snapshot.good, "bad": snapshot.bad, "neither": snapshot.neither}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        found = {
            "objective": snapshot.target,
            "error_budget": snapshot.error_budget,
            "coverage": snapshot.coverage,
            "exhausted_in": self.exhausted_in(),
        }
        with self._lock:
            now, severities = self._now(), self._alerts.severities
            for seconds in sorted({look for pair in self.pairs for look in (pair.long, pair.short)} | {self.window}):
                found[f"burn_rate.{duration(seconds)}"] = self._burn(now, seconds)
        found.update({f"alert.{severity}": float(severity in severities) for severity in SEVERITIES})
        if self.percentiles:
            found.update({f"latency.{share:g}": self.latency_percentile(share) for share in PERCENTILES})
        return found


def _verdict(
    classify: Callable[[Any, Exception | None], bool | None], result: object, exc: Exception | None
) -> bool | None:
    verdict = classify(result, exc)
    if verdict is not None and not isinstance(verdict, bool):
        raise TypeError(f"classify must answer True, False or None, got {verdict!r}")
    return verdict


def _actions(actions: Iterable[BurnAction]) -> tuple[BurnAction, ...]:
    if not isinstance(actions, Iterable):
        raise TypeError(f"actions must be an iterable of actions with a method observe(slo, burn), got {actions!r}")
    found = tuple(actions)
    for action in found:
        if not callable(getattr(action, "observe", None)):
            raise TypeError(f"actions must have a method observe(slo, burn), got {action!r}")
    return found
