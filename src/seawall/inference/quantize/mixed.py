"""Mixed precision: which weights hurt most when they are rounded, and which of them a budget lets stay wide."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from seawall.inference.errors import InvalidSettingError
from seawall.inference.models.packing import PackedWeight, unpack

from .calibration import Calibration, Feed, feeds_of, fetched, observed
from .layout import Array
from .measures import kl_divergence
from .products import Graph, Product, find
from .recipes import RECIPES, Grid, Recipe
from .source import Source, TensorProto
from .weights import round_weight

MEASURES = ("kl", "error")
_ROWS = 128  # logits of a feed that are compared
_ALIGNMENT = 4096  # bytes that a weight in the file is rounded up to


class Loss(NamedTuple):
    """What one way to round one weight costs.

    Attributes:
        node: name of the product.
        grid: how its weight is rounded.
        bytes: what that takes.
        loss: of the whole model when this weight alone is rounded: see `sensitivity`.
    """

    node: str
    grid: Grid
    bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How each weight is to be rounded so that all fit a budget.

    Attributes:
        grids: by node, in the model's order.
        bytes: of these weights together.
        loss: the sum of the losses of these weights, each measured alone.
        losses: everything that was measured.
    """

    grids: tuple[tuple[str, Grid], ...]
    bytes: int
    loss: float
    losses: tuple[Loss, ...]

    def recipe(self, name: str = "mixed") -> Recipe:
        """The recipe that carries the plan out, and with it into the manifest."""
        return replace(RECIPES["int4-kquant"], name=name, plan=self.grids, meaning="as wide as a budget allows")


def sensitivity(
    source: str | os.PathLike[str],
    *,
    calibration: Calibration | None,
    grids: Sequence[Grid] = (RECIPES["int4-kquant"].body, RECIPES["int8-block32"].body),
    measure: str = "kl",
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Loss, ...]:
    """Round the weights of a model one at a time, each in several ways, and measure what its first output loses.

    The float model is loaded once, and each rounded weight fed to it in place of its own: a run of the calibration
    for every weight and grid. A few short inputs are enough to rank weights.

    Args:
        source: an .onnx file or a prepared folder, in float.
        calibration: as for `quantize_model`; a few hundred tokens of a decoder's are enough.
        grids: ways to round; without "gptq", which needs more than one weight to be judged fairly.
        measure: "kl", the mean divergence where the output holds logits; "error", its squared error over its power.
        progress: called with "measuring" and how much of it is done.

    Raises:
        InvalidSettingError: an unknown measure, "gptq" among the grids, or no calibration.
        ModelError: as `quantize_model`.
    """
    if measure not in MEASURES:
        raise InvalidSettingError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    if any(grid.rounding == "gptq" for grid in grids):
        raise InvalidSettingError("grids must not round with 'gptq': it needs a Hessian for every weight")
    model = Source(source)
    products = [product for product in _inner(model) if product.kind == TensorProto.FLOAT]
    feeds = [_thinned(feed) for feed in feeds_of(model, calibration, "sensitivity")]
    names = sorted({product.weight for product in products})
    session = observed(model, (), names)
    output = [model.proto.graph.output[0].name]
    exact = [fetched(session, output, feed)[0] for feed in feeds]
    losses = []
    for index, product in enumerate(products):
        weights = model.weights(product.weight)
        matrix = np.ascontiguousarray(weights.T if product.transposed else weights)
        for grid in grids:
            packed = _rounded(matrix, grid)
            kept = unpack(packed)
            swapped = {product.weight: np.ascontiguousarray(kept.T if product.transposed else kept)}
            found = [fetched(session, output, {**feed, **swapped})[0] for feed in feeds]
            losses.append(Loss(product.name, grid, _size(packed), _loss(exact, found, measure)))
        if progress is not None:
            progress("measuring", (index + 1) / len(products))
    return tuple(losses)


def plan(losses: Sequence[Loss], budget: int) -> Plan:
    """Widen weights one after another, the one that gains most per byte first, until no more fits `budget` bytes.

    Starts with every weight at its smallest. Ties go to the first in the model, so equal losses make equal plans.

    ```python
    from seawall.inference.quantize import Grid, Loss, plan

    narrow, wide = Grid(4, 32, "kquant", True), Grid(8, 32, "rtn", False)
    losses = [
        *(Loss("a", narrow, 50, 0.1), Loss("a", wide, 90, 0.0)),
        *(Loss("b", narrow, 50, 0.3), Loss("b", wide, 90, 0.0)),
    ]
    chosen = plan(losses, budget=150)
    print([(node, grid.bits) for node, grid in chosen.grids], chosen.bytes, chosen.loss)
    #> [('a', 4), ('b', 8)] 140 0.1
    ```

    Raises InvalidSettingError where not even the smallest fit.
    """
    choices: dict[str, list[Loss]] = {}
    for loss in losses:
        choices.setdefault(loss.node, []).append(loss)
    chosen = {node: min(options, key=lambda one: (one.bytes, one.loss)) for node, options in choices.items()}
    total = sum(one.bytes for one in chosen.values())
    if type(budget) is not int or total > budget:
        raise InvalidSettingError(
            f"budget must be at least {total} bytes, what the smallest grids take, got {budget!r}"
        )
    while True:
        best, gain = None, 0.0
        for node, options in choices.items():
            now = chosen[node]
            for option in options:
                more = option.bytes - now.bytes
                if now.loss > option.loss and 0 < more <= budget - total:
                    per_byte = (now.loss - option.loss) / more
                    if per_byte > gain:
                        best, gain = option, per_byte
        if best is None:
            break
        total += best.bytes - chosen[best.node].bytes
        chosen[best.node] = best
    grids = tuple((node, one.grid) for node, one in chosen.items())
    return Plan(grids, total, sum(one.loss for one in chosen.values()), tuple(losses))


def _inner(model: Source) -> list[Product]:
    found = find(model, Graph(model), RECIPES["int4-kquant"].smallest)
    return [product for product in found.products if not product.last]


def _rounded(matrix: Array, grid: Grid) -> PackedWeight:
    return round_weight(matrix, bits=grid.bits, block=grid.block, rounding=grid.rounding, asymmetric=grid.asymmetric)


def _size(packed: PackedWeight) -> int:
    """Bytes in the file, where each part begins at a page of its own."""
    parts = (packed.data, packed.scales, packed.zero_points)
    return sum(-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts if part is not None)


def _thinned(feed: Feed) -> Feed:
    """Fewer rows of a decoder's logits: the vocabulary is most of what a short run computes."""
    rows = feed.get("logit_rows")
    if rows is None or len(rows) <= _ROWS:
        return feed
    return {**feed, "logit_rows": np.ascontiguousarray(rows[:: -(-len(rows) // _ROWS)])}


def _loss(exact: list[Array], found: list[Array], measure: str) -> float:
    if measure == "kl":
        divergences = [kl_divergence(one, other).ravel() for one, other in zip(exact, found, strict=True)]
        return float(np.concatenate(divergences).mean())
    pairs = [(one.astype(np.float64), other) for one, other in zip(exact, found, strict=True)]
    power = sum(float(np.square(one).sum()) for one, _ in pairs)
    return sum(float(np.square(one - other).sum()) for one, other in pairs) / (power or 1.0)
