"""The model whose answer it is: reads several tokens in one pass, and goes back to an earlier length."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

from seawall.inference.runtime import ort

from ..slot import Slot
from .costs import Pace

Rows = np.ndarray[Any, np.dtype[np.float32]]
_FAR = 9  # tokens of the longest pass that is timed
_TIMES = 5


class Target(Protocol):
    """What a round needs of the model.

    Attributes:
        length: tokens it has read.
    """

    length: int

    def extend(self, tokens: list[int], options: ort.RunOptions) -> Rows:
        """Read tokens; the logits after each of them, [tokens, vocabulary], good until the next call."""
        ...

    def rewind(self, length: int) -> None:
        """Forget what was read after the first `length` tokens."""
        ...


class SlotTarget:
    """A target over a slot.

    Where a run of one token gives other bits than a longer one, `padded` runs single tokens as two, so that every
    token of the answer comes out of the same arithmetic, drafted or not.
    """

    def __init__(self, slot: Slot, *, padded: bool) -> None:
        self.length = 0
        self._slot = slot
        self._padded = padded

    def extend(self, tokens: list[int], options: ort.RunOptions) -> Rows:
        """Read tokens; the logits after each of them, [tokens, vocabulary], good until the next call."""
        rows: Rows
        if len(tokens) > 1:
            rows = self._slot.run_all(tokens, self.length, options)
        elif self._padded:  # the second token is never looked at, and the next run writes over it
            rows = self._slot.run_all([*tokens, tokens[0]], self.length, options)[:1]
        else:
            rows = self._slot.run(tokens, self.length, options)[None]
        self.length += len(tokens)
        return rows

    def read(self, tokens: list[int], options: ort.RunOptions) -> Rows:
        """Read a part of the prompt; the logits after the last token, [vocabulary]."""
        if len(tokens) == 1:
            only: Rows = self.extend(tokens, options)[0]
            return only
        row = self._slot.run(tokens, self.length, options)
        self.length += len(tokens)
        return row

    def rewind(self, length: int) -> None:
        """A smaller number: nothing is copied, and what lies beyond is written over."""
        self.length = length


def measure(slot: Slot, *, padded: bool, context: int) -> Pace:
    """Time passes of 1, 2 and 9 tokens, in turns; the quickest of five each, which a busy machine disturbs least.

    Overwrites the slot's first tokens.
    """
    target = SlotTarget(slot, padded=padded)
    counts = (1, 2, max(2, min(_FAR, context)))
    taken: list[list[float]] = [[], [], []]
    for _ in range(_TIMES + 1):
        for count, seconds in zip(counts, taken, strict=True):
            begun = time.perf_counter()
            target.extend([0] * count, ort.run_options())
            seconds.append(time.perf_counter() - begun)
            target.rewind(0)
    plain, pair, long = (min(seconds[1:]) for seconds in taken)  # the first of each binds buffers
    pair = max(pair, plain)  # a shorter pass that took longer was disturbed
    return Pace(plain, pair, max(0.0, long - pair) / max(1, counts[2] - 2))
