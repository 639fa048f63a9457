"""What an objective tells its actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from seawall.slo.windows import Severity, WindowPair


@dataclass(frozen=True, slots=True)
class Burn:
    """How an error budget burns at one moment, `at` seconds of the gate's clock.

    `severities` are those whose alerts fire. `good` and `bad` only grow; calls that were refused on purpose, to spare
    the rest, are not among them, or an action that sheds load would feed itself. `tolerated` is the share of bad calls
    that uses the budget up exactly at the window's end.
    """

    at: float
    severities: frozenset[Severity]
    good: int
    bad: int
    tolerated: float
    pairs: tuple[WindowPair, ...]

    def factor(self, severity: Severity) -> float:
        """The least burn rate at which an alert of this severity can fire."""
        return min(pair.factor for pair in self.pairs if pair.severity == severity)


class BurnAction(Protocol):
    """What acts on a burn, such as shedding load while a page fires."""

    def observe(self, source: object, burn: Burn) -> None:
        """How the budget of `source` burns: about once a second while calls come, or when somebody looks.

        Called with the gate's lock held, so it must neither block nor call code that may. Must not raise.
        """
