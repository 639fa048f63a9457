"""How long a breaker stays open, by how many times in a row it opened."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from seawall.core import checks

ASKED = 32  # openings in a row for which a function is asked; the last answer holds for those after

ResetTimeout: TypeAlias = float | timedelta | Callable[[int], float | timedelta]
Durations: TypeAlias = "float | tuple[float, ...] | _Growing"


@dataclass(frozen=True, slots=True)
class _Growing:
    base: float
    factor: float
    maximum: float
    jitter: float

    def __call__(self, opened: int) -> float:
        """Seconds to stay open, having opened `opened` times in a row. Drawn anew each time."""
        try:
            seconds = min(self.base * self.factor ** (opened - 1), self.maximum)
        except OverflowError:
            seconds = self.maximum
        return seconds * (1.0 - self.jitter * random.random())  # after the cap, so that it survives there


def growing(
    base: float | timedelta, *, factor: float = 2.0, maximum: float | timedelta = 600.0, jitter: float = 0.1
) -> Callable[[int], float]:
    """A `reset_timeout` that grows each time the breaker opens again without having closed.

    `base` seconds the first time, then `factor` times as long each time, up to `maximum`. Each is shortened by a
    random share of up to `jitter`, drawn at each opening, so that breakers that opened together don't probe together.

    Examples:
        >>> from seawall import CircuitBreaker
        >>> payments = CircuitBreaker("payments", reset_timeout=growing(5, maximum=300))
        >>> tuple(growing(5, maximum=30, jitter=0)(opened) for opened in (1, 2, 3, 4))
        (5.0, 10.0, 20.0, 30.0)
    """
    shortest = checks.seconds("base", base)
    longest = checks.seconds("maximum", maximum)
    if longest < shortest:
        raise ValueError(f"maximum must be base or more, got {longest:g} s for a base of {shortest:g} s")
    steeper = checks.positive("factor", factor)
    if steeper < 1:
        raise ValueError(f"factor must be 1 or more, got {factor!r}: a breaker that opens again needs more time")
    spread = 0.0 if jitter == 0 and not isinstance(jitter, bool) else checks.fraction("jitter", jitter, one=False)
    return _Growing(shortest, steeper, longest, spread)


def durations(reset_timeout: ResetTimeout) -> Durations:
    """What to look the open time up in under the lock, where no code of the user's may run.

    So a function is asked here, once for each number of openings, and what is wrong with it shows here too.
    """
    if isinstance(reset_timeout, _Growing):
        return reset_timeout
    if callable(reset_timeout):
        return tuple(checks.seconds(f"reset_timeout({n})", reset_timeout(n)) for n in range(1, ASKED + 1))
    return checks.seconds("reset_timeout", reset_timeout)


def after(known: Durations, opened: int) -> float:
    """Seconds to stay open, having opened `opened` times in a row."""
    if isinstance(known, float):
        return known
    return known[min(opened, ASKED) - 1] if isinstance(known, tuple) else known(opened)
