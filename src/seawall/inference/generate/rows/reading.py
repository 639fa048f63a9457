"""Whose prompt to read next, and how much of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..slot import CHUNK
from .pool import Pool
from .row import Row

LEAST = 6  # shorter parts read hardly fewer weights for hardly any tokens
_SHARE = 0.8  # of the time that decoding took: parts are a little quicker or slower than the last ones were
_WEIGHT = 0.3  # of a new measurement


class ReadingPace:
    """Sizes the part of a prompt that is read in a step in which other rows decode.

    It takes as long as the decoding does: others wait about one step longer for each of their tokens, and the prompt
    gets half of the machine. Where few rows decode, their steps are shorter than any part worth reading.
    """

    def __init__(self, chunk: int | None = None) -> None:
        self._chunk = chunk
        self._rate = 0.0  # tokens per second, of parts that were read beside decoding

    def tokens(self, decoding_seconds: float) -> int:
        """Tokens to read after a run of decoding that took so long; 0 seconds where nobody decodes."""
        if self._chunk is not None:
            return self._chunk
        if not decoding_seconds:
            return CHUNK
        return int(min(max(_SHARE * self._rate * decoding_seconds, LEAST), CHUNK))

    def saw(self, tokens: int, seconds: float) -> None:
        """A part of so many tokens, read beside decoding, took so long."""
        if seconds > 0:
            rate = tokens / seconds
            self._rate = rate if not self._rate else (1 - _WEIGHT) * self._rate + _WEIGHT * rate


class Readers:
    """Rows that have not read their prompt, in turns.

    A row waits while an earlier one reads what it begins with itself: that takes no longer than reading it, and is read
    once. `shares` says whether what one row has read is good for another.
    """

    def __init__(self, pool: Pool, *, shares: bool) -> None:
        self._pool = pool
        self._shares = shares
        self._rows: deque[Row] = deque()

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def add(self, row: Row) -> None:
        """A row joins."""
        self._rows.append(row)

    def discard(self, row: Row) -> None:
        """A row has read its prompt, or leaves."""
        if row in self._rows:
            self._rows.remove(row)

    def next(self) -> Row | None:
        """The next row in turn that has something to read which nobody reads for it."""
        for _ in range(len(self._rows)):
            row = self._rows[0]
            self._rows.rotate(-1)
            if row.paused:
                continue
            if self._shares and row.untouched:
                if self._waits(row):
                    continue
                self._pool.adopt(row, self._pool.prefix.find(row.names))
            return row
        return None

    def waiting_for(self, reader: Row) -> list[Row]:
        """Rows that get the logits after their prompts from this one."""
        if not self._shares:
            return []
        return [row for row in self._rows if row.untouched and not row.paused and _same_logits(row, reader)]

    def _waits(self, row: Row) -> bool:
        """Whether an earlier row is still at what this one begins with; what it is done with is shared."""
        own = row.length // self._pool.page
        for other in self._rows:
            if other.number >= row.number or other.paused:
                continue
            if _same_logits(row, other):
                return True
            common = sum(mine == theirs for mine, theirs in zip(row.names, other.names, strict=False))
            if common <= own:
                continue
            if other.length < common * self._pool.page:
                return True
            self._pool.keep(other, other.names[:common])
        return False


def _same_logits(one: Row, other: Row) -> bool:
    """Whether two rows get the same logits after their prompts, by right and by arithmetic."""
    mine, theirs = one.request, other.request
    return one is not other and mine.salt == theirs.salt and one.padded is other.padded and mine.prompt == theirs.prompt
