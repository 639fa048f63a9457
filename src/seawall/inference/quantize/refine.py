"""Better scales for the same codes' worth of bits: trades the bound on each value for a smaller mean error."""

from __future__ import annotations

from typing import Any

import numpy as np

from seawall.inference.errors import InvalidArrayError, InvalidSettingError

from .arrays import Quantized, encode
from .layout import Array, Layout, floats, not_finite
from .scheme import FLOATS

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # below 0.7 nothing was gained on normal weights at 2 to 8 bits


def refine(array: Any, quantized: Quantized, *, rounds: int = 3) -> Quantized:
    """Search better scales and zero points for `array`, which `quantized` came from; needs no calibration data.

    Starts from the scales given and from smaller ones, which clip outliers and serve the rest better, each with the
    zero points given and their neighbours. Then it alternates: codes for the scale, the least-squares scale for the
    codes. HQQ moves a fractional zero point instead; whole ones keep the fast kernels. Each group keeps the best it
    saw, so its mean squared error never grows. Values that are clipped lose the bound of `quantize`.
    """
    scheme = quantized.scheme
    array, _ = floats(array)
    if scheme.dtype in FLOATS:
        raise InvalidSettingError(f"refine searches scales of integer codes, got {scheme}")
    if array.shape != quantized.data.shape:
        raise InvalidArrayError(f"the array must have the codes' shape {quantized.data.shape}, got {array.shape}")
    if rounds < 1:
        raise InvalidSettingError(f"rounds must be at least 1, got {rounds!r}")
    if not np.isfinite(array).all():
        raise not_finite(array)
    if array.size == 0:
        return quantized
    layout = Layout.of(array.shape, scheme)
    search = _Search(layout.group(array), quantized, layout)
    for shrink in _SHRINK:
        for shift in (0,) if scheme.symmetric else (0, -1, 1):
            search.descend(shrink, shift, rounds)
    return Quantized(
        layout.ungroup(search.codes, array.shape),
        search.scale.reshape(quantized.scale.shape),
        None if search.zero_point is None else search.zero_point.reshape(quantized.scale.shape),
        scheme,
    )


class _Search:
    """The best scale, zero point and codes of each group so far; values are in units of the scales given."""

    def __init__(self, grouped: Array, quantized: Quantized, layout: Layout) -> None:
        self.layout = layout
        self.scheme = quantized.scheme
        self.start = quantized.scale.reshape(-1)
        self.values = np.divide(grouped, layout.per_group(self.start), dtype=self.start.dtype)
        self.scale = self.start.copy()
        self.start_zero = None if quantized.zero_point is None else quantized.zero_point.reshape(-1)
        self.zero_point = None if self.start_zero is None else self.start_zero.copy()
        self.codes = layout.group(quantized.data).copy()
        self.error = self._error(self._levels(self.codes, self.zero_point), np.ones_like(self.start))

    def descend(self, shrink: float, shift: int, rounds: int) -> None:
        """From a start, codes for the scale and the least-squares scale for the codes in turn; keeps what is better."""
        scale = np.full_like(self.start, shrink)
        zero_point = self.start_zero
        if zero_point is not None:
            highest = self.scheme.highest
            zero_point = np.clip(zero_point.astype(np.int16) + shift, -highest - 1, highest).astype(np.int8)
        for _ in range(rounds):
            codes = encode(self.values, scale, zero_point, self.layout, self.scheme)
            levels = self._levels(codes, zero_point)
            power = np.square(levels).sum(axis=(0, 2))
            fitted = (levels * self.values).sum(axis=(0, 2)) / np.maximum(power, 1)
            scale = np.where(fitted > 0.01, fitted, scale).astype(scale.dtype)
            self._keep(codes, scale, zero_point, self._error(levels, scale))

    def _keep(self, codes: Array, scale: Array, zero_point: Array | None, error: Array) -> None:
        with np.errstate(over="ignore", under="ignore"):
            scale = self.start * scale
        better = (error < self.error) & np.isfinite(scale) & (scale >= np.finfo(scale.dtype).tiny)
        self.error[better] = error[better]
        self.scale[better] = scale[better]
        self.codes[:, better] = codes[:, better]
        if self.zero_point is not None and zero_point is not None:
            self.zero_point[better] = zero_point[better]

    def _levels(self, codes: Array, zero_point: Array | None) -> Array:
        levels: Array = codes.astype(self.start.dtype)
        return levels if zero_point is None else levels - self.layout.per_group(zero_point)

    def _error(self, levels: Array, scale: Array) -> Array:
        total: Array = np.square(levels * self.layout.per_group(scale) - self.values).sum(axis=(0, 2))
        return total
