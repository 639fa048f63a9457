"""What a ladder may do: the steps of a `BrownOut`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from seawall.core import checks
from seawall.core.ambient import Priority
from seawall.core.policy import PolicyBase

T = TypeVar("T")


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

    def renew(self) -> None:
        """What the step changed may have been set anew by somebody else; it still holds."""

    def adjust(self, value: T) -> T:
        """What becomes of `value`, such as the settings of a model's answer, while the step holds."""
        return value

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
        if isinstance(policy, PolicyBase):
            policy._prepare(settings)  # what is out of range says so now, not when the budget burns
        self.policy = policy
        self.settings: Mapping[str, object] = settings
        self._before: dict[str, object] = {}
        self._set: dict[str, object] = {}

    def engage(self) -> None:
        """Change them."""
        self._before = {name: getattr(self.policy, name) for name in self.settings}
        self.policy.update(**self.settings)
        self._set = {name: getattr(self.policy, name) for name in self.settings}

    def renew(self) -> None:
        """Change them again; what they are now is what comes back."""
        self.engage()

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
