"""An array as groups that share a scale, and a walk over it in pieces that stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from seawall.inference.errors import InvalidArrayError, NotFiniteError

from .scheme import Scheme

Array = np.ndarray[Any, Any]
Tile = tuple[slice, slice, slice]

_TILE = 1 << 15  # values: with their float32 copies they fit any level-2 cache; 2^13 was 2 times slower
_SHORT = 512  # numpy reduces rows one at a time; up to about this length turning them into columns first is faster


class Layout(NamedTuple):
    """An array's shape as [outer, groups, inner]: every value of one group has the same scale."""

    outer: int
    groups: int
    inner: int
    padded: int | None = None  # length of the last axis in whole blocks, where its own is not

    @classmethod
    def of(cls, shape: tuple[int, ...], scheme: Scheme) -> Layout:
        """How `scheme` groups an array of this shape."""
        groups = math.prod(scheme.scale_shape(shape))
        if scheme.block_size is not None:
            block = min(scheme.block_size, max(shape[-1], 1))
            whole = -(-shape[-1] // block) * block
            return cls(1, groups, block, whole if whole != shape[-1] else None)
        if scheme.axis is None:
            return cls(1, 1, math.prod(shape))
        axis = scheme.axis % len(shape)
        return cls(math.prod(shape[:axis]), groups, math.prod(shape[axis + 1 :]))

    def group(self, array: Array) -> Array:
        """The array as [outer, groups, inner]; a view where it can be. Short blocks are filled up with zeros."""
        if self.padded is not None:
            array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, self.padded - array.shape[-1])])
        return array.reshape(self.outer, self.groups, self.inner)

    def ungroup(self, grouped: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `group`."""
        if self.padded is None:
            return grouped.reshape(shape)
        return np.ascontiguousarray(grouped.reshape(*shape[:-1], self.padded)[..., : shape[-1]])

    def per_group(self, values: Array) -> Array:
        """One value per group, shaped to broadcast."""
        return values.reshape(1, self.groups, 1)

    def tiles(self) -> Iterator[Tile]:
        """Slices that cover [outer, groups, inner] in memory order, none much larger than a cache."""
        inner = min(max(self.inner, 1), _TILE)
        groups = min(max(self.groups, 1), max(1, _TILE // inner))
        outer = max(1, _TILE // (inner * groups))
        for first in range(0, self.outer, outer):
            for second in range(0, self.groups, groups):
                for third in range(0, self.inner, inner):
                    yield slice(first, first + outer), slice(second, second + groups), slice(third, third + inner)


def floats(array: Any) -> tuple[Array, np.dtype[Any]]:
    """The array, and the type to calculate in: float32, which holds the narrower ones exactly, or float64."""
    array = np.asarray(array)
    name = array.dtype.name
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise InvalidArrayError(
            f"expected float16, bfloat16, float32 or float64 values, got {name}: "
            "integers may be codes already; if they are not, convert them with astype"
        )
    return array, np.dtype(np.float64 if name == "float64" else np.float32)


def not_finite(array: Array) -> NotFiniteError:
    """The error that says where the NaN and infinities are."""
    bad = ~np.isfinite(array.astype(np.float64))
    first = np.unravel_index(int(np.argmax(bad)), array.shape)
    return NotFiniteError(int(bad.sum()), tuple(int(index) for index in first))


def extremes(grouped: Array, layout: Layout, work: np.dtype[Any]) -> tuple[Array, Array]:
    """The smallest and largest value of each group, as if it held a zero; NaN where it holds NaN."""
    low, high = np.zeros(layout.groups, work), np.zeros(layout.groups, work)
    for tile in layout.tiles():
        values = grouped[tile].astype(work, copy=False).transpose(0, 2, 1)
        if layout.inner <= _SHORT:
            values = np.ascontiguousarray(values)
        part = tile[1]
        np.minimum(low[part], values.min(axis=(0, 1)), out=low[part])
        np.maximum(high[part], values.max(axis=(0, 1)), out=high[part])
    return low, high
