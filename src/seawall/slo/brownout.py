"""Brown-out: while an error budget burns, a service gives up what it can spare, a step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar, Protocol, Self
from weakref import WeakKeyDictionary

from seawall.core import checks, events
from seawall.core.ambient import Priority, current_priority
from seawall.core.errors import Rejected
from seawall.core.events import Event, Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token
from seawall.slo.burn import Burn
from seawall.slo.ladder import Ladder
from seawall.slo.windows import SEVERITIES, Severity


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


class Adjustable(Protocol):
    """A policy whose settings can change while it is in use; every one of ours."""

    def update(self, **settings: object) -> None:
        """Take over `settings`."""


class Step:
    """One step of a ladder. Give it what you need: it holds from `engage` to `release`.

    Both run without a lock, in the thread of some call, so they should be quick; one that raises is logged.
    """

    refuses_below: Priority | None = None  # calls of a lower priority are refused while the step holds

    def engage(self) -> None:
        """The step begins to hold."""

    def release(self) -> None:
        """The step no longer holds."""

    def __repr__(self) -> str:
        return type(self).__name__


class Adjust(Step):
    """Changes settings of another policy: shrinks a retry budget, makes a shedder or breaker stricter.

    What they were is put back on the way down, unless somebody else changed them meanwhile.

    Examples:
        >>> from seawall import RetryBudget
        >>> budget = RetryBudget("payments", ratio=0.2)
        >>> shrink = Adjust(budget, ratio=0.02)
        >>> shrink.engage(); budget.ratio
        0.02
        >>> shrink.release(); budget.ratio
        0.2
    """

    def __init__(self, policy: Adjustable, **settings: object) -> None:
        if not callable(getattr(policy, "update", None)):
            raise TypeError(f"policy must have a method update(**settings), got {policy!r}")
        unknown = [name for name in settings if not hasattr(policy, name)]
        if unknown or not settings:
            raise TypeError(f"settings must be some of {policy!r}, got {', '.join(unknown) or 'none'}")
        self.policy = policy
        self.settings: Mapping[str, object] = settings
        self._before: dict[str, object] = {}
        self._set: dict[str, object] = {}

    def engage(self) -> None:
        """Change them."""
        self._before = {name: getattr(self.policy, name) for name in self.settings}
        self.policy.update(**self.settings)
        self._set = {name: getattr(self.policy, name) for name in self.settings}

    def release(self) -> None:
        """Put them back."""
        mine = {name: value for name, value in self._set.items() if getattr(self.policy, name) == value}
        back, self._before, self._set = {name: self._before[name] for name in mine}, {}, {}
        if back:
            self.policy.update(**back)

    def __repr__(self) -> str:
        return f"Adjust({self.policy!r}, {', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"


class Shed(Step):
    """Makes a load shedder refuse `share` of the calls, the least important first: it is one of its `signals`.

    Examples:
        >>> from seawall import LoadShedder
        >>> half = Shed(0.5)
        >>> front = LoadShedder("front", signals=[half])
        >>> half.sample(0.0); half.engage(); half.sample(0.0)
        0.0
        0.5
    """

    def __init__(self, share: float) -> None:
        self.share = checks.fraction("share", share)
        self._holds = False

    def engage(self) -> None:
        """Press."""
        self._holds = True

    def release(self) -> None:
        """Press no more."""
        self._holds = False

    def sample(self, now: float) -> float:
        """The share to refuse; what a load shedder asks."""
        return self.share if self._holds else 0.0

    def __repr__(self) -> str:
        return f"Shed({self.share:g})"


class Refuse(Step):
    """Refuses calls of a priority lower than `below`: all but the critical ones, unless told."""

    def __init__(self, *, below: Priority | int = Priority.CRITICAL) -> None:
        self.refuses_below = Priority(below)

    def __repr__(self) -> str:
        return f"Refuse(below={self.refuses_below.name})" if self.refuses_below is not None else "Refuse()"


class Run(Step):
    """Calls functions of yours when it begins to hold, and when it no longer does."""

    def __init__(self, engage: Callable[[], object], release: Callable[[], object] = lambda: None) -> None:
        self._engage = checks.function("engage", engage)
        self._release = checks.function("release", release)

    def engage(self) -> None:
        """Call the first."""
        self._engage()

    def release(self) -> None:
        """Call the second."""
        self._release()

    def __repr__(self) -> str:
        return f"Run({getattr(self._engage, '__qualname__', self._engage)})"


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
    not guard anything. `level` says how many steps hold, for functions that choose by it.

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
