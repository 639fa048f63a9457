"""How far to draft for the rows of a run.

A row that decodes alone drafts as a sequence does, model drafts included. In a run that several rows share, every row
is computed for as many tokens as the longest part has. So there is one length for all, and a row that has nothing to
propose pays for those that have. The length is chosen that gains most over none: tokens expected, worth what a token
takes at the pace reached so far, against the seconds of the longer run. Models don't draft there: a draft for each row
in turn would take longer than it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from seawall.inference.errors import GenerationCancelledError, ModelError
from seawall.inference.runtime import ort

from ..speculation.costs import Costs, Pace
from ..speculation.speculator import Attempt
from .row import Row

if TYPE_CHECKING:
    from ..decoder import Decoder

# A sequence's controller allows less (0.01, 0.35, 1.5), for an answer is short. A batch lives on: simulated over
# recorded answers in 2, 4 and 8 rows, such values left 9 to 13 of 180 batches below 0.97 of plain, these 2.
_ALLOWANCE, _GRACE = 0.02, 4.0  # share of the time, and runs, that drafting may lose before it has to stop
_FADES = 0.995  # of a gain, what is left a run later: what was won long ago is no excuse for losing now
_FORGETS = 0.9995  # of the time and of a loss: nor is a quiet day one for losing all evening
_MEMORY = 0.9  # of the pace
_WORST = 3.0  # times what a run should have taken: longer ones were interrupted, and prove nothing


class SharedDrafts:
    """Chooses the length of drafts for the runs of one batch, and learns what runs cost.

    A run costs what the tokens that it computes cost, rows times the longest part; measured runs agree within the
    noise (INT8: 8 rows of one token 20 ms, one row of 8 tokens 17 ms).
    """

    def __init__(self, pace: Pace) -> None:
        self._costs = Costs(pace, [])
        self._recent = [0.0, 0.0]  # tokens and seconds of the last runs
        self._spent = 0.0
        self._ahead = 0.0

    def length(self, chances: Sequence[Sequence[float]], *, least_width: int = 1) -> int:
        """Tokens to draft for each row, given how likely each row's proposals are to be accepted, one after another.

        `least_width` is how many tokens a part without a draft takes.
        """
        rows, most = len(chances), max(map(len, chances), default=0)
        plain = self._cost(rows, least_width)
        if not most or self._ahead < -_ALLOWANCE * self._spent - _GRACE * plain:
            return 0
        gains = [0.0] * most
        for row in chances:
            for place, survival in enumerate(accumulate(row, mul)):
                gains[place] += survival
        pace = self._recent[1] / self._recent[0] if self._recent[0] else plain / rows
        pace = min(pace, plain / rows)
        best, length, tokens = 0.0, 0, 0.0
        for drafted, gain in enumerate(gains, 1):
            tokens += gain
            found = tokens * pace - (self._cost(rows, max(least_width, 1 + drafted)) - plain)
            if found > best:
                best, length = found, drafted
        return length

    def learn(self, rows: int, width: int, decided: int, seconds: float, *, least_width: int = 1) -> None:
        """A run of so many rows, each computed for `width` tokens, decided so many and took so long."""
        plain = self._cost(rows, least_width)
        counted = min(seconds, _WORST * self._cost(rows, width))
        self._costs.saw_verify(rows * width, seconds)
        self._spent = _FORGETS * self._spent + counted
        self._ahead += decided * plain / rows - counted
        self._ahead *= _FADES if self._ahead > 0 else _FORGETS
        self._ahead = min(self._ahead, 64 * plain)
        self._recent = [_MEMORY * self._recent[0] + decided, _MEMORY * self._recent[1] + counted]

    def _cost(self, rows: int, width: int) -> float:
        return self._costs.verify(max(2, rows * width))


class Drafted(NamedTuple):
    """What rows have to offer for the next run.

    Attributes:
        attempts: the drafts, of rows that speculate; often empty ones.
        failed: rows whose drafter raised, and what.
    """

    attempts: dict[Row, Attempt]
    failed: dict[Row, Exception]


class Drafts:
    """Asks the drafters of rows, and decides how much of what they say is verified.

    Args:
        decoder: the target.
        ragged: whether rows of several tokens can share a run at all.
    """

    def __init__(self, decoder: Decoder, *, ragged: bool) -> None:
        self._decoder = decoder
        self._ragged = ragged
        self._shared: dict[bool, SharedDrafts] = {}  # by whether single tokens run as two

    def make(self, rows: Sequence[Row], options: ort.RunOptions) -> Drafted:
        """Drafts for a run of these rows. Raises what a draft model's run raises, if that is nobody's fault."""
        drafted = Drafted({}, {})
        offered = []
        for row in rows:
            if (speculator := row.speculator) is None:
                continue
            try:
                if len(rows) == 1:
                    drafted.attempts[row] = speculator.propose(row.answer.room, options)
                else:
                    offers = speculator.offers(options)
                    offered.append((row, speculator, offers, *speculator.outlook(offers, row.answer.room)))
            except Exception as error:
                if isinstance(error, GenerationCancelledError) or (isinstance(error, ModelError) and error.retryable):
                    raise
                drafted.failed[row] = error
        if offered:
            length = self._length(rows, {row: chances for row, _, _, _, chances in offered})
            for row, speculator, offers, drafter, chances in offered:
                drafted.attempts[row] = speculator.shared(offers, drafter, min(length, len(chances)))
        return drafted

    def learn(self, rows: Sequence[Row], width: int, decided: int, seconds: float) -> None:
        """How a run of several rows went: each computed for `width` tokens, `decided` in all."""
        least = 1 + rows[0].padded
        self._costs(rows[0]).learn(len(rows), width, decided, seconds, least_width=least)

    def _length(self, rows: Sequence[Row], chances: dict[Row, list[float]]) -> int:
        if not self._ragged:
            return 0
        wanted = [len(found) for row, found in chances.items() if row.drafts is not None and row.drafts.length]
        least = 1 + rows[0].padded
        planned = self._costs(rows[0]).length([chances.get(row, ()) for row in rows], least_width=least)
        return max(planned, *wanted, 0)

    def _costs(self, row: Row) -> SharedDrafts:
        if row.padded not in self._shared:
            self._shared[row.padded] = SharedDrafts(self._decoder.pace(padded=row.padded))
        return self._shared[row.padded]
