"""The two 8-bit floats of ONNX, E4M3 (FN) and E5M2, bit for bit.

A table of 65,536 bytes, made once with ml_dtypes, holds the code of every bfloat16. A wider value finds its own by
rounding to bfloat16 *to odd*: cut off, and the last bit set if anything was lost. That keeps which side of
each tie it was on, so the second rounding, to 8 bits, is as good as a single one: ten times as fast as asking
ml_dtypes for each value. Infinity and values past the range saturate by default, as in ONNX with saturate=1.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from seawall.inference.errors import InvalidArrayError, MissingExtraError

from .layout import floats

try:
    import ml_dtypes
except ImportError as error:
    raise MissingExtraError("ml_dtypes") from error

Array = np.ndarray[Any, Any]
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E5M2 = np.dtype(ml_dtypes.float8_e5m2)
_CHUNK = 1 << 15  # values; see layout.py


def encode_e4m3(array: Any, *, saturate: bool = True) -> Array:
    """The uint8 codes of E4M3: 4 exponent and 3 mantissa bits, up to 448, NaN but no infinity.

    Rounds once, ties to even. Past the range `saturate` gives the largest finite value, infinity included; without
    it both are NaN, from 464 on exclusively, which is where 448 stops being the nearest. NaN is NaN either way.
    """
    return _encode(array, _table(_E4M3, 448.0 if saturate else None))


def encode_e5m2(array: Any, *, saturate: bool = True) -> Array:
    """The uint8 codes of E5M2: 5 exponent and 2 mantissa bits, up to 57,344, NaN and infinities.

    Rounds once, ties to even. Past the range `saturate` gives the largest finite value, infinity included; without
    it values from 61,440 on are infinite. NaN is NaN either way.
    """
    return _encode(array, _table(_E5M2, 57344.0 if saturate else None))


def decode_e4m3(codes: Array) -> Array:
    """The float32 values of uint8 codes of E4M3."""
    return _decode(codes, _E4M3)


def decode_e5m2(codes: Array) -> Array:
    """The float32 values of uint8 codes of E5M2."""
    return _decode(codes, _E5M2)


@functools.cache
def _table(dtype: np.dtype[Any], largest: float | None) -> Array:
    """The code of each bfloat16, by its bits."""
    values = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    if largest is not None:
        values = np.clip(values, -largest, largest)
    with np.errstate(invalid="ignore", over="ignore"):
        return values.astype(dtype).view(np.uint8)


@functools.cache
def _values(dtype: np.dtype[Any]) -> Array:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _encode(array: Any, table: Array) -> Array:
    array, _ = floats(array)
    codes = np.empty(array.shape, np.uint8)
    flat, into = array.reshape(-1), codes.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        bits = _float32_bits(flat[start : start + _CHUNK])
        index = (bits >> np.uint32(16)) | ((bits & np.uint32(0xFFFF)) != 0)
        np.take(table, index.astype(np.intp), out=into[start : start + _CHUNK], mode="wrap")  # wrap: no buffering
    return codes


def _float32_bits(values: Array) -> Array:
    """Bits of the values as float32; float64 is rounded to odd as well, so that nothing is rounded twice."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        narrow = values.astype(np.float32)
    bits = narrow.view(np.uint32)
    if values.dtype.name == "float64":
        lost = narrow != values
        bits -= lost & (np.abs(narrow) > np.abs(values))  # back towards zero: one step in the bits, too
        bits |= lost
    return bits


def _decode(codes: Array, dtype: np.dtype[Any]) -> Array:
    codes = np.asarray(codes)
    if codes.dtype != np.uint8:
        raise InvalidArrayError(
            f"expected uint8 codes, got {codes.dtype}: use `.view(np.uint8)` on an array of {dtype}"
        )
    values: Array = _values(dtype)[codes]
    return values
