"""Quantize an array, and get it back to within half a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from seawall.inference.errors import InvalidArrayError

from .float8 import decode_e4m3, decode_e5m2, encode_e4m3, encode_e5m2
from .layout import Array, Layout, extremes, floats, not_finite
from .scheme import FLOATS, Scheme

_ENCODE = {"float8_e4m3fn": encode_e4m3, "float8_e5m2": encode_e5m2}
_DECODE = {"float8_e4m3fn": decode_e4m3, "float8_e5m2": decode_e5m2}


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """An array in codes.

    Attributes:
        data: one code per byte in the array's own shape: int8 for integers, uint8 for the bits of 8-bit floats.
            `pack_bits` makes the bytes that are stored.
        scale: the size of one step, [] per tensor, [channels] per channel, [..., blocks] per block.
        zero_point: int8, the code that stands for zero, in the shape of `scale`; None where it is 0 throughout.
        scheme: how it was made.
    """

    data: Array
    scale: Array
    zero_point: Array | None
    scheme: Scheme

    def __post_init__(self) -> None:
        codes = np.uint8 if self.scheme.dtype in FLOATS else np.int8
        if self.data.dtype != codes:
            raise InvalidArrayError(f"codes of {self.scheme.dtype} are {codes.__name__}, got {self.data.dtype}")
        if (self.zero_point is None) != self.scheme.symmetric:
            raise InvalidArrayError(f"zero points go with asymmetric schemes, and this one is {self.scheme}")
        wanted = self.scheme.scale_shape(self.data.shape)
        for name, found in (("scale", self.scale), ("zero_point", self.zero_point)):
            if found is not None and found.shape != wanted:
                raise InvalidArrayError(f"{name} must have the shape {wanted} ({self.scheme}), got {found.shape}")

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, the scales as they are, and the packed zero points."""
        codes = self.data.size + (0 if self.zero_point is None else self.zero_point.size)
        return -(-codes * self.scheme.bits // 8) + self.scale.nbytes


def quantize(
    array: Any,
    *,
    dtype: str = "int8",
    symmetric: bool = True,
    axis: int | None = None,
    block_size: int | None = None,
) -> Quantized:
    """Round an array of floats to codes of `dtype` that share scales per tensor, channel (`axis`) or block.

    With integer codes every value comes back to within half a step, `|w - w'| <= scale / 2`, besides the rounding
    of the arithmetic itself, at most 8 epsilons of the group's largest magnitude. With 8-bit floats it comes back to
    within `|w| / 16` (E4M3) or `|w| / 8` (E5M2), or, near zero, within `scale / 2**10` or `scale / 2**17`.

    - A range always includes zero, which comes back exactly. Whole multiples of the scale do too: so integers up to
      127 stay what they are in symmetric int8 if 127 or -127 is among them.
    - Larger values never get smaller codes, and quantizing what `dequantize` returns gives the same codes again.
    - Rounding is that of ONNX QuantizeLinear: the quotient to the nearest code, ties to even.
    - All zeros, and an empty array, have scale 1. No scale is below the smallest normal number, so tiny values keep
      the bound; the largest ones come back finite.
    - Calculates in float32, or in float64 for float64 arrays, and scales have that type. The input is not changed.

    Raises:
        NotFiniteError: a NaN or an infinity, which no scale fits.
        InvalidArrayError: not float16, bfloat16, float32 or float64.
        InvalidSettingError: an unknown dtype, an axis that the array lacks, a block size below 1.
    """
    scheme = Scheme(dtype=dtype, symmetric=symmetric, axis=axis, block_size=block_size)
    array, work = floats(array)
    layout = Layout.of(array.shape, scheme)
    grouped = layout.group(array)
    low, high = extremes(grouped, layout, work)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise not_finite(array)
    scale, zero_point = _range(low, high, scheme)
    codes = encode(grouped, scale, zero_point, layout, scheme)
    shape = scheme.scale_shape(array.shape)
    return Quantized(
        layout.ungroup(codes, array.shape),
        scale.reshape(shape),
        None if zero_point is None else zero_point.reshape(shape),
        scheme,
    )


def dequantize(quantized: Quantized) -> Array:
    """The values that the codes stand for, `(data - zero_point) * scale`, in the type of the scales.

    Values past the largest finite number, which rounding up can make of it, become that number.
    """
    scheme = quantized.scheme
    layout = Layout.of(quantized.data.shape, scheme)
    codes = layout.group(quantized.data)
    scale = layout.per_group(quantized.scale)
    zero = None if quantized.zero_point is None else layout.per_group(quantized.zero_point).astype(scale.dtype)
    values = np.empty(codes.shape, scale.dtype)
    decode = _DECODE.get(scheme.dtype)
    with np.errstate(over="ignore"):
        for tile in layout.tiles():
            part = values[tile]
            part[...] = codes[tile] if decode is None else decode(codes[tile])
            if zero is not None:
                part -= zero[:, tile[1]]
            part *= scale[:, tile[1]]
    largest = np.finfo(scale.dtype).max
    if scale.size and np.abs(scale).max() > largest / (2 * scheme.highest + 2):
        np.clip(values, -largest, largest, out=values)
    return layout.ungroup(values, quantized.data.shape)


def encode(grouped: Array, scale: Array, zero_point: Array | None, layout: Layout, scheme: Scheme) -> Array:
    """Codes of [outer, groups, inner] values for given scales and zero points, saturated."""
    scale = layout.per_group(scale)
    zero = None if zero_point is None else layout.per_group(zero_point)
    to_float8 = _ENCODE.get(scheme.dtype)
    codes = np.empty(grouped.shape, np.int8 if to_float8 is None else np.uint8)
    for tile in layout.tiles():
        levels = np.divide(grouped[tile], scale[:, tile[1]], dtype=scale.dtype)
        if to_float8 is not None:
            codes[tile] = to_float8(levels)
            continue
        np.rint(levels, out=levels)
        if zero is not None:
            levels += zero[:, tile[1]]
        lowest = -scheme.highest if scheme.symmetric else -scheme.highest - 1
        np.clip(levels, lowest, scheme.highest, out=levels)
        codes[tile] = levels
    return codes


def _range(low: Array, high: Array, scheme: Scheme) -> tuple[Array, Array | None]:
    """Scales and zero points for groups whose values lie between `low <= 0` and `high >= 0`."""
    limits = np.finfo(low.dtype)
    if scheme.symmetric:
        scale = np.maximum(high, -low) / low.dtype.type(scheme.highest)
    else:
        steps = 2 * scheme.highest + 1
        scale = (high / 2 - low / 2) / low.dtype.type(steps / 2)  # high - low may be infinite
        safe = np.maximum(scale, limits.tiny)
        # Both ends half-way between codes and rounded inwards would leave a code unused, and a second
        # quantization would then find a smaller scale. A slightly smaller one now rounds both outwards.
        short = np.rint(high / safe) - np.rint(low / safe) < steps
        scale = np.where(short, scale * (1 - 4 * limits.eps), scale)
    scale = np.where((low == 0) & (high == 0), 1, np.maximum(scale, limits.tiny)).astype(low.dtype)
    if scheme.symmetric:
        return scale, None
    lowest = -scheme.highest - 1
    return scale, np.clip(np.rint(lowest - low / scale), lowest, scheme.highest).astype(np.int8)
