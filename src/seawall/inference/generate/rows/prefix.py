"""Beginnings of prompts that were read before, kept for the next prompt that begins so.

A prompt is cut into blocks of as many tokens as share a memory page, and each block's name is a hash of its tokens and
of the name of the block before. So equal names mean equal beginnings, and the longest known one is found block by
block. The first name is a hash of the tenant's salt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .memory import Piece, Segment

_DIGEST = 16
_MOST_SEGMENTS = 1024  # whatever room bytes leave: a row that begins with many has a mapping for each strip of each


@dataclass(frozen=True, slots=True)
class PrefixStatistics:
    """What the prefix cache did and holds.

    Attributes:
        prompts: prompts that were looked up.
        hits: those of which a beginning was found.
        prompt_tokens: tokens of all prompts.
        hit_tokens: tokens that were found, and not computed again.
        evicted: segments dropped to make room.
        segments: segments held.
        bytes: bytes held.
    """

    prompts: int
    hits: int
    prompt_tokens: int
    hit_tokens: int
    evicted: int
    segments: int
    bytes: int


def block_names(tokens: Sequence[int], size: int, salt: bytes) -> list[bytes]:
    """Names of the whole blocks of a prompt, first to last; 1 us each."""
    name = hashlib.blake2b(salt, digest_size=_DIGEST, person=b"seawall prefix").digest()
    names = []
    for start in range(0, len(tokens) - size + 1, size):
        name = hashlib.blake2b(name + array("q", tokens[start : start + size]).tobytes(), digest_size=_DIGEST).digest()
        names.append(name)
    return names


class PrefixCache:
    """Segments by the names of their blocks; the least recently used go first. Used by one thread at a time."""

    def __init__(self, *, block_tokens: int, token_bytes: int, most_bytes: int) -> None:
        self.bytes = 0
        self._block_tokens = block_tokens
        self._token_bytes = token_bytes
        self._most_bytes = most_bytes
        self._blocks: dict[bytes, tuple[Segment, int]] = {}
        self._held: OrderedDict[Segment, tuple[bytes, ...]] = OrderedDict()  # least recently used first
        self._prompts = self._hits = self._prompt_tokens = self._hit_tokens = self._evicted = 0

    @property
    def segments(self) -> Iterable[Segment]:
        """Those that are held, least recently used first."""
        return self._held.keys()

    def find(self, names: Sequence[bytes]) -> tuple[Piece, ...]:
        """The longest beginning that is known."""
        found: list[Piece] = []
        for name in names:
            if (block := self._blocks.get(name)) is None:
                break
            segment, start = block
            if found and found[-1].segment is segment and found[-1].stop == start:
                found[-1] = Piece(segment, found[-1].start, start + self._block_tokens)
            else:
                found.append(Piece(segment, start, start + self._block_tokens))
        for piece in reversed(found):  # a beginning outlives what builds on it
            self._held.move_to_end(piece.segment)
        return tuple(found)

    def add(self, names: Sequence[bytes], segment: Segment) -> None:
        """Keep a segment, whose blocks have these names; others go where bytes run short."""
        self._held[segment] = tuple(names)
        self.bytes += segment.tokens * self._token_bytes
        for index, name in enumerate(names):
            self._blocks[name] = (segment, index * self._block_tokens)
        while self._held and (self.bytes > self._most_bytes or len(self._held) > _MOST_SEGMENTS):
            self.drop(next(iter(self._held)))

    def takes(self, tokens: int) -> bool:
        """Whether so many tokens could be kept at all."""
        return 0 < tokens * self._token_bytes <= self._most_bytes

    def drop(self, segment: Segment) -> None:
        """Forget a segment; its memory is freed once no row has it mapped."""
        for name in self._held.pop(segment):
            if self._blocks.get(name, (None,))[0] is segment:
                del self._blocks[name]
        self.bytes -= segment.tokens * self._token_bytes
        self._evicted += 1

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._blocks.clear()
        self.bytes = 0

    def count(self, prompt_tokens: int, hit_tokens: int) -> None:
        """A prompt begins to be read, and so much of it was found."""
        self._prompts += 1
        self._hits += hit_tokens > 0
        self._prompt_tokens += prompt_tokens
        self._hit_tokens += hit_tokens

    def statistics(self) -> PrefixStatistics:
        """The counts so far."""
        return PrefixStatistics(
            self._prompts,
            self._hits,
            self._prompt_tokens,
            self._hit_tokens,
            self._evicted,
            len(self._held),
            self.bytes,
        )
