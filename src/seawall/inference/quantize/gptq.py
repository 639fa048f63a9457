"""GPTQ: round the columns of a weight one after another, and let those to come make up for each error."""

from __future__ import annotations

from typing import Any

import numpy as np

from .rounding import Blocks, nearest, search, snap

Array = np.ndarray[Any, Any]

_DAMPING = 0.01  # of the mean diagonal; the paper's


def compensated(
    weights: Array, hessian: Array, *, bits: int, block: int, asymmetric: bool, rows: int, damping: float = _DAMPING
) -> list[Blocks]:
    """The blocks of a float32 [outputs, inputs] matrix, whose inputs are whole blocks, by Frantar et al. (2022).

    `hessian` is the mean of x x^T over `rows` calibration inputs, [inputs, inputs]. A block's grid is searched when its
    turn comes, on what earlier errors have made of it. Outputs are independent, and greedy is not optimal: an output
    that plain rounding serves better keeps plain rounding, so none is worse than that in (w - w')^T H (w - w').

    Takes inputs^3 + outputs * inputs^2 operations, and 8 * inputs^2 bytes.
    """
    inputs = weights.shape[1]
    believed = shrunk(hessian, rows)
    spread = np.ascontiguousarray(_inverse_factor(believed, damping).astype(np.float32))
    importance = np.maximum(np.diag(hessian), 0).astype(np.float32)
    left = np.ascontiguousarray(weights.T)  # [inputs, outputs]: a column of the matrix is a row here
    found = []
    for start in range(0, inputs, block):
        stop = start + block
        part = left[start:stop].copy()
        weight = np.broadcast_to(importance[start:stop, None], part.shape) if importance[start:stop].any() else None
        grid = search(part, bits, asymmetric=asymmetric, weight=weight)
        codes, lost = np.empty_like(part), np.empty_like(part)
        for j in range(block):
            one = snap(part[j : j + 1], grid.scale, grid.zero, bits)
            codes[j] = one.codes[0]
            lost[j] = (part[j] - one.values[0]) / spread[start + j, start + j]
            part[j + 1 :] -= spread[start + j, start + j + 1 : stop, None] * lost[j]
        left[stop:] -= spread[start:stop, stop:].T @ lost
        found.append(Blocks(codes, grid.scale, grid.zero))
    _keep_plain_where_better(found, weights, hessian, bits=bits, block=block, asymmetric=asymmetric)
    return found


def shrunk(hessian: Array, rows: int) -> Array:
    """The Hessian that `rows` inputs are evidence for: the fewer they are, the less is made of what two share.

    Off the diagonal it is multiplied by rows / (rows + inputs). Measured with 700 tokens for SmolLM2's 576 and 1,536
    inputs: KL 0.060 on another text, against 0.107 with the raw one.
    """
    believed: Array = hessian * np.float32(rows / (rows + len(hessian)))
    np.fill_diagonal(believed, np.diag(hessian))
    return believed


def output_error(lost: Array, hessian: Array) -> Array:
    """Mean squared error of each output, [outputs], for errors [outputs, inputs] of its weights."""
    error: Array = np.maximum(((lost @ hessian) * lost).sum(axis=1), 0)
    return error


def _inverse_factor(hessian: Array, damping: float) -> Array:
    """Upper triangular U with U^T U = inverse of the damped Hessian: how an error spreads to later columns."""
    damped = hessian.astype(np.float64)
    mean = float(np.diag(damped).mean()) or 1.0
    damped[np.diag_indices_from(damped)] += damping * mean
    for _ in range(20):  # a Hessian of few rows in float32 may need more than its share
        try:
            np.linalg.cholesky(damped)
            return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T)
        except np.linalg.LinAlgError:
            damped[np.diag_indices_from(damped)] += damping * mean
            damping *= 2
    raise AssertionError("a damped Hessian is positive definite")


def _keep_plain_where_better(
    found: list[Blocks], weights: Array, hessian: Array, *, bits: int, block: int, asymmetric: bool
) -> None:
    columns = [np.ascontiguousarray(weights[:, at : at + block].T) for at in range(0, weights.shape[1], block)]
    plain = [nearest(column, bits, asymmetric=asymmetric) for column in columns]
    ours, theirs = (
        output_error(weights - np.concatenate([one.values for one in blocks]).T, hessian) for blocks in (found, plain)
    )
    better = theirs < ours
    for one, other in zip(found, plain, strict=True):
        one.codes[:, better] = other.codes[:, better]
        one.scale[better] = other.scale[better]
        one.zero[better] = other.zero[better]
