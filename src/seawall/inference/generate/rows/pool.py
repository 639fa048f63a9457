"""The bytes of a batch: what rows hold and are promised, what they share, and the prompts that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seawall.inference.errors import NoRoomError

from .memory import SHARES, Layout, Piece, RowMemory
from .prefix import PrefixCache, block_names
from .request import Request
from .row import Row


class Pool:
    """Key/value caches of rows and kept prompts, within one budget.

    A row is promised pages for its prompt and its longest answer when it joins. What it shares with others counts
    once, however many of them there are.

    Attributes:
        memory: of the rows.
        prefix: the kept prompts.
        budget: most bytes of both.
        page: tokens that share a page: the unit of everything here.
    """

    def __init__(
        self, layout: Layout, *, rows: int, context: int, budget: int | None, prefix_bytes: int, bitwise: bool
    ) -> None:
        self.memory = RowMemory(layout, rows, context)
        self.page = layout.page_tokens
        self.prefix = PrefixCache(block_tokens=self.page, token_bytes=layout.token_bytes, most_bytes=prefix_bytes)
        whole = rows * self.memory.positions * layout.token_bytes + prefix_bytes
        self.budget = whole if budget is None else budget
        self._context = context
        self._token_bytes = layout.token_bytes
        self._least = 1 if bitwise else 2  # tokens of a prompt to compute anyway: its last run is to be like any other

    def needs(self, request: Request) -> int:
        """Tokens, in whole pages, that a request may come to have."""
        return -(-min(len(request.prompt) + request.max_tokens, self._context) // self.page) * self.page

    def held(self) -> int:
        """Bytes that the system holds for rows and kept prompts together, each counted once."""
        idle = set(self.prefix.segments) - self.memory.segments
        return self.memory.committed_bytes + sum(segment.tokens for segment in idle) * self._token_bytes

    def promised(self, rows: Iterable[Row]) -> int:
        """Bytes that are spoken for: what rows may come to need, and the kept prompts."""
        segments = self.memory.segments | set(self.prefix.segments)
        own = sum(self.needs(row.request) - self.memory.shared(row.index) for row in rows)
        return (own + sum(segment.tokens for segment in segments)) * self._token_bytes

    def lacks(self, request: Request, found: Sequence[Piece], rows: Iterable[Row]) -> int:
        """Bytes that are missing for a request, even if all kept prompts go that nobody uses; 0 or less if none."""
        used = self._used(found)
        idle = sum(segment.tokens for segment in self.prefix.segments if segment not in used)
        return self._own(request, found) + self.promised(rows) - idle * self._token_bytes - self.budget

    def make_room(self, request: Request, found: Sequence[Piece], rows: Sequence[Row]) -> None:
        """Drop as many kept prompts as it takes, the least recently used first; NoRoomError if that is not enough."""
        needed = self.needs(request) * self._token_bytes
        if (lacking := self.lacks(request, found, rows)) > 0:
            raise NoRoomError(needed, max(0, needed - lacking), self.memory.rows)
        used = self._used(found)
        own, promised = self._own(request, found), self.promised(rows)
        for segment in list(self.prefix.segments):
            if own + promised <= self.budget:
                break
            if segment not in used:
                self.prefix.drop(segment)
                promised -= segment.tokens * self._token_bytes

    def names(self, request: Request) -> list[bytes]:
        """Names of the blocks of a prompt that need not be computed where they are known."""
        return self.all_names(request)[: max(0, len(request.prompt) - self._least) // self.page]

    def all_names(self, request: Request, answer: Sequence[int] = ()) -> list[bytes]:
        """Names of all whole blocks of a prompt and what came of it."""
        return block_names([*request.prompt, *answer], self.page, request.salt)

    def adopt(self, row: Row, pieces: tuple[Piece, ...]) -> None:
        """Let a row that has computed nothing begin with these, if they are more than it begins with already."""
        tokens = _tokens(pieces)
        if tokens > row.length:
            self.memory.adopt(row.index, pieces)
            row.length = row.cached_tokens = tokens

    def keep(self, row: Row, names: Sequence[bytes], *, anyway: bool = False) -> None:
        """Let others begin with these blocks of a row, which has computed them.

        They go into the prefix cache; if it takes none, `anyway` still makes them pages that rows can share.
        """
        known = self.prefix.find(names)
        start = self.memory.shared(row.index)
        if _tokens(known) > start:  # somebody else computed them meanwhile
            self.memory.adopt(row.index, known)
            start = _tokens(known)
        stop = len(names) * self.page
        takes = self.prefix.takes(stop - start)
        if stop <= start or not (takes or (anyway and SHARES)):
            return
        try:
            segment = self.memory.share(row.index, start, stop)
        except OSError:  # no memory is left for it: nothing is kept, and nothing is lost
            return
        if takes:
            self.prefix.add(names[start // self.page :], segment)

    def forget(self, row: Row) -> None:
        """Let nobody begin with what a row began with or was kept of it."""
        for segment in self.memory.segments_of(row.index) & set(self.prefix.segments):
            self.prefix.drop(segment)

    def _own(self, request: Request, found: Sequence[Piece]) -> int:
        return (self.needs(request) - (_tokens(found) if SHARES else 0)) * self._token_bytes

    def _used(self, found: Sequence[Piece]) -> set[object]:
        return {*self.memory.segments, *(piece.segment for piece in found)}


def _tokens(pieces: Iterable[Piece]) -> int:
    return sum(piece.tokens for piece in pieces)
