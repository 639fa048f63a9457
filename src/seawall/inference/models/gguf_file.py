"""Reads GGUF headers as hostile input: every length is checked against the file before it is believed.

The `gguf` package's own reader loops once per element that the header claims, so a flipped byte can keep
it busy for ever; its dequantisation, used here, only sees bytes that were checked.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seawall.inference.errors import CorruptModelError, MissingExtraError

from .lossless import BLOCK, Blocks
from .mapped_file import MappedFile

try:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import Q4_K, dequantize
except ImportError as error:
    raise MissingExtraError(error.name or "gguf") from error

_SCALARS = {
    kind: f"<{letter}"
    for kind, letter in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_STRING, _ARRAY = 8, 9
_MAX_KEYS = 4096
_MAX_TENSORS = 65_536
_MAX_STRING = 1 << 20
_MAX_ARRAY = 1 << 20  # vocabularies have a quarter of this

Weights = np.ndarray[Any, np.dtype[np.float32]]
Parts = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _q4_0(stored: np.ndarray[Any, Any]) -> Parts:
    """Scales, minima and codes of blocks of 18 bytes: a scale, and 32 codes that stand for -8 to 7."""
    scales = _halves(stored[:, :2])
    return scales, -8 * scales, _nibbles(stored[:, 2:])


def _q4_1(stored: np.ndarray[Any, Any]) -> Parts:
    """Of blocks of 20 bytes: a scale, a minimum, and 32 codes."""
    return _halves(stored[:, :2]), _halves(stored[:, 2:4]), _nibbles(stored[:, 4:])


def _q4_k(stored: np.ndarray[Any, Any]) -> Parts:
    """Of 144 bytes for eight blocks: two factors, eight scales and minima of 6 bits for them, and 256 codes."""
    scales, minima = Q4_K.get_scale_min(stored[:, 4:16])
    codes = _nibbles(stored[:, 16:].reshape(-1, 32))  # 32 bytes hold two blocks
    return _halves(stored[:, :2]) * scales, -_halves(stored[:, 2:4]) * minima, codes


def _halves(stored: np.ndarray[Any, Any]) -> Weights:
    return stored.copy().view("<f2").astype(np.float32)


def _nibbles(stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The low halves of each row, then the high ones."""
    return np.concatenate((stored & 15, stored >> 4), axis=1)


_BLOCKS: dict[GGMLQuantizationType, Callable[[np.ndarray[Any, Any]], Parts]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q4_K: _q4_k,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file; `shape` is (rows, columns) as numpy sees it."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


class GGUFFile(MappedFile):
    """A GGUF file (little endian, version 2 or 3), open for reading.

    Raises CorruptModelError for whatever does not add up, before any memory is spent on it.

    Attributes:
        metadata: the header's keys and values; strings, numbers, booleans and flat lists of them.
        tensors: what the header says about each tensor, by name.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._at = 0
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    @property
    def stores_four_bits(self) -> bool:
        """Whether there are tensors that `quantized_q4` takes over."""
        return any(tensor.kind in _BLOCKS for tensor in self.tensors.values())

    def dequantized(self, name: str) -> Weights:
        """The tensor's values as float32, whatever it is stored as."""
        info = self._info(name)
        try:
            with np.errstate(all="ignore"):  # hostile scales overflow; the result is checked below
                values = dequantize(self._stored(info), info.kind)
        except (NotImplementedError, ValueError) as error:
            raise self._corrupt(f"tensor {name!r} is stored as {info.kind.name}: {error}") from error
        weights = np.ascontiguousarray(values, dtype=np.float32).reshape(info.shape)
        if not np.isfinite(weights).all():
            raise self._corrupt(f"tensor {name!r} holds values that are not finite")
        return weights

    def quantized_q8(self, name: str) -> tuple[np.ndarray[Any, Any], Weights] | None:
        """Values (int8, rows x columns) and scales (one per 32 columns) of a Q8_0 tensor, else None."""
        info = self._info(name)
        if info.kind is not GGMLQuantizationType.Q8_0:
            return None
        blocks = self._stored(info).reshape(-1, 34)
        scales = blocks[:, :2].copy().view("<f2").astype(np.float32).reshape(info.shape[0], -1)
        if not np.isfinite(scales).all():
            raise self._corrupt(f"tensor {name!r} holds scales that are not finite")
        return blocks[:, 2:].view(np.int8).reshape(info.shape), scales

    def quantized_q4(self, name: str) -> Blocks | None:
        """The blocks of a Q4_0, Q4_1 or Q4_K tensor as they are, else None."""
        info = self._info(name)
        if info.kind not in _BLOCKS:
            return None
        rows, size = info.shape[0], GGML_QUANT_SIZES[info.kind][1]
        scales, minima, codes = _BLOCKS[info.kind](self._stored(info).reshape(-1, size))
        if not (np.isfinite(scales).all() and np.isfinite(minima).all()):
            raise self._corrupt(f"tensor {name!r} holds scales that are not finite")
        return Blocks(codes.reshape(rows, -1, BLOCK), scales.reshape(rows, -1), minima.reshape(rows, -1))

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise self._corrupt(f"tensor {name!r} is missing") from None

    def _stored(self, info: TensorInfo) -> np.ndarray[Any, Any]:
        """The tensor's bytes as rows; a copy, so that nothing keeps the file mapped."""
        raw = np.frombuffer(self._map[info.start : info.start + info.size], dtype=np.uint8)
        plain = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}.get(info.kind)
        return raw.view(plain).reshape(info.shape) if plain else raw.reshape(*info.shape[:-1], -1)

    def _corrupt(self, why: str) -> CorruptModelError:
        return CorruptModelError(self.path, why)

    def _take(self, size: int) -> bytes:
        if size < 0 or self._at + size > len(self._map):
            raise self._corrupt(f"it ends after {len(self._map)} bytes, inside its header")
        taken = self._map[self._at : self._at + size]
        self._at += size
        return taken

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _count(self, what: str, limit: int) -> int:
        count = int(self._number("<Q"))
        if count > limit:
            raise self._corrupt(f"its header claims {count} {what}; more than {limit} are refused")
        return count

    def _string(self) -> str:
        raw = self._take(self._count("bytes in a string", _MAX_STRING))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._corrupt(f"a string in its header is not UTF-8: {error}") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._corrupt(f"its header holds a value of unknown type {kind}")
        inner = self._number("<I")
        count = self._count("array elements", _MAX_ARRAY)
        if inner == _STRING:
            return [self._string() for _ in range(count)]
        if inner not in _SCALARS:
            raise self._corrupt(f"its header holds an array of type {inner}, which is refused")
        size = struct.calcsize(_SCALARS[inner])
        return list(struct.unpack(f"<{count}{_SCALARS[inner][1]}", self._take(count * size)))

    def _read_header(self) -> None:
        if self._take(4) != b"GGUF":
            raise self._corrupt("it does not start with the letters GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise self._corrupt(f"its GGUF version is {version}; versions 2 and 3 are read")
        tensors = self._count("tensors", _MAX_TENSORS)
        keys = self._count("keys", _MAX_KEYS)
        for _ in range(keys):
            key = self._string()
            self.metadata[key] = self._value(self._number("<I"))
        found = [self._tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
            raise self._corrupt(f"its alignment is {alignment!r}")
        data = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in found:
            self._place(name, shape, kind, data + offset)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        rank = self._number("<I")
        if not 1 <= rank <= 4:
            raise self._corrupt(f"tensor {name!r} has {rank} dimensions; 1 to 4 are read")
        shape = tuple(self._number("<Q") for _ in range(rank))[::-1]
        return name, shape, self._number("<I"), self._number("<Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> None:
        try:
            stored = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[stored]
        except (ValueError, KeyError):
            raise self._corrupt(f"tensor {name!r} is stored as unknown type {kind}") from None
        count = math.prod(shape)
        size = count // block * block_bytes
        if count == 0 or shape[-1] % block or start + size > len(self._map):
            raise self._corrupt(f"tensor {name!r} of shape {shape} does not fit into the file")
        if name in self.tensors:
            raise self._corrupt(f"tensor {name!r} occurs twice")
        self.tensors[name] = TensorInfo(name, shape, stored, start, size)
