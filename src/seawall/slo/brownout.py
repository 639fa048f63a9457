"""Brown-out: while an error budget burns, a service gives up what it can spare, a step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar, Self, TypeVar
from weakref import WeakKeyDictionary

from seawall.core import checks, events
from seawall.core.ambient import Priority, current_priority
from seawall.core.errors import Rejected
from seawall.core.events import Event, Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token
from seawall.slo.burn import Burn
from seawall.slo.ladder import Ladder
from seawall.slo.steps import Adjust, Refuse, Run, Shed, Step
from seawall.slo.windows import SEVERITIES, Severity

__all__ = [
    "Adjust",
    "BrownOut",
    "BrownOutSnapshot",
    "BrownOutStepped",
    "BrownedOutError",
    "Refuse",
    "Run",
    "Shed",
    "Step",
]
T = TypeVar("T")


class BrownedOutError(Rejected):
    """The ladder stands on a step that refuses calls like this one."""

    reason = "is browned out: its error budget burns"
    sheds = True


@dataclass(frozen=True, slots=True)
class BrownOutStepped(Event):
    """The ladder came to `level` from `before`; `step` says what began to hold, or no longer does."""

    before: int
    level: int
    step: str
    severities: frozenset[Severity]


@dataclass(frozen=True, slots=True)
class _StepDue(Event):
    errand: ClassVar[bool] = True

    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class BrownOutSnapshot:
    """A ladder at one moment. `served` and `refused` only grow, and so do the steps."""

    level: int
    steps: tuple[str, ...]
    served: int
    refused: int
    steps_up: int
    steps_down: int


class BrownOut(GuardPolicy):
    """Takes a ladder of measures step by step while the budget of an `SLO` burns, and gives them up again.

    Give it to the SLO as one of its `actions`. While an alert of `severity` fires and the calls since the last step
    still burn that fast, one more step holds, at most one each `step_up` seconds. After each `hold` seconds of calm one
    step less does. A step that had to be taken again makes the hold longer, so a ladder does not swing. Calls refused
    by choice (`Rejected.sheds`) do not count as burning here, though the SLO counts them as bad.

    As a guard it refuses calls while a `Refuse` step holds; put it right inside the SLO. A ladder without one need
    not guard anything. `level` says how many steps hold, for functions that choose by it; `adjust` is what an engine
    asks of each answer.

    Args:
        name: labels errors, events and metrics.
        ladder: the steps, mildest first.
        severity: whose alerts it goes by.
        step_up: seconds that a step has to show what it does.
        hold: seconds of calm before a step down.
        minimum_calls: with fewer since the last look, bad calls say nothing.
        listeners: called with its `BrownOutStepped` and `CallRejected` events.

    Raises:
        BrownedOutError: from a call it refuses.

    Examples:
        >>> from seawall import SLO, RetryBudget
        >>> budget = RetryBudget("answers")
        >>> dimmer = BrownOut("answers", [Adjust(budget, ratio=0.02), Refuse(below=Priority.NORMAL)])
        >>> answers = SLO("answers", target=0.99, actions=[dimmer])
        >>> dimmer.level
        0
    """

    kind = "brownout"

    def __init__(
        self,
        name: str,
        ladder: Iterable[Step],
        *,
        severity: Severity = "page",
        step_up: float | timedelta = 15.0,
        hold: float | timedelta = 300.0,
        minimum_calls: int = 10,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        if not isinstance(ladder, Iterable):
            raise TypeError(f"ladder must be an iterable of steps, got {ladder!r}")
        self.ladder = tuple(ladder)
        for step in self.ladder:
            if not isinstance(step, Step):
                raise TypeError(f"ladder must hold steps such as Adjust(...) or Refuse(), got {step!r}")
        if not self.ladder:
            raise ValueError("ladder must have a step or more, got none")
        if severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {', '.join(SEVERITIES)}, got {severity!r}")
        self.severity: Severity = severity
        self.step_up = checks.seconds("step_up", step_up)
        self.hold = checks.seconds("hold", hold)
        self.minimum_calls = checks.count("minimum_calls", minimum_calls)
        self.level = 0
        self._ladders: WeakKeyDictionary[object, Ladder] = WeakKeyDictionary()  # of each SLO that it goes by
        self._refuses_below: Priority | int = Priority.SHEDDABLE
        self._served = self._ups = self._downs = 0
        self._register()

    def observe(self, source: object, burn: Burn) -> None:
        """How the budget of `source`, an SLO, burns; see `BurnAction.observe`."""
        ladder = self._ladders.get(source)
        if ladder is None:
            ladder = self._ladders[source] = Ladder(
                len(self.ladder), step_up=self.step_up, hold=self.hold, minimum_calls=self.minimum_calls
            )
        ladder.judge(
            burn.at,
            alert=self.severity in burn.severities,
            factor=burn.factor(self.severity),
            good=burn.good,
            bad=burn.bad,
            tolerated=burn.tolerated,
        )
        self._go_to(max(one.level for one in self._ladders.values()), burn.at, burn.severities)

    def _go_to(self, level: int, now: float, severities: frozenset[Severity]) -> None:
        while self.level != level:
            before, up = self.level, level > self.level
            step = self.ladder[before if up else before - 1]
            self.level += 1 if up else -1
            self._ups, self._downs = self._ups + up, self._downs + (not up)
            events.pending.append(((_carry_out,), _StepDue(self.name, now, step.engage if up else step.release)))
            self._emit(BrownOutStepped, now, before, self.level, repr(step), severities)
        holding = (step.refuses_below for step in self.ladder[:level])
        self._refuses_below = max((one for one in holding if one is not None), default=Priority.SHEDDABLE)

    def adjust(self, value: T) -> T:
        """What the steps that hold make of `value`: `Engine.load(..., adjust=dimmer.adjust)` shortens answers."""
        for step in self.ladder[: self.level]:
            value = step.adjust(value)
        return value

    def renew(self) -> None:
        """Have the steps that hold do again what they did, after policies they change were configured anew."""
        for step in self.ladder[: self.level]:
            step.renew()

    def enter(self, now: float) -> Token:
        """Let the call in, or raise `BrownedOutError`."""
        if self._refuses_below and current_priority.get() < self._refuses_below:
            raise self._refused(BrownedOutError(self.name, self.hold), now)
        self._served += 1
        return None

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """The SLO counts how it ended."""

    def _adopt(self, fresh: Self, now: float) -> None:
        """Another ladder begins at the bottom."""
        self.severity, self.step_up, self.hold = fresh.severity, fresh.step_up, fresh.hold
        self.minimum_calls = fresh.minimum_calls
        if fresh.ladder != self.ladder:
            self._go_to(0, now, frozenset())
            self.ladder = fresh.ladder
            self._ladders.clear()
        for ladder in self._ladders.values():
            ladder.configure(step_up=self.step_up, hold=self.hold, minimum_calls=self.minimum_calls)

    def snapshot(self) -> BrownOutSnapshot:
        """Level and counters at one moment."""
        with self._lock:
            steps = tuple(repr(step) for step in self.ladder[: self.level])
            return BrownOutSnapshot(self.level, steps, self._served, self._rejections, self._ups, self._downs)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        seen = self.snapshot()
        return {"served": seen.served, "rejected": seen.refused}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        return {"level": float(self.level)}


def _carry_out(due: Event) -> None:
    if isinstance(due, _StepDue):
        due.run()
