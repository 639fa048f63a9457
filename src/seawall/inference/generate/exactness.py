"""Whether a token's logits depend on how many tokens share its run: tried out on the loaded model, never assumed.

Kernels take other paths for one row than for several, and sum in another order. In a float model that moves the
last digits; where inputs are rounded to 8 bits it can move a logit by 0.5, for a last digit decides which way
a number is rounded. Speculation verifies several tokens at once, so it gives the answer of plain decoding only where
the two agree, or where both avoid the odd path out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from seawall.inference.runtime import ort

from .batch import Batch, Part
from .slot import CHUNK, Array, Slot

Kind = Literal["bitwise", "padded", "none"]

MOST = 17  # tokens in a run: 16 drafted ones and the one before them
_STARTS = (5, 300)  # tokens in the cache before: few, and more than one block of the attention kernel
_SINGLES = 4
SHARED = 16  # tokens of each sequence that shares runs
_TWOS = 32  # tokens of the past that are read two at a time


@dataclass(frozen=True, slots=True)
class StepExactness:
    """How far the logits of a token are the same, whatever else is in its run.

    Attributes:
        kind: "bitwise": the same bits for runs of 1 to 17 tokens. "padded": the same for 2 to 17, and a run of one
            differs; the cure is to run single tokens as two, the second one any token whatever. "none": every
            number gives its own bits.
        rows: whether a token's logits are the same when other sequences share its run (see `Decoder.batch`), as long
            as single tokens and several ones don't share one; where `kind` is "bitwise", they may.
        difference: largest difference of a logit between a run of one and a longer one, 0 for "bitwise".
        runs: how many runs tried it out.
    """

    kind: Kind
    rows: bool
    difference: float
    runs: int

    @property
    def cure(self) -> str:
        """What to do where exactness matters, or ""."""
        return {
            "bitwise": "",
            "padded": "run single tokens as two: the second may be any token, and is overwritten by the next run",
            "none": "compare whole answers within a tolerance, or use another precision",
        }[self.kind]

    def __str__(self) -> str:
        found = {
            "bitwise": "runs of 1 to 17 tokens give a token the same logits",
            "padded": f"runs of 2 to 17 tokens do, a run of one differs by up to {self.difference:.2g}",
            "none": "every number of tokens in a run gives its own",
        }[self.kind]
        shared = "the same" if self.rows else "others"
        return f"{self.kind}: {found}; {shared} when other sequences share its run"


def probe(slot: Slot, batch: Batch, vocabulary: int, context: int) -> StepExactness:
    """Run made-up tokens in several ways over the same past; a second for 135 million weights.

    `batch` has room for three sequences of `SHARED` tokens, or of the whole context where that is less.
    """
    tokens = np.random.default_rng(0).integers(0, vocabulary, max(_STARTS) + MOST).tolist()
    most = min(MOST, context - 1)
    starts = sorted({min(start, context - most) for start in _STARTS})
    trials = [_Trial(slot, tokens[: start + most], start) for start in starts]
    several = all(trial.several() for trial in trials)
    difference = max(trial.singles() for trial in trials)
    kind: Kind = "none" if not several else "padded" if difference else "bitwise"
    rows = _rows_agree(slot, batch, tokens, singles=not difference)
    return StepExactness(kind, rows, difference, sum(trial.runs for trial in trials))


def _rows_agree(slot: Slot, batch: Batch, tokens: list[int], *, singles: bool) -> bool:
    """Whether three sequences get in common runs what each gets alone; `singles` may share a run with several."""
    texts = [tokens[row * SHARED : row * SHARED + batch.positions] for row in range(batch.rows)]
    steps = [(3, 2, 5), (1, 1, 1), (2, 4, 3), *([(1, 3, 2)] if singles else [])]
    places, runs = [0, 0, 0], []
    for counts in steps:
        if max(place + count for place, count in zip(places, counts, strict=True)) > batch.positions:
            break
        parts = [
            Part(row, texts[row][places[row] : places[row] + count], places[row]) for row, count in enumerate(counts)
        ]
        runs.append(list(zip(parts, batch.run_all(parts, ort.run_options()), strict=True)))
        places = [place + count for place, count in zip(places, counts, strict=True)]
    return all(
        np.array_equal(together, slot.run_all(list(part.tokens), part.length, ort.run_options()))
        for row in range(batch.rows)
        for part, together in (run[row] for run in runs)
    )


class _Trial:
    def __init__(self, slot: Slot, tokens: list[int], start: int) -> None:
        self.runs = 0
        self._slot = slot
        self._tokens = tokens
        self._start = start
        self._fill(_parts(start, CHUNK))
        self._together = self._run(start, len(tokens))

    def several(self) -> bool:
        """Whether runs of any number above one agree, over a past that was itself read in any such parts."""
        if not all(self._agrees(self._start, self._start + count) for count in range(2, len(self._together))):
            return False
        self._fill([*_parts(self._start - _TWOS, CHUNK), *[2] * (_TWOS // 2)] if self._start > _TWOS else [])
        return self._agrees(self._start, len(self._tokens))

    def singles(self) -> float:
        """Largest difference of runs of one token, each over what the one before left in the cache."""
        self._fill(_parts(self._start, CHUNK))
        worst = 0.0
        for place in range(self._start, min(self._start + _SINGLES, len(self._tokens))):
            alone = self._run(place, place + 1)[0]
            worst = max(worst, float(np.abs(alone - self._together[place - self._start]).max()))
        return worst

    def _agrees(self, start: int, stop: int) -> bool:
        return np.array_equal(self._run(start, stop), self._together[: stop - start])

    def _fill(self, parts: Iterable[int]) -> None:
        place = 0
        for count in parts:
            self._slot.run(self._tokens[place : place + count], place, ort.run_options())
            place += count

    def _run(self, start: int, stop: int) -> Array:
        self.runs += 1
        return self._slot.run_all(self._tokens[start:stop], start, ort.run_options())


def _parts(total: int, size: int) -> list[int]:
    """Cut a number into parts of at most `size`, none of them 1 but for a total of 1."""
    parts = [size] * (total // size)
    rest = total % size
    if rest == 1 and parts:
        parts[-1:] = [size - 1, 2]
    elif rest:
        parts.append(rest)
    return parts
