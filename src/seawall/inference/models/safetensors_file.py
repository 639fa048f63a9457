"""Reads safetensors files as hostile input: every offset is checked against the file before it is believed.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of header length (little endian), a JSON
header with type, shape and byte range of each tensor, then the bytes, without gaps and overlaps.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from seawall.inference.errors import CorruptModelError

from .mapped_file import MappedFile

_TYPES = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"),
}  # fmt: skip
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_MAX_HEADER = 16 << 20  # the format's own limit is 100 MB; a model of 2,000 tensors has 0.2 MB
_MAX_RANK = 16
_PREFIX = 8

Weights = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the file: `start` counts from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class SafetensorsFile(MappedFile):
    """A safetensors file, open for reading.

    Raises CorruptModelError for whatever does not add up, before any memory is spent on it.

    Attributes:
        tensors: what the header says about each tensor, by name.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def floats(self, name: str, shape: tuple[int, ...]) -> Weights:
        """A copy of the tensor as float32, once it is known to have this shape and finite values."""
        stored = self.tensors.get(name)
        if stored is None:
            raise self._corrupt(f"it has no tensor {name!r}")
        if stored.dtype not in _FLOATS or stored.shape != shape:
            found = f"{stored.dtype} {list(stored.shape)}"
            raise self._corrupt(f"tensor {name!r} is {found}, expected floats {list(shape)}")
        values = np.frombuffer(self._map[stored.start : stored.start + stored.size], _TYPES[stored.dtype])
        if stored.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused
            weights = values.astype(np.float32).reshape(shape)
        if not np.isfinite(weights).all():
            raise self._corrupt(f"tensor {name!r} holds values that are not finite")
        return weights

    def _read_header(self) -> dict[str, StoredTensor]:
        if len(self._map) < _PREFIX:
            raise self._corrupt("it is shorter than its own header")
        (length,) = struct.unpack("<Q", self._map[:_PREFIX])
        if length > min(_MAX_HEADER, len(self._map) - _PREFIX):
            raise self._corrupt(f"its header claims {length} bytes")
        try:
            header = json.loads(self._map[_PREFIX : _PREFIX + length], object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError as well
            raise self._corrupt(f"its header is no JSON object with unique names: {error}") from error
        if not isinstance(header, dict):
            raise self._corrupt("its header is no JSON object")
        header.pop("__metadata__", None)
        begin = _PREFIX + length
        tensors = {name: self._tensor(name, facts, begin) for name, facts in header.items()}
        self._check_cover(tensors, begin)
        return tensors

    def _tensor(self, name: str, facts: Any, begin: int) -> StoredTensor:
        if not isinstance(facts, dict):
            raise self._corrupt(f"tensor {name!r} is not described")
        dtype, shape, offsets = facts.get("dtype"), facts.get("shape"), facts.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _TYPES:
            raise self._corrupt(f"tensor {name!r} is of the unknown type {dtype!r}")
        if not _naturals(shape) or len(shape) > _MAX_RANK:
            raise self._corrupt(f"tensor {name!r} has the shape {shape!r}")
        if not _naturals(offsets) or len(offsets) != 2:
            raise self._corrupt(f"tensor {name!r} lies at {offsets!r}")
        size = math.prod(shape) * _TYPES[dtype].itemsize
        if offsets[1] - offsets[0] != size:
            raise self._corrupt(f"tensor {name!r} of {size} bytes lies at {offsets}")
        return StoredTensor(dtype, tuple(shape), begin + offsets[0], size)

    def _check_cover(self, tensors: dict[str, StoredTensor], begin: int) -> None:
        """Every byte belongs to exactly one tensor; with the check of sizes this refuses overlap, gap and overrun."""
        ordered = sorted((stored.start, stored.size, name) for name, stored in tensors.items())
        ends = itertools.chain([begin], (start + size for start, size, _ in ordered))
        for (start, _, name), expected in zip(ordered, ends, strict=False):
            if start != expected:
                raise self._corrupt(f"tensor {name!r} begins at byte {start}, the one before it ends at {expected}")
        end = ordered[-1][0] + ordered[-1][1] if ordered else begin
        if end != len(self._map):
            raise self._corrupt(f"its tensors end at byte {end} of {len(self._map)}")

    def _corrupt(self, why: str) -> CorruptModelError:
        return CorruptModelError(self.path, why)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is repeated")
    return found


def _naturals(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
