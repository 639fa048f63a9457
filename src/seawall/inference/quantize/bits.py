"""Four 2-bit or two 4-bit codes in a byte, the first one in the lowest bits: as ONNX and MatMulNBits store them."""

from __future__ import annotations

from typing import Any

import numpy as np

from seawall.inference.errors import InvalidArrayError, InvalidSettingError

Array = np.ndarray[Any, Any]


def pack_bits(codes: Array, bits: int) -> Array:
    """Pack int8 or uint8 codes along the last axis, whose rows are filled up to whole bytes with zeros.

    ONNX packs a whole tensor as one row: give it `codes.ravel()`.
    """
    per_byte = _codes_per_byte(bits)
    codes = np.asarray(codes)
    if codes.ndim == 0 or codes.dtype not in (np.int8, np.uint8):
        raise InvalidArrayError(f"expected int8 or uint8 codes with an axis, got {codes.dtype}, shape {codes.shape}")
    lowest, highest = (-(1 << bits - 1), (1 << bits - 1) - 1) if codes.dtype == np.int8 else (0, (1 << bits) - 1)
    if codes.size and not (lowest <= codes.min() and codes.max() <= highest):
        raise InvalidArrayError(
            f"{codes.dtype} codes of {bits} bits are in {lowest}..{highest}, got {codes.min()}..{codes.max()}"
        )
    if short := -codes.shape[-1] % per_byte:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    unsigned = codes.view(np.uint8)
    packed = unsigned[..., 0::per_byte] & np.uint8((1 << bits) - 1)
    for place in range(1, per_byte):
        packed |= (unsigned[..., place::per_byte] & np.uint8((1 << bits) - 1)) << np.uint8(place * bits)
    return packed


def unpack_bits(packed: Array, bits: int, count: int, *, signed: bool = True) -> Array:
    """The first `count` codes of each row of the last axis, as int8, or as uint8 when not `signed`."""
    per_byte = _codes_per_byte(bits)
    packed = np.asarray(packed)
    if packed.ndim == 0 or packed.dtype != np.uint8:
        raise InvalidArrayError(f"expected uint8 bytes with an axis, got {packed.dtype}, shape {packed.shape}")
    held = packed.shape[-1] * per_byte
    if not 0 <= count <= held:
        raise InvalidSettingError(f"count must be in 0..{held}, the codes that a row holds, got {count!r}")
    codes = np.empty((*packed.shape, per_byte), np.uint8)
    for place in range(per_byte):
        codes[..., place] = (packed >> np.uint8(place * bits)) & np.uint8((1 << bits) - 1)
    codes = codes.reshape(*packed.shape[:-1], held)[..., :count]
    if not signed:
        return codes
    sign = np.int8(1 << bits - 1)
    return (codes.view(np.int8) ^ sign) - sign


def _codes_per_byte(bits: int) -> int:
    if bits not in (2, 4):
        raise InvalidSettingError(f"bits must be 2 or 4, got {bits!r}")
    return 8 // bits
