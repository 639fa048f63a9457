"""Which replicas are left out for a while, since they fail where the others do not. Pure: told outcomes and the time.

The rules are those of Envoy's outlier detection: failures in a row, and a success rate far below that of the others;
each ejection lasts longer than the one before, and only so many may be out at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass

from seawall.core import checks


@dataclass(frozen=True, slots=True, kw_only=True)
class Ejection:
    """When a replica is left out, and for how long.

    Attributes:
        consecutive_failures: so many in a row eject it at once; None for never.
        interval: seconds between two comparisons of success rates.
        success_rate_stdev: a success rate this many standard deviations below the mean ejects; None for never.
        minimum_calls: calls of an interval that a replica needs to be compared.
        minimum_replicas: replicas that need so many, or nobody is compared; below 5 none can be 1.9 deviations off.
        time: seconds of the first ejection; the nth lasts n times as long, and a quiet interval takes one back.
        max_time: seconds of an ejection at most.
        max_ejected: share of the replicas that may be out at once, in (0, 1]; one always may, of two or more.
    """

    consecutive_failures: int | None = 5
    interval: float = 10.0
    success_rate_stdev: float | None = 1.9
    minimum_calls: int = 20
    minimum_replicas: int = 5
    time: float = 30.0
    max_time: float = 300.0
    max_ejected: float = 0.5

    def __post_init__(self) -> None:
        if self.consecutive_failures is not None:
            checks.count("consecutive_failures", self.consecutive_failures)
        if self.success_rate_stdev is not None:
            checks.positive("success_rate_stdev", self.success_rate_stdev)
        checks.count("minimum_calls", self.minimum_calls)
        checks.count("minimum_replicas", self.minimum_replicas, least=2)
        for setting in ("interval", "time", "max_time"):
            object.__setattr__(self, setting, checks.seconds(setting, getattr(self, setting)))
        if self.max_time < self.time:
            raise ValueError(f"max_time must be time or more, got {self.max_time!r} s and {self.time!r} s")
        checks.fraction("max_ejected", self.max_ejected)


class Health:
    """What is known of one replica.

    Attributes:
        until: when it may be asked again; None while it may.
        ejections: how often it was ejected lately.
    """

    __slots__ = ("ejections", "failures", "in_a_row", "successes", "until")

    def __init__(self) -> None:
        self.until: float | None = None
        self.ejections = 0
        self.in_a_row = self.failures = self.successes = 0


class Outliers:
    """Decides who is out. `all_of` are those of the replicas there are, whenever a method is called."""

    def __init__(self, rules: Ejection) -> None:
        self._rules = rules
        self._compare_at = -math.inf

    def saw(self, health: Health, all_of: Collection[Health], now: float, *, failed: bool) -> str | None:
        """A call ended well or badly; why the replica is ejected for it, if it is."""
        health.failures += failed
        health.successes += not failed
        health.in_a_row = health.in_a_row + 1 if failed else 0
        limit = self._rules.consecutive_failures
        if limit is None or health.in_a_row < limit or health.until is not None or not self._room(all_of):
            return None
        self._eject(health, now)
        return f"{health.in_a_row} failures in a row"

    def compare(self, all_of: Collection[Health], now: float) -> list[tuple[Health, str]]:
        """Once an interval: those whose success rate is far below the others', and why; they are ejected."""
        if now < self._compare_at:
            return []
        first, self._compare_at = self._compare_at == -math.inf, now + self._rules.interval
        if first:
            return []
        found = self._far_below(all_of)
        ejected = []
        for health, reason in found:
            if self._room(all_of):
                self._eject(health, now)
                ejected.append((health, reason))
        for health in all_of:
            health.successes = health.failures = 0
            if health.until is None and health.ejections:
                health.ejections -= 1
        return ejected

    def back(self, all_of: Collection[Health], now: float) -> list[Health]:
        """Those whose time is over: they may be asked again."""
        over = [health for health in all_of if health.until is not None and health.until <= now]
        for health in over:
            health.until = None
            health.in_a_row = 0
        return over

    def _far_below(self, all_of: Collection[Health]) -> list[tuple[Health, str]]:
        factor = self._rules.success_rate_stdev
        rates = {
            health: health.successes / (health.successes + health.failures)
            for health in all_of
            if health.until is None and health.successes + health.failures >= self._rules.minimum_calls
        }
        if factor is None or len(rates) < self._rules.minimum_replicas:
            return []
        mean = statistics.fmean(rates.values())
        least = mean - factor * statistics.pstdev(rates.values())
        return [
            (health, f"a success rate of {rate:.3g}, where the mean is {mean:.3g}")
            for health, rate in sorted(rates.items(), key=lambda item: item[1])
            if rate < least
        ]

    def _room(self, all_of: Collection[Health]) -> bool:
        out = sum(health.until is not None for health in all_of)
        most = max(1, math.floor(self._rules.max_ejected * len(all_of) + 1e-9)) if len(all_of) > 1 else 0
        return out < most

    def _eject(self, health: Health, now: float) -> None:
        health.ejections += 1
        health.until = now + min(self._rules.time * health.ejections, self._rules.max_time)
