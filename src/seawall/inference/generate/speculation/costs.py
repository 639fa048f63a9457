"""What passes cost, told in seconds and kept as a shape times how busy the machine is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_LOAD, _SHAPE = 0.2, 0.05  # weight of a new measurement: load changes in seconds, the shape hardly at all
_FAR, _PRIOR = 9, 6.0  # the measured points of the line, and how many passes each of them counts for
_LEAST = 0.005  # of a pass: no further token is free
_SPREAD = 1.0  # tokens squared
_CLIP = 2.0  # a pass that took ten times as long was interrupted


class Pace(NamedTuple):
    """Seconds of a target's passes, measured at an idle moment.

    Attributes:
        plain: a pass without a draft.
        pair: a pass over two tokens.
        more: what every further token adds.
    """

    plain: float
    pair: float
    more: float


class _Line:
    """A straight line through what was seen, the latest counting most: least squares with a prior of a few points."""

    def __init__(self, pace: Pace) -> None:
        self._sums = [0.0] * 5  # weights, x, y, x*x, x*y
        for _ in range(int(_PRIOR)):
            self.saw(2, pace.pair, decay=1.0)
            self.saw(_FAR, pace.pair + (_FAR - 2) * max(pace.more, _LEAST * pace.pair), decay=1.0)

    def saw(self, x: float, y: float, decay: float = 1 - _SHAPE) -> None:
        self._sums = [
            old * decay + new for old, new in zip(self._sums, (1.0, x, y, x * x, x * y), strict=True)
        ]  # fmt: skip

    def at(self, x: float) -> float:
        weight, sx, sy, sxx, sxy = self._sums
        spread = max(sxx - sx * sx / weight, _SPREAD * weight)  # no slope from points on one spot
        slope = max((sxy - sx * sy / weight) / spread, _LEAST * sy / weight)
        return sy / weight + slope * (x - sx / weight)


class Costs:
    """Expected seconds of a plain pass, of a verifying one by its number of tokens, and of each drafter's tokens.

    A busy neighbour slows everything alike, so every measurement corrects one common load, quickly, and the kind
    of pass that it was, slowly. What has not been measured for long is thus not stale.
    """

    def __init__(self, pace: Pace, drafts: Sequence[float]) -> None:
        self._plain = pace.plain
        self._line = _Line(pace)
        self._drafts = list(drafts)
        self._load = 1.0
        self._seen = 0

    @property
    def load(self) -> float:
        """How much slower than at the idle moment everything is."""
        return self._load

    def plain(self) -> float:
        """A pass without a draft."""
        return self._plain * self._load

    def verify(self, tokens: int) -> float:
        """A pass over so many tokens, two at least: the undecided ones and the one before."""
        return max(self._line.at(tokens), 0.5 * self._plain) * self._load

    def draft(self, drafter: int) -> float:
        """One more drafted token; 0 for a drafter that costs nothing."""
        return self._drafts[drafter] * self._load

    def saw_plain(self, seconds: float) -> None:
        """A plain pass took so long."""
        ratio = self._loaded(seconds, self.plain())
        self._plain *= ratio**_SHAPE

    def saw_verify(self, tokens: int, seconds: float) -> None:
        """A verifying pass took so long."""
        expected = self.verify(tokens) / self._load
        ratio = self._loaded(seconds, self.verify(tokens))
        self._line.saw(tokens, expected * ratio)

    def saw_draft(self, drafter: int, tokens: int, seconds: float) -> None:
        """A draft took so long."""
        ratio = self._loaded(seconds, self.draft(drafter) * tokens)
        self._drafts[drafter] *= ratio**_SHAPE

    def _loaded(self, seconds: float, expected: float) -> float:
        """Move the load towards what was seen; what is left of the ratio once the load is taken off."""
        if seconds <= 0:  # a clock that did not move
            return 1.0
        weight = max(_LOAD, 1 / (1 + self._seen))  # how busy it is to begin with is not a matter of habit
        clip = _CLIP if self._seen else 10.0
        self._seen += 1
        ratio = min(max(seconds / expected, 1 / clip), clip)
        self._load *= ratio**weight
        return float(ratio ** (1 - weight))
