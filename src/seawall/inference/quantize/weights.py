"""A weight matrix in the form of MatMulNBits, by whichever method rounds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from seawall.inference.errors import InvalidArrayError, InvalidSettingError
from seawall.inference.models.packing import PackedWeight

from .bits import pack_bits
from .gptq import compensated
from .layout import floats, not_finite
from .rounding import Blocks, half_quadratic, nearest, search

Array = np.ndarray[Any, Any]

ROUNDINGS = ("rtn", "mse", "hqq", "kquant", "gptq")
_TILE = 1 << 17  # values: what a search holds of them stays in the processor's cache


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """What a weight's inputs look like on calibration data.

    Attributes:
        rows: how many inputs were seen.
        low: float32 [inputs], the smallest value of each channel.
        high: float32 [inputs], the largest.
        mean_absolute: float32 [inputs].
        mean_square: float32 [inputs].
        hessian: float32 [inputs, inputs], the mean of x x^T, or None where nobody asked for it.
    """

    rows: int
    low: Array
    high: Array
    mean_absolute: Array
    mean_square: Array
    hessian: Array | None = None

    @classmethod
    def of(cls, inputs: Array, *, hessian: bool = True) -> InputStatistics:
        """The statistics of an array of inputs, [..., channels]."""
        rows = np.asarray(inputs, np.float32).reshape(-1, np.shape(inputs)[-1])
        size = np.abs(rows)
        return cls(
            rows=len(rows),
            low=rows.min(axis=0),
            high=rows.max(axis=0),
            mean_absolute=size.mean(axis=0),
            mean_square=np.square(rows).mean(axis=0),
            hessian=rows.T @ rows / np.float32(len(rows)) if hessian else None,
        )

    def divided(self, scale: Array) -> InputStatistics:
        """The statistics of inputs that are divided by positive `scale`, channel by channel."""
        return InputStatistics(
            self.rows,
            self.low / scale,
            self.high / scale,
            self.mean_absolute / scale,
            self.mean_square / np.square(scale),
            None if self.hessian is None else self.hessian / np.outer(scale, scale),
        )


def round_weight(
    weights: Any,
    *,
    bits: int = 4,
    block: int = 32,
    rounding: str = "rtn",
    asymmetric: bool = False,
    statistics: InputStatistics | None = None,
) -> PackedWeight:
    """Round a [outputs, inputs] matrix to blocks of `block` inputs that share a scale, as MatMulNBits stores them.

    - "rtn": to nearest over each block's range; `|w - w'| <= |scale| / 2`, but for the end of the range that a
      symmetric block lacks, where it is `|scale|`.
    - "mse": the range of least squared error.
    - "hqq": the least sum of |error|^0.7, half-quadratic.
    - "kquant": the range of least squared error weighted by importance: by the mean square of each input where
      there are `statistics`, else by the weights' own size.
    - "gptq": each column's error is made up for by the columns after it; needs the Hessian of `statistics`.

    None of them is worse than "rtn" in what it minimises. Inputs are padded with zeros to whole blocks.

    ```python
    import numpy as np
    from seawall.inference.models.packing import unpack
    from seawall.inference.quantize import errors, round_weight

    weights = np.random.default_rng(0).normal(0, 1, (64, 128)).astype(np.float32)
    for rounding in ("rtn", "mse"):
        packed = round_weight(weights, bits=4, rounding=rounding, asymmetric=True)
        print(rounding, round(errors(weights, unpack(packed)).sqnr_db, 1))
    #> rtn 21.9
    #> mse 22.4
    ```

    Raises:
        InvalidArrayError: not a matrix of floats, or statistics of other inputs.
        NotFiniteError: NaN or infinity among the weights.
        InvalidSettingError: bits other than 2, 4 and 8, a block that is no power of two from 16 on, an unknown
            rounding, or "gptq" without a Hessian.
    """
    _check(bits, block, rounding, statistics)
    array, _ = floats(weights)
    if array.ndim != 2 or not array.size:
        raise InvalidArrayError(f"expected a matrix [outputs, inputs] with values, got shape {array.shape}")
    matrix = array.astype(np.float32)
    if not np.isfinite(matrix).all():
        raise not_finite(array)
    rows, columns = matrix.shape
    if statistics is not None and statistics.mean_square.shape != (columns,):
        raise InvalidArrayError(
            f"the statistics are of {statistics.mean_square.size} inputs, the matrix takes {columns}"
        )
    if short := -columns % block:
        matrix = np.pad(matrix, ((0, 0), (0, short)))
    if rounding == "gptq":
        assert statistics is not None
        assert statistics.hessian is not None
        hessian = np.pad(statistics.hessian, (0, short)) if short else statistics.hessian
        found = compensated(matrix, hessian, bits=bits, block=block, asymmetric=asymmetric, rows=statistics.rows)
    else:
        importance = None if statistics is None else np.pad(statistics.mean_square, (0, short))
        found = _tiled(matrix, bits, block, rounding, importance, asymmetric=asymmetric)
    return _packed(found, rows, columns, bits, block, asymmetric=asymmetric)


def _check(bits: int, block: int, rounding: str, statistics: InputStatistics | None) -> None:
    if bits not in (2, 4, 8):
        raise InvalidSettingError(f"bits must be 2, 4 or 8, got {bits!r}")
    if type(block) is not int or block < 16 or block & (block - 1):
        raise InvalidSettingError(f"block must be a power of two of at least 16, as MatMulNBits has it, got {block!r}")
    if rounding not in ROUNDINGS:
        raise InvalidSettingError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if rounding == "gptq" and (statistics is None or statistics.hessian is None):
        raise InvalidSettingError("rounding 'gptq' needs statistics with a Hessian: InputStatistics.of(inputs)")


def _tiled(
    matrix: Array, bits: int, block: int, rounding: str, importance: Array | None, *, asymmetric: bool
) -> list[Blocks]:
    """The blocks, [block, rows] for each place in a row; a tile of rows at a time."""
    rows, columns = matrix.shape
    blocks = columns // block
    codes = np.empty((blocks, block, rows), np.float32)
    scale, zero = np.empty((blocks, rows), np.float32), np.empty((blocks, rows), np.float32)
    step = max(1, _TILE // columns)
    for start in range(0, rows, step):
        part = matrix[start : start + step]
        count = len(part)
        values = np.ascontiguousarray(part.reshape(count, blocks, block).transpose(2, 1, 0)).reshape(block, -1)
        weight = _importance(part, importance, blocks, block) if rounding == "kquant" else None
        if rounding == "rtn":
            found = nearest(values, bits, asymmetric=asymmetric)
        elif rounding == "hqq":
            found = half_quadratic(values, bits, asymmetric=asymmetric)
        else:
            found = search(values, bits, asymmetric=asymmetric, weight=weight)
        here = slice(start, start + count)
        codes[:, :, here] = found.codes.reshape(block, blocks, count).swapaxes(0, 1)
        scale[:, here] = found.scale.reshape(blocks, count)
        zero[:, here] = found.zero.reshape(blocks, count)
    return [Blocks(codes[i], scale[i], zero[i]) for i in range(blocks)]


def _importance(part: Array, mean_square: Array | None, blocks: int, block: int) -> Array:
    """How much an error matters, [block, blocks * rows]; llama.cpp's weights, with and without an importance matrix."""
    count = len(part)
    grouped = part.reshape(count, blocks, block)
    if mean_square is None:
        weight = np.abs(grouped) + np.sqrt(np.square(grouped).mean(axis=2, keepdims=True))
    else:
        spread = 2 * np.square(part).mean(axis=1)[:, None, None]
        weight = mean_square.reshape(blocks, block) * np.sqrt(spread + np.square(grouped))
    return np.ascontiguousarray(weight.transpose(2, 1, 0)).reshape(block, -1)


def _packed(found: list[Blocks], rows: int, columns: int, bits: int, block: int, *, asymmetric: bool) -> PackedWeight:
    data = np.stack([one.codes.T.astype(np.uint8) for one in found], axis=1)  # [rows, blocks, block]
    scales = np.stack([one.scale for one in found], axis=1)
    zero = np.stack([one.zero.astype(np.uint8) for one in found], axis=1) if asymmetric else None
    if bits != 8:
        data = pack_bits(data, bits)
        zero = None if zero is None else pack_bits(zero, bits)
    return PackedWeight(data, scales, rows, columns, bits, block, zero)
