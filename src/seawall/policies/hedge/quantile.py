"""How long to wait before asking again, when that follows the latencies."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta

from seawall.core import checks

_STEP = 0.01  # of a standard deviation, as in failsafe-go
_LONGEST = 1e9  # seconds; the squares of much more overflow


@dataclass(frozen=True, slots=True)
class Quantile:
    """A delay that follows the latencies: by then, a fraction `quantile` of the first attempts has answered.

    Args:
        quantile: the fraction; 0.95 hedges about one call in twenty.
        initial: seconds to wait while there are fewer than `minimum_calls`; infinity hedges no call until then.
        minimum_calls: answers to see first.
        age: answers over which the spread is averaged; fewer adapt faster.
        least: seconds below which the delay never falls.

    Examples:
        >>> Quantile(0.9, initial=0.5).minimum_calls
        20
    """

    quantile: float = 0.95
    _: KW_ONLY
    initial: float | timedelta = 1.0
    minimum_calls: int = 20
    age: int = 100
    least: float | timedelta = 0.001

    def __post_init__(self) -> None:
        checked = {
            "quantile": checks.fraction("quantile", self.quantile, one=False),
            "initial": checks.seconds("initial", self.initial, zero=True, infinite=True),
            "minimum_calls": checks.count("minimum_calls", self.minimum_calls),
            "age": checks.count("age", self.age),
            "least": checks.seconds("least", self.least, zero=True),
        }
        for setting, value in checked.items():
            object.__setattr__(self, setting, value)


class Estimate:
    """A quantile of a stream of numbers in five floats: the windowless moving percentile of Martin Jambon.

    Each number moves the value by a step towards it, up steps and down steps being such that they balance at the
    quantile; a step is a hundredth of the standard deviation. So all that counts of a number is its side of the value:
    "at least so much" is enough. After a jump of the latencies such steps would take thousands of calls, so the value
    also stays where a quantile can be: within a multiple of the standard deviation of the mean (Cantelli).

    Examples:
        >>> estimate = Estimate(0.5, age=100)
        >>> for number in range(1, 1000):
        ...     estimate.add(number % 10)
        >>> round(estimate.value)
        4
    """

    __slots__ = ("_above", "_alpha", "_below", "_down", "_mean", "_up", "_variance", "count", "value")

    def __init__(self, quantile: float, *, age: int) -> None:
        self._alpha = 2 / (age + 1)
        self._down = min(_LONGEST, _STEP / quantile)
        self._up = _STEP / (1 - quantile)
        self._above = math.sqrt(quantile / (1 - quantile))  # standard deviations from the mean
        self._below = 1 / self._above
        self._mean = 0.0
        self._variance = 0.0
        self.count = 0
        self.value = 0.0

    def add(self, number: float) -> None:
        """Take in one number, 0 or more."""
        number = min(number, _LONGEST)
        self.count += 1
        if self.count == 1:
            self.value = self._mean = number
            return
        off = number - self._mean
        self._mean += self._alpha * off
        self._variance += self._alpha * (off * (number - self._mean) - self._variance)
        deviation = math.sqrt(max(0.0, self._variance))
        value = self.value
        if number < value:
            value -= deviation * self._down
        elif number > value:
            value += deviation * self._up
        value = max(value, self._mean - deviation * self._below, 0.0)
        self.value = min(value, self._mean + deviation * self._above, _LONGEST)

    def add_at_least(self, number: float) -> None:
        """Take in one that is not known but to be `number` or more; where that says nothing, it does nothing."""
        if number > self.value:
            self.add(number)


class Delay:
    """The delay of a `Quantile`, kept up to date."""

    __slots__ = ("_estimate", "_least", "_minimum", "seconds")

    def __init__(self, settings: Quantile) -> None:
        self._estimate = Estimate(settings.quantile, age=settings.age)
        self._minimum = settings.minimum_calls
        self._least = checks.seconds("least", settings.least, zero=True)
        self.seconds = checks.seconds("initial", settings.initial, zero=True, infinite=True)

    def saw(self, latency: float, *, ended: bool) -> None:
        """A first attempt took `latency` seconds, or has taken so many and nobody waits for its end."""
        estimate = self._estimate
        if ended:
            estimate.add(latency)
        else:
            estimate.add_at_least(latency)
        if estimate.count >= self._minimum:
            self.seconds = _rounded(max(self._least, estimate.value))


def _rounded(seconds: float) -> float:
    """Up to the next of 32 steps an octave (3 %), so that many calls have the same delay and share a timer."""
    mantissa, exponent = math.frexp(seconds)
    return math.ldexp(math.ceil(mantissa * 64) / 64, exponent)
