"""What was lost: errors between arrays, and how far apart two models' predictions are. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from seawall.inference.errors import InvalidArrayError

from .layout import Array, not_finite

_CHUNK = 1 << 15  # values; see layout.py


@dataclass(frozen=True, slots=True)
class Errors:
    """How far an array is from the one it stands for.

    Attributes:
        mse: mean of the squared differences.
        mae: mean of the absolute differences.
        max_error: the largest absolute difference.
        sqnr_db: power of the reference over that of the differences, in decibels; 6.02 more for each bit. Infinite
            where nothing was lost.
    """

    mse: float
    mae: float
    max_error: float
    sqnr_db: float


def errors(reference: Any, candidate: Any) -> Errors:
    """Compare two arrays of one shape, in float64. Two empty ones are equal.

    Raises:
        NotFiniteError: NaN or infinity in either, so that no gate compares with NaN and lets it pass.
    """
    sums = ErrorSums()
    sums.add(reference, candidate)
    return sums.errors()


class ErrorSums:
    """`errors` over arrays that come one pair after the other."""

    def __init__(self) -> None:
        self.count = 0
        self._squares = self._magnitudes = self._largest = self._power = 0.0

    def add(self, reference: Any, candidate: Any) -> None:
        """Count two arrays of one shape; raises as `errors` does."""
        reference, candidate = np.asarray(reference), np.asarray(candidate)
        _check_same_shape(reference, candidate)
        flat, other = reference.reshape(-1), candidate.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            exact = flat[start : start + _CHUNK].astype(np.float64)
            lost = other[start : start + _CHUNK].astype(np.float64)
            lost -= exact
            self._squares += _power(lost)
            self._power += _power(exact)
            np.abs(lost, out=lost)
            self._magnitudes += float(lost.sum())
            self._largest = np.maximum(self._largest, lost.max())  # keeps NaN, which max() may drop
        self.count += flat.size
        if not math.isfinite(self._largest):
            raise not_finite(candidate if np.isfinite(reference.astype(np.float64)).all() else reference)

    def errors(self) -> Errors:
        """What was lost so far."""
        count = max(self.count, 1)
        decibels = _decibels(self._power, self._squares)
        return Errors(self._squares / count, self._magnitudes / count, float(self._largest), decibels)


def _power(values: Array) -> float:
    """Sum of squares, in this thread: BLAS shares out even so few, and on a busy machine waits 100 times as long."""
    return float(np.einsum("i,i", values, values))


def kl_divergence(reference: Any, candidate: Any) -> Array:
    """KL divergence in nats of each prediction, [..., vocabulary] logits to [...]: `sum(p * (log p - log q))`.

    `p` is the reference's. Logits of minus infinity are tokens that cannot come; the divergence is infinite where
    only the candidate rules one out. Gates look at the mean over a text.
    """
    logits = checked_logits(reference, candidate)
    p, q = (log_probabilities(rows) for rows in logits)
    return divergence(p, q)


def divergence(p: Array, q: Array) -> Array:
    """`kl_divergence` of logarithms of probabilities."""
    with np.errstate(invalid="ignore"):
        terms = np.where(p == -np.inf, 0.0, np.exp(p) * (p - q))
    nats: Array = np.maximum(terms.sum(axis=-1), 0.0)  # rounding may fall just below zero
    return nats


def top1_agreement(reference: Any, candidate: Any) -> float:
    """The fraction of predictions whose likeliest token is the same, the first of equals counting; 1 for none."""
    first, second = checked_logits(reference, candidate)
    same = first.argmax(axis=-1) == second.argmax(axis=-1)
    return float(same.mean()) if same.size else 1.0


def _decibels(power: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf


def log_probabilities(logits: Array) -> Array:
    """Logarithms of softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logarithms: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logarithms


def checked_logits(reference: Any, candidate: Any) -> tuple[Array, Array]:
    """Both as float64, once they have one shape and every prediction has a best token; raises as `errors` does."""
    first, second = np.asarray(reference), np.asarray(candidate)
    _check_same_shape(first, second)
    if first.ndim == 0 or first.shape[-1] == 0:
        raise InvalidArrayError(f"expected logits of shape [..., vocabulary], got {first.shape}")
    first, second = first.astype(np.float64), second.astype(np.float64)
    for logits in (first, second):
        best = logits.max(axis=-1)
        if not np.isfinite(best).all():  # NaN, plus infinity, or nothing but minus infinity
            raise not_finite(best)
    return first, second


def _check_same_shape(first: Array, second: Array) -> None:
    if first.shape != second.shape:
        raise InvalidArrayError(f"both arrays must have one shape, got {first.shape} and {second.shape}")
