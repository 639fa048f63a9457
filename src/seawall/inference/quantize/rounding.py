"""Ways to choose the scale, zero point and codes of a block of weights, each better than the last at its own aim.

All work on [block, groups] columns: every column is one block, and sums over a block are sums over the first axis,
which numpy does fastest. A value comes back as `(code - zero) * scale`, with whole zero points: fractional ones cost
ONNX Runtime its fast kernel (measured, 80 times slower).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

_SMALLEST = np.float32(1e-30)  # a scale below this has no finite inverse in float32, and nothing to say
_SHRINK = tuple(np.linspace(1.1, 0.6, 11, dtype=np.float32))  # outliers clipped, the rest served better
_ROUNDS = 2
_NORM = 0.7  # the p of HQQ's objective; 0.5 to 0.9 differ little
_HQQ_ROUNDS = 20


class Blocks(NamedTuple):
    """Rounded blocks.

    Attributes:
        codes: float32 [block, groups], whole numbers of 0 to 2^bits - 1.
        scale: float32 [groups], which may be negative: the longer half of the codes then serves the other sign.
        zero: float32 [groups], whole numbers of 0 to 2^bits - 1.
    """

    codes: Array
    scale: Array
    zero: Array

    @property
    def values(self) -> Array:
        """What the codes stand for."""
        values: Array = (self.codes - self.zero) * self.scale
        return values


def snap(values: Array, scale: Array, zero: Array, bits: int) -> Blocks:
    """The nearest code of each value."""
    with np.errstate(divide="ignore"):
        inverse = np.where(np.abs(scale) < _SMALLEST, np.float32(0), np.float32(1) / scale)
    codes = values * inverse
    np.rint(codes, out=codes)
    codes += zero
    np.clip(codes, 0, (1 << bits) - 1, out=codes)
    return Blocks(codes, scale, zero)


def nearest(values: Array, bits: int, *, asymmetric: bool) -> Blocks:
    """Round to nearest (RTN) over each block's own range.

    Symmetric: the value of largest magnitude gets code 0, with its sign in the scale, which uses the whole range.
    """
    return snap(values, *_range(values, bits, asymmetric=asymmetric), bits)


def _range(values: Array, bits: int, *, asymmetric: bool) -> tuple[Array, Array]:
    low, high = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    if not asymmetric:
        middle = np.float32(1 << (bits - 1))
        scale = np.where(high > -low, high, low) / -middle
        scale[np.abs(scale) < _SMALLEST] = 0
        return scale, np.full_like(scale, middle)
    highest = np.float32((1 << bits) - 1)
    scale = high / highest - low / highest
    scale[scale < _SMALLEST] = 0
    return scale, _whole(_divided(-low, scale), highest)


def search(values: Array, bits: int, *, asymmetric: bool, weight: Array | None = None) -> Blocks:
    """The least (weighted) squared error among many ranges, each followed by the least-squares scale for its codes.

    Starts from `nearest` and keeps the best of each block, so it is never worse. With weights this is the search that
    llama.cpp makes for its K-quants.
    """
    best = _Best(values, nearest(values, bits, asymmetric=asymmetric), lambda lost: _weighted(np.square(lost), weight))
    for start, zero in _starts(values, bits, asymmetric=asymmetric):
        scale = start
        for _ in range(_ROUNDS):
            codes = snap(values, scale, zero, bits).codes
            scale = _least_squares(values, codes - zero, scale, weight)
            best.offer(Blocks(codes, scale, zero))
    return best.best


def half_quadratic(values: Array, bits: int, *, asymmetric: bool) -> Blocks:
    """HQQ: the least sum of |error|^0.7, which forgives outliers; needs no calibration data.

    Alternates, as Badri and Shaji do, between shrinking the errors, which says which of them to forgive, and the
    grid that fits the others best; the zero point is rounded to a whole number at each turn. Starts from `nearest`
    and from the least squared error and keeps the best of each block, so it is never worse than either.
    """
    least = search(values, bits, asymmetric=asymmetric)
    best = _Best(values, nearest(values, bits, asymmetric=asymmetric), lambda lost: _power(lost).sum(axis=0))
    best.offer(least)
    beta, scale, zero = np.float32(10), least.scale, least.zero
    # The strength of the shrinkage is relative to the weights' size, so that scaling a matrix changes nothing.
    size = np.maximum(np.abs(values).mean(axis=0), _SMALLEST)
    for _ in range(_HQQ_ROUNDS):
        now = snap(values, scale, zero, bits)
        lost = (values - now.values) / size
        kept = values - _shrunk(lost, beta) * size
        if asymmetric:
            fractional = (now.codes - _divided(kept, scale)).mean(axis=0)
            zero = _whole(fractional, (1 << bits) - 1)
        scale = _least_squares(kept, now.codes - zero, scale, None)
        best.offer(snap(values, scale, zero, bits))
        beta *= np.float32(1.05)
    return best.best


class _Best:
    """The blocks of least loss so far, block by block."""

    def __init__(self, values: Array, start: Blocks, loss: Any) -> None:
        self._values = values
        self._loss = loss
        self.best = Blocks(start.codes.copy(), start.scale.copy(), start.zero.copy())
        self.loss: Array = loss(values - start.values)

    def offer(self, found: Blocks) -> None:
        loss = self._loss(self._values - found.values)
        better = loss < self.loss
        self.loss[better] = loss[better]
        self.best.codes[:, better] = found.codes[:, better]
        self.best.scale[better] = found.scale[better]
        self.best.zero[better] = found.zero[better]


def _starts(values: Array, bits: int, *, asymmetric: bool) -> Any:
    """Scales and zero points to begin a search with."""
    scale, zero = _range(values, bits, asymmetric=asymmetric)
    if not asymmetric:
        # The other way round the extreme gets the largest code, which is one less.
        other = -scale * np.float32((1 << (bits - 1)) / max((1 << (bits - 1)) - 1, 1))
        for shrink in _SHRINK:
            yield scale * shrink, zero
            yield other * shrink, zero
        return
    low, high = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    highest = np.float32((1 << bits) - 1)
    for shrink in _SHRINK:
        middle = highest / 2 - _divided(low / 2 + high / 2, scale * shrink)
        for shift in (0, -1, 1):
            yield scale * shrink, _whole(middle + np.float32(shift), highest)


def _least_squares(values: Array, levels: Array, scale: Array, weight: Array | None) -> Array:
    """The scale that serves the levels best; the old one where they are all zero."""
    power = _weighted(np.square(levels), weight)
    fitted = _divided(_weighted(levels * values, weight), power)
    usable = (power > 0) & (np.abs(fitted) >= _SMALLEST)
    return np.where(usable, fitted, scale).astype(np.float32)


def _weighted(terms: Array, weight: Array | None) -> Array:
    total: Array = terms.sum(axis=0) if weight is None else (terms * weight).sum(axis=0)
    return total


def _divided(values: Array, scale: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient: Array = np.where(np.abs(scale) < _SMALLEST, np.float32(0), values / scale)
    return quotient.astype(np.float32)


def _whole(zero: Array, highest: Any) -> Array:
    whole: Array = np.clip(np.rint(zero), 0, highest).astype(np.float32)
    return whole


def _power(lost: Array) -> Array:
    power: Array = np.abs(lost) ** np.float32(_NORM)
    return power


def _shrunk(lost: Array, beta: np.float32) -> Array:
    """The proximal step of the p-norm: small errors become nothing, large ones stay nearly what they are."""
    size = np.abs(lost)
    with np.errstate(divide="ignore"):
        shrunk = np.maximum(size - np.float32(_NORM) / beta * size ** np.float32(_NORM - 1), 0)
    result: Array = np.sign(lost) * shrunk
    return result
