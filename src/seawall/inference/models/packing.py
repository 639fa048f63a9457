"""Weights as MatMulNBits stores them: per block of input columns, symmetric or with whole zero points. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from seawall.inference.quantize.bits import pack_bits, unpack_bits

Array = np.ndarray[Any, Any]
_SMALLEST = 1e-30  # a scale below this has no finite inverse in float32, and nothing to say


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantised matrix of `rows` outputs and `columns` inputs.

    Attributes:
        data: uint8 [rows, blocks, block * bits / 8]; two 4-bit values per byte, the low half first.
        scales: float32 [rows, blocks].
        zero_points: uint8 [rows, ceil(blocks * bits / 8)], packed like `data`; None for 2^(bits-1) throughout. Whole
            ones cost no speed; fractional ones, which ONNX Runtime also takes, are 80 times slower.
    """

    data: Array
    scales: Array
    rows: int
    columns: int
    bits: int
    block: int
    zero_points: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.data.nbytes + self.scales.nbytes + (0 if self.zero_points is None else self.zero_points.nbytes)


def pack(weights: Array, *, bits: int, block: int) -> PackedWeight:
    """Round a float32 [rows, columns] matrix to `bits` bits, `block` columns sharing one scale.

    The value of largest magnitude in a block maps to -2^(bits-1) with its own sign in the scale, which
    uses the whole range; a block of zeros gets scale 0. Columns are padded with zeros to whole blocks.
    """
    rows, columns = weights.shape
    blocks = -(-columns // block)
    if columns % block:
        weights = np.pad(weights, ((0, 0), (0, blocks * block - columns)))
    grouped = weights.reshape(rows, blocks, block)
    lowest = 1 << (bits - 1)
    largest = grouped.max(axis=2)
    smallest = grouped.min(axis=2)
    scales = np.where(largest > -smallest, largest, smallest) / np.float32(-lowest)
    scales[np.abs(scales) < _SMALLEST] = 0
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales).astype(np.float32)
    levels = np.rint(grouped * inverse[:, :, None])
    np.clip(levels, -lowest, lowest - 1, out=levels)
    levels += lowest
    unsigned = levels.astype(np.uint8)
    return PackedWeight(
        pack_bits(unsigned, bits) if bits == 4 else unsigned, scales.astype(np.float32), rows, columns, bits, block
    )


def adopt_q8(values: Array, scales: Array) -> PackedWeight:
    """Take over 8-bit values and their scales (one per 32 columns) without rounding anything again."""
    rows, columns = values.shape
    unsigned = (values.view(np.uint8) ^ np.uint8(128)).reshape(rows, columns // 32, 32)  # adds 128
    return PackedWeight(unsigned, scales, rows, columns, 8, 32)


def unpack(packed: PackedWeight) -> Array:
    """The float32 matrix that the packed weight stands for."""
    data, zero = packed.data, packed.zero_points
    if packed.bits != 8:
        data = unpack_bits(data, packed.bits, packed.block, signed=False)
        if zero is not None:
            zero = unpack_bits(zero, packed.bits, data.shape[1], signed=False)
    middle: Any = 1 << (packed.bits - 1) if zero is None else zero.astype(np.float32)[:, :, None]
    values: Array = (data.astype(np.float32) - middle) * packed.scales[:, :, None]
    return values.reshape(packed.rows, -1)[:, : packed.columns]
