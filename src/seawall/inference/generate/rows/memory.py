"""The key/value cache of many sequences, paged by the processor's own page tables.

Attention kernels on the CPU want the cache of a sequence in one piece, so blocks can't be scattered as on a GPU. But
memory that is only reserved costs nothing: the system commits a page when it is first written, and takes it back when
it is told to. So every row has room for the whole context, and holds what it uses, rounded up to pages.

A prompt that several rows begin with is kept once: its pages are mapped into each of them copy-on-write. Where that
can't be done (not Linux), it is copied. This is vAttention's idea (arXiv 2405.04437), on the processor that has had
page tables all along.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_MAP_FAILED = ctypes.c_void_p(-1).value
_FLOAT = np.dtype(np.float32)
SHARES = sys.platform == "linux" and hasattr(os, "memfd_create")


@dataclass(frozen=True, slots=True)
class Layout:
    """What one position of one sequence takes: `strips` vectors, one for each layer, key or value, and head.

    Attributes:
        layers: of the model.
        heads: of keys and values in each layer.
        width: numbers in a vector.
        dtype: of a number.
    """

    layers: int
    heads: int
    width: int
    dtype: np.dtype[Any] = _FLOAT

    @property
    def strips(self) -> int:
        """Vectors of one position."""
        return self.layers * 2 * self.heads

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector."""
        return self.width * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one position, all vectors together."""
        return self.strips * self.vector_bytes

    @property
    def page_tokens(self) -> int:
        """Positions that share a page in each strip: the unit of committing and of sharing."""
        return math.lcm(mmap.PAGESIZE, self.vector_bytes) // self.vector_bytes


class Arena:
    """One memory file for all segments, so that they take one file descriptor however many they are.

    Segments have places of their own in it. A freed one gives its pages back, and its place to the next of its size.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("seawall-prompts", os.MFD_CLOEXEC)
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._owner = os.getpid()

    def take(self, size: int) -> int:
        """Where so many bytes may be written. OSError where there is no room for them."""
        if places := self._free.get(size):
            return places.pop()
        os.ftruncate(self.descriptor, self._end + size)
        self._end += size
        return self._end - size

    def give_back(self, place: int, size: int) -> None:
        """Free them. Not in a fork, where segments are forgotten that the parent goes on with."""
        if os.getpid() == self._owner and _libc.fallocate(self.descriptor, _PUNCH_HOLE, place, size) == 0:
            self._free.setdefault(size, []).append(place)

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)


class Segment:
    """Positions of some prompt, written once: `tokens` of them, a whole number of pages.

    Dropping it frees them, so whoever has them mapped holds on to it.
    """

    __slots__ = ("__weakref__", "_array", "_shape", "arena", "layout", "place", "tokens")

    def __init__(self, layout: Layout, tokens: int, arena: Arena | None) -> None:
        self.layout = layout
        self.tokens = tokens
        self.place = -1
        self.arena = arena
        self._shape = (layout.layers, 2, layout.heads, tokens, layout.width)
        self._array: Array | None = None
        if arena is None:
            self._array = np.empty(self._shape, layout.dtype)
        else:
            self.place = arena.take(self.bytes)

    @property
    def bytes(self) -> int:
        """Bytes of all its positions."""
        return self.tokens * self.layout.token_bytes

    @property
    def array(self) -> Array:
        """[layers, 2, heads, tokens, width], mapped for as long as somebody looks at it."""
        if self._array is not None:
            return self._array
        assert self.arena is not None
        memory = mmap.mmap(self.arena.descriptor, self.bytes, offset=self.place)
        return np.frombuffer(memory, self.layout.dtype).reshape(self._shape)

    def __del__(self) -> None:
        if self.arena is not None and self.place >= 0:
            self.arena.give_back(self.place, self.bytes)


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a segment: positions `start` to `stop`, whole pages."""

    segment: Segment
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Positions in it."""
        return self.stop - self.start


class RowMemory:
    """Cache for `rows` sequences of up to `positions` tokens each; used by one thread at a time.

    Attributes:
        array: [layers, 2, rows, heads, positions, width]. A row is committed as far as `lengths` says; beyond it is
            zero, or a remainder of before.
        lengths: positions in use, by row.
    """

    def __init__(self, layout: Layout, rows: int, positions: int) -> None:
        page = layout.page_tokens
        self.layout = layout
        self.rows = rows
        self.positions = -(-positions // page) * page
        self._strip_bytes = self.positions * layout.vector_bytes
        self._memory = _private_memory(layout.strips * rows * self._strip_bytes)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page holds 2 MiB of one strip: far more than a row uses
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.array: Array = np.frombuffer(self._memory, layout.dtype).reshape(
            layout.layers, 2, rows, layout.heads, self.positions, layout.width
        )
        self._base = self.array.ctypes.data
        self.lengths = [0] * rows
        self._touched = [0] * rows  # positions committed, as far as runs wrote beyond what came to be used
        self._pieces: list[tuple[Piece, ...]] = [()] * rows  # mapped copy-on-write at the row's beginning
        self._mapped: list[set[Segment]] = [set() for _ in range(rows)]  # also where only some strips could be
        self._arena = Arena() if SHARES else None

    @property
    def committed_bytes(self) -> int:
        """Bytes of the rows' own pages and of the segments that are mapped, each counted once."""
        own = sum(self._own_pages(row) for row in range(self.rows)) * self.layout.page_tokens
        return (own + sum(segment.tokens for segment in self.segments)) * self.layout.token_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the positions in use; what rows share counts once."""
        mapped = {
            (piece.segment, position)
            for pieces in self._pieces
            for piece in pieces
            for position in range(piece.start, piece.stop, self.layout.page_tokens)
        }
        own = sum(max(0, length - self.shared(row)) for row, length in enumerate(self.lengths))
        return (own + len(mapped) * self.layout.page_tokens) * self.layout.token_bytes

    @property
    def segments(self) -> set[Segment]:
        """Those that some row has mapped."""
        return {piece.segment for pieces in self._pieces for piece in pieces}

    def segments_of(self, row: int) -> set[Segment]:
        """Those that a row has mapped."""
        return {piece.segment for piece in self._pieces[row]}

    def shared(self, row: int) -> int:
        """Positions of a row that are mapped from segments."""
        return sum(piece.tokens for piece in self._pieces[row])

    def touch(self, row: int, stop: int) -> None:
        """A run is about to write a row's positions up to `stop`, although it may not come to use them all."""
        self._touched[row] = max(self._touched[row], stop)

    def adopt(self, row: int, pieces: tuple[Piece, ...]) -> None:
        """Let a row begin with these positions, in place of what it has there."""
        start, mapped = 0, SHARES
        taken: list[Piece] = []
        for piece in pieces:
            mapped = mapped and self._map(row, start, piece)
            if mapped:
                taken.append(piece)
            else:
                self.array[:, :, row, :, start : start + piece.tokens] = piece.segment.array[
                    :, :, :, piece.start : piece.stop
                ]
            start += piece.tokens
        self._pieces[row] = tuple(taken)
        self.lengths[row] = max(self.lengths[row], start)

    def share(self, row: int, start: int, stop: int) -> Segment:
        """Move positions of a row, whole pages, into a segment, which the row then has mapped.

        `start` is where what the row shares already ends. One strip goes after the other, so that no more than a strip
        is ever there twice.
        """
        segment = Segment(self.layout, stop - start, self._arena)
        array = segment.array
        piece = Piece(segment, 0, stop - start)
        mapped = SHARES and start == self.shared(row)
        for strip in range(self.layout.strips):
            where, head = divmod(strip, self.layout.heads)
            layer, kind = divmod(where, 2)
            array[layer, kind, head] = self.array[layer, kind, row, head, start:stop]
            mapped = mapped and self._map_strip(row, start, piece, strip)
        if mapped:
            self._pieces[row] += (piece,)
        return segment

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a free row begin with the first positions of another: whole pages are shared, the rest is copied."""
        self.adopt(target, self._pieces[source])
        start = self.shared(target)
        if start < length:
            self.array[:, :, target, :, start:length] = self.array[:, :, source, :, start:length]
        self.lengths[target] = length

    def move(self, source: int, target: int) -> None:
        """Let the sequence of one row go on in another, which is free."""
        pieces, length = self._pieces[source], self.lengths[source]
        self.adopt(target, pieces)
        start = self.shared(target)
        for strip in range(self.layout.strips):
            where, head = divmod(strip, self.layout.heads)
            layer, kind = divmod(where, 2)
            self.array[layer, kind, target, head, start:length] = self.array[layer, kind, source, head, start:length]
            self._free(source, strip)
        self.lengths[target] = length
        self._forget(source)

    def release(self, row: int) -> None:
        """Give back all pages of a row."""
        for strip in range(self.layout.strips):
            self._free(row, strip)
        self._forget(row)

    def _own_pages(self, row: int) -> int:
        page = self.layout.page_tokens
        return -(-max(self.lengths[row], self._touched[row]) // page) - self.shared(row) // page

    def _free(self, row: int, strip: int) -> None:
        pages = self._own_pages(row) + self.shared(row) // self.layout.page_tokens
        if not pages:
            return
        size = pages * self.layout.page_tokens * self.layout.vector_bytes
        if self._mapped[row]:
            _map_fixed(self._address(row, strip), size)
        elif hasattr(self._memory, "madvise"):
            self._memory.madvise(mmap.MADV_DONTNEED, self._address(row, strip) - self._base, size)

    def _forget(self, row: int) -> None:
        self._pieces[row] = ()
        self._mapped[row].clear()
        self.lengths[row] = self._touched[row] = 0

    def _address(self, row: int, strip: int) -> int:
        part, head = divmod(strip, self.layout.heads)
        return self._base + ((part * self.rows + row) * self.layout.heads + head) * self._strip_bytes

    def _map(self, row: int, start: int, piece: Piece) -> bool:
        return all(self._map_strip(row, start, piece, strip) for strip in range(self.layout.strips))

    def _map_strip(self, row: int, start: int, piece: Piece, strip: int) -> bool:
        """False where the process has as many mappings as the system allows; what was there before stays."""
        vector = self.layout.vector_bytes
        segment = piece.segment
        assert segment.arena is not None
        offset = segment.place + (strip * segment.tokens + piece.start) * vector
        address = self._address(row, strip) + start * vector
        try:
            _map_fixed(address, piece.tokens * vector, segment.arena.descriptor, offset)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            return False
        self._mapped[row].add(segment)
        return True


def _private_memory(size: int) -> mmap.mmap:
    """Zeros that nobody else sees, committed as they are written. Shared memory, the default, is never given back."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))


if SHARES:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    _libc.fallocate.argtypes = (*[ctypes.c_int] * 2, *[ctypes.c_int64] * 2)
_PUNCH_HOLE = 0x03  # FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE
_FIXED = 0x10  # MAP_FIXED of Linux, which Python's mmap has no name for


def _map_fixed(address: int, size: int, descriptor: int = -1, offset: int = 0) -> None:
    """Put other pages where pages of ours are: a file's, copy-on-write, or fresh zeros."""
    flags = mmap.MAP_PRIVATE | _FIXED | (mmap.MAP_ANONYMOUS if descriptor < 0 else 0)
    found = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, offset)
    if found == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
