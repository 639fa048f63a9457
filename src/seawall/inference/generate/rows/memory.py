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


class Segment:
    """Positions of some prompt, written once: `tokens` of them, a whole number of pages.

    Dropping it frees them, once no row has them mapped.
    """

    __slots__ = ("__weakref__", "array", "descriptor", "tokens")

    def __init__(self, layout: Layout, tokens: int) -> None:
        self.tokens = tokens
        shape = (layout.layers, 2, layout.heads, tokens, layout.width)
        size = tokens * layout.token_bytes
        if SHARES:
            self.descriptor = os.memfd_create("seawall-prompt", os.MFD_CLOEXEC)
            try:
                os.ftruncate(self.descriptor, size)
                memory = mmap.mmap(self.descriptor, size)
            except BaseException:
                os.close(self.descriptor)
                raise
            self.array = np.frombuffer(memory, layout.dtype).reshape(shape)
        else:
            self.descriptor = -1
            self.array = np.empty(shape, layout.dtype)

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)


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
        self._pieces: list[tuple[Piece, ...]] = [()] * rows  # mapped copy-on-write at the row's beginning

    @property
    def committed_bytes(self) -> int:
        """Bytes of the rows' own pages and of the segments that are mapped, each counted once."""
        page, per_token = self.layout.page_tokens, self.layout.token_bytes
        own = sum(-(-length // page) * page - self.shared(row) for row, length in enumerate(self.lengths) if length)
        segments = {piece.segment for pieces in self._pieces for piece in pieces}
        return (own + sum(segment.tokens for segment in segments)) * per_token

    @property
    def used_bytes(self) -> int:
        """Bytes of the positions in use; what rows share counts once."""
        mapped = {
            (piece.segment, position)
            for pieces in self._pieces
            for piece in pieces
            for position in range(piece.start, piece.stop, self.layout.page_tokens)
        }
        own = sum(length - self.shared(row) for row, length in enumerate(self.lengths))
        return (own + len(mapped) * self.layout.page_tokens) * self.layout.token_bytes

    def shared(self, row: int) -> int:
        """Positions of a row that are mapped from segments."""
        return sum(piece.tokens for piece in self._pieces[row])

    def adopt(self, row: int, pieces: tuple[Piece, ...]) -> None:
        """Let a row begin with these positions, in place of what it has there."""
        start = 0
        for piece in pieces:
            if SHARES:
                self._map(row, start, piece)
            else:
                self.array[:, :, row, :, start : start + piece.tokens] = piece.segment.array[
                    :, :, :, piece.start : piece.stop
                ]
            start += piece.tokens
        self._pieces[row] = pieces if SHARES else ()
        self.lengths[row] = max(self.lengths[row], start)

    def publish(self, row: int, start: int, stop: int) -> Segment:
        """Copy positions of a row, whole pages, into a segment of their own."""
        segment = Segment(self.layout, stop - start)
        segment.array[:] = self.array[:, :, row, :, start:stop]
        return segment

    def move(self, source: int, target: int) -> None:
        """Let the sequence of one row go on in another, which is free."""
        pieces, length = self._pieces[source], self.lengths[source]
        self.adopt(target, pieces)
        start = self.shared(target)
        self.array[:, :, target, :, start:length] = self.array[:, :, source, :, start:length]
        self.lengths[target] = length
        self.release(source)

    def release(self, row: int) -> None:
        """Give back all pages of a row."""
        page, length = self.layout.page_tokens, self.lengths[row]
        if length:
            size = -(-length // page) * page * self.layout.vector_bytes
            for strip in range(self.layout.strips):
                if self._pieces[row]:
                    _map_fixed(self._address(row, strip), size)
                elif hasattr(self._memory, "madvise"):
                    self._memory.madvise(mmap.MADV_DONTNEED, self._address(row, strip) - self._base, size)
        self._pieces[row] = ()
        self.lengths[row] = 0

    def _address(self, row: int, strip: int) -> int:
        part, head = divmod(strip, self.layout.heads)
        return self._base + ((part * self.rows + row) * self.layout.heads + head) * self._strip_bytes

    def _map(self, row: int, start: int, piece: Piece) -> None:
        vector = self.layout.vector_bytes
        for strip in range(self.layout.strips):
            offset = (strip * piece.segment.tokens + piece.start) * vector
            address = self._address(row, strip) + start * vector
            _map_fixed(address, piece.tokens * vector, piece.segment.descriptor, offset)


def _private_memory(size: int) -> mmap.mmap:
    """Zeros that nobody else sees, committed as they are written. Shared memory, the default, is never given back."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))


if SHARES:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
_FIXED = 0x10  # MAP_FIXED of Linux, which Python's mmap has no name for


def _map_fixed(address: int, size: int, descriptor: int = -1, offset: int = 0) -> None:
    """Put other pages where pages of ours are: a file's, copy-on-write, or fresh zeros."""
    flags = mmap.MAP_PRIVATE | _FIXED | (mmap.MAP_ANONYMOUS if descriptor < 0 else 0)
    found = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, offset)
    if found == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
