"""What a step does: a run for all rows that decode, and one for a row that reads its prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from seawall.inference.errors import InvalidSettingError, NotFiniteOutputError, RuntimeFailure
from seawall.inference.runtime import ort

from ..answer import Step
from ..batch import Part
from ..exactness import StepExactness
from ..sampling import Logits
from ..slot import part_length
from ..speculation.settings import MOST
from ..speculation.speculator import Attempt
from .drafting import Drafts
from .pool import Pool
from .reading import Readers, ReadingPace
from .row import Row

if TYPE_CHECKING:
    from ..decoder import Decoder


class Advance(NamedTuple):
    """What a step did for one row.

    Attributes:
        row: which one.
        steps: what came of it: new tokens, or how much of the prompt was read.
        error: why the row, and no other, has failed; None while all is well.
    """

    row: Row
    steps: list[Step]
    error: Exception | None = None


class Stepping:
    """The rows of a batch, in their places, and the runs that advance them.

    Everything about a row changes after the run that it depends on, and what came of it is handed out with the next
    step that ends well. So a run that fails can be tried again.

    Attributes:
        last_run: the rows of the run that was tried last.
    """

    def __init__(self, decoder: Decoder, pool: Pool, exactness: StepExactness, pace: ReadingPace) -> None:
        self.last_run: tuple[Row, ...] = ()
        self._decoder = decoder
        self._pool = pool
        self._kind = exactness.kind
        self._together = exactness.rows
        self._pace = pace
        self._batch = decoder.batch(pool.memory.rows, pool.memory.array)
        self._drafts = Drafts(decoder, ragged=self._batch.ragged)
        self._places: list[Row | None] = [None] * pool.memory.rows
        self._readers = Readers(pool, shares=exactness.kind != "none")
        self._done: list[Advance] = []

    @property
    def active(self) -> tuple[Row, ...]:
        """The rows that are here."""
        return tuple(row for row in self._places if row is not None)

    @property
    def free(self) -> int | None:
        """The place that the next row gets: readers take the highest, for runs of decoding begin at the lowest."""
        return max((index for index, row in enumerate(self._places) if row is None), default=None)

    def add(self, row: Row) -> None:
        """A row joins, at its place."""
        self._places[row.index] = row
        self._readers.add(row)

    def leave(self, row: Row) -> None:
        """A row goes, if it has not gone already, and whatever was not handed out of it."""
        if not row.finished and row not in self._places:
            raise InvalidSettingError("row must be of this batch, got one of another: let it leave that one")
        self._done = [advance for advance in self._done if advance.row is not row]
        if not row.finished:
            row.left = True
            self._release(row)

    def close(self) -> None:
        """Let the session go."""
        self._done.clear()
        del self._batch

    def step(self, options: ort.RunOptions) -> list[Advance]:
        """See `ContinuousBatch.step`."""
        self._compact()
        begun = time.perf_counter()
        decoding = [row for row in self.active if not row.reading and not row.paused]
        for group in self._groups(decoding):
            self._decode(group, options)
        self._read(time.perf_counter() - begun if decoding else 0.0, options)
        done, self._done = self._done, []
        return done

    def _compact(self) -> None:
        """Close a gap below the highest row that decodes, for a run computes the rows in between too."""
        decoding = [row for row in self.active if not row.reading]
        if len(decoding) < 2 or None not in self._places:
            return
        top, gap = max(decoding, key=lambda row: row.index), self._places.index(None)
        if gap < top.index and not top.pinned:
            self._pool.memory.move(top.index, gap)
            self._places[top.index], self._places[gap] = None, top
            top.index = gap

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that may share a run."""
        if not self._together:
            return [[row] for row in rows]
        groups = [[row for row in rows if row.padded is padded] for padded in (False, True)]
        return [group for group in groups if group]

    def _decode(self, rows: Sequence[Row], options: ort.RunOptions) -> None:
        """One run: a token more for each row, or as many as it decides of a draft."""
        for row in rows:
            if row.pinned:  # its draft model may write as far as the draft goes
                self._pool.memory.touch(row.index, row.length + 1 + min(MOST, row.answer.room))
        attempts, failed = self._drafts.make(rows, options)
        for row, error in failed.items():
            self._fail(row, error)
        rows = [row for row in rows if row not in failed]
        if not rows:
            return
        parts = []
        for row in rows:
            tokens = [row.pending, *(attempts[row].tokens if row in attempts else ())]
            parts.append(Part(row.index, tokens, row.length, padding=int(row.padded and len(tokens) == 1)))
        self._try(rows, parts)
        begun = time.perf_counter()
        found = self._batch.run_all(parts, options)
        seconds, before = time.perf_counter() - begun, sum(len(row.tokens) for row in rows)
        alone = begun if len(rows) == 1 else None
        for row, logits in zip(rows, found, strict=True):
            self._advance(row, logits, attempts.get(row), begun=alone)
        if attempts and alone is None:
            decided = sum(len(row.tokens) for row in rows) - before
            self._drafts.learn(rows, max(part.width for part in parts), decided, seconds)

    def _try(self, rows: Sequence[Row], parts: Sequence[Part]) -> None:
        """A run is about to be tried."""
        self.last_run = tuple(rows)
        for part in parts:
            self._pool.memory.touch(part.row, part.length + part.width)

    def _read(self, decoding_seconds: float, options: ort.RunOptions) -> None:
        """A part of the prompt of one row."""
        if (row := self._readers.next()) is None:
            return
        first = row.untouched
        count = part_length(row.prompt_tokens - row.length, self._pace.tokens(decoding_seconds))
        tokens = row.request.prompt[row.length : row.length + count]
        part = Part(row.index, tokens, row.length, padding=int(row.padded and count == 1))
        self._try([row], [part])
        begun = time.perf_counter()
        logits = self._batch.run([part], options)[0]
        if decoding_seconds:
            self._pace.saw(count, time.perf_counter() - begun)
        if first:
            self._pool.prefix.count(row.prompt_tokens, row.cached_tokens)
        self._reached(row, row.length + count)
        if row.length < row.prompt_tokens:
            self._done.append(Advance(row, [Step(None, "", None, count)]))
        else:
            self._begin(row, logits, count)

    def _begin(self, reader: Row, logits: Logits, read: int) -> None:
        """The prompt of a row is read: its answer begins, and that of rows that waited for the same."""
        rows = [reader, *self._readers.waiting_for(reader)]
        self._pool.keep(reader, self._pool.all_names(reader.request), anyway=len(rows) > 1)
        for row in rows[1:]:
            self._pool.prefix.count(row.prompt_tokens, row.prompt_tokens)
            self._pool.memory.copy(reader.index, row.index, reader.length)
            row.length = row.cached_tokens = reader.length
        for row in rows:
            self._readers.discard(row)
            self._advance(row, logits[None], None, read=read if row is reader else 0)

    def _advance(
        self, row: Row, logits: Logits, attempt: Attempt | None, *, begun: float | None = None, read: int = 0
    ) -> None:
        """Choose what follows in one row. What goes wrong in that is its own affair."""
        try:
            if attempt is None:
                tokens = [self._chosen(row, logits[0])]
            else:
                assert row.speculator is not None
                tokens = row.speculator.settle(attempt, logits, begun)
            steps: list[Step] = []
            for token in tokens:
                if row.answer.finish is None:  # a stop string may be complete before the last of them
                    steps.append(row.answer.accept(token, read))
            self._reached(row, row.prompt_tokens + len(row.tokens) - 1)
        except Exception as error:  # a user's constraint may raise anything
            self._fail(row, self._told(error, logits))
        else:
            self._done.append(Advance(row, steps))
            if row.finished:
                self._end(row)

    def _chosen(self, row: Row, logits: Logits) -> int:
        """The next token without a draft; with the first one speculation begins."""
        row.begin(self._decoder, self._pool.memory.array[:, :, row.index : row.index + 1])
        token = row.chooser.choose(logits)
        row.chooser.decide(token, logits)
        if row.speculator is not None:
            row.speculator.begin(token)
        return token

    def _reached(self, row: Row, length: int) -> None:
        row.length = self._pool.memory.lengths[row.index] = length

    def _told(self, error: Exception, logits: Logits) -> Exception:
        wrong = int(np.count_nonzero(~np.isfinite(logits))) if isinstance(error, RuntimeFailure) else 0
        if not wrong:
            return error
        told = NotFiniteOutputError(self._decoder.name, "logits", wrong)
        told.__cause__ = error
        return told

    def _fail(self, row: Row, error: Exception) -> None:
        row.error = error
        if isinstance(error, NotFiniteOutputError):
            self._pool.forget(row)
        self._done.append(Advance(row, [], error))
        self._end(row)

    def _end(self, row: Row) -> None:
        """A row has come to its end: what it read stays for others, unless something was wrong with it."""
        if row.error is None and self._kind == "bitwise":
            self._pool.keep(row, self._pool.all_names(row.request, row.tokens[:-1]))
        try:
            self._release(row)
        except Exception as error:  # a user's drafter, while it closes
            row.error = row.error or error
            self._done.append(Advance(row, [], error))

    def _release(self, row: Row) -> None:
        """Give back what a row holds."""
        self._readers.discard(row)
        self._places[row.index] = None
        self._pool.memory.release(row.index)
        row.close()
