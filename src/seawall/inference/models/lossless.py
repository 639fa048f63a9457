"""Four-bit blocks of a GGUF file, taken over into MatMulNBits without rounding them again. Pure numpy.

A block is 32 weights w = scale * q + minimum, with q in 0..15. MatMulNBits computes scale * (q - zero) with a whole
`zero`, and that is all its fast kernel can do: fractional zero points leave that kernel. What is left of a block is
one number, minimum + scale * zero, times the sum of its 32 inputs. So the means of the inputs' blocks join the
inputs as further columns, and those numbers become further weights of the same matrix: one product computes both.

The new columns have 4 bits as well, hence two rounds: the second holds what the first rounds off. They need
scales of their own, so the means are repeated until a second copy lies in another block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from seawall.inference.quantize.bits import pack_bits

from .packing import PackedWeight, pack, unpack

Array = np.ndarray[Any, Any]
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix in blocks of 32 columns, w = scales * codes + minima.

    Attributes:
        codes: uint8 [rows, blocks, 32], from 0 to 15.
        scales: float32 [rows, blocks].
        minima: float32 [rows, blocks].
    """

    codes: Array
    scales: Array
    minima: Array

    @property
    def values(self) -> Array:
        """The float32 matrix [rows, columns]."""
        values: Array = self.codes * self.scales[:, :, None] + self.minima[:, :, None]
        return values.reshape(len(values), -1)

    def rows(self, order: Array | slice) -> Blocks:
        """The same rows in another order."""
        return Blocks(self.codes[order], self.scales[order], self.minima[order])


def stacked(parts: list[Blocks]) -> Blocks:
    """One matrix below the other."""
    return Blocks(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.minima for part in parts]),
    )


def copies(blocks: int) -> int:
    """How often the means of `blocks` blocks are appended to the inputs.

    ```python
    from seawall.inference.models.lossless import copies

    print(copies(18), copies(48))  # inputs of 576 and of 1,536 channels
    #> 3 2
    ```
    """
    return 1 + -(-BLOCK // blocks)


def adopt_q4(matrix: Blocks) -> PackedWeight:
    """The packed weight whose inputs are [x, means, means, ...]: x and `copies` times the mean of each block of x.

    Every code of the matrix is kept as it is. A remainder is half a scale at most, and two rounds keep all but a 64th
    of it; where `blocks` is above 32 and no multiple of it, some have one round, which keeps all but an eighth.
    """
    rows, blocks = matrix.scales.shape
    zero = _zero_points(matrix)
    remainders = BLOCK * (matrix.minima + matrix.scales * zero)  # of means, hence times 32
    columns = np.arange(blocks * copies(blocks)) % blocks
    further = [_round(remainders, columns[start : start + BLOCK]) for start in range(0, len(columns), BLOCK)]
    data = np.concatenate((pack_bits(matrix.codes, 4), *(packed.data for packed in further)), axis=1)
    scales = np.concatenate((matrix.scales, *(packed.scales for packed in further)), axis=1)
    middle = np.full((rows, len(further)), 8, np.uint8)
    zero_points = pack_bits(np.concatenate((zero, middle), axis=1), 4)
    return PackedWeight(data, scales, rows, blocks * BLOCK + len(columns), 4, BLOCK, zero_points)


def _zero_points(matrix: Blocks) -> Array:
    """The whole number from 0 to 15 next to -minimum / scale, which leaves the least over; uint8 [rows, blocks]."""
    ratio = np.divide(-matrix.minima, matrix.scales, out=np.full_like(matrix.minima, 8), where=matrix.scales != 0)
    zero: Array = np.clip(np.rint(ratio), 0, 15).astype(np.uint8)
    return zero


def _round(remainders: Array, columns: Array) -> PackedWeight:
    """One more block of weights, and what it holds taken off `remainders`; a mean that occurs twice counts once."""
    first = np.unique(columns, return_index=True)[1]
    part = np.zeros((len(remainders), BLOCK), np.float32)
    part[:, first] = remainders[:, columns[first]]
    packed = pack(part, bits=4, block=BLOCK)
    remainders[:, columns[first]] -= unpack(packed)[:, first]
    return packed


def adopted_values(packed: PackedWeight, columns: int) -> Array:
    """The float32 matrix [rows, columns] that an adopted weight stands for."""
    whole = unpack(packed)
    remainders = whole[:, columns:].reshape(packed.rows, -1, columns // BLOCK).sum(axis=1) / BLOCK
    values: Array = whole[:, :columns] + np.repeat(remainders, BLOCK, axis=1)
    return values
