"""Sizes moved out of a product's inputs and into its weight, and paid back where it costs nothing.

A product x W^T is the same as (x / s) (W s)^T. Dividing x by s is free where x comes out of a norm, a gate or another
product, whose own constants are divided instead. AWQ looks for the s that makes the rounding of W hurt least,
SmoothQuant for the one that lets both x and W be rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from seawall.inference.models.packing import unpack

from .layout import Array
from .products import Graph, Product, attribute
from .recipes import Grid
from .weights import InputStatistics, round_weight

_NORMS = {  # where their scale and shift stand among their inputs
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
_STEPS = 10
_DEEPEST = 6


class ConstantEdit(NamedTuple):
    """An input of a node, a constant vector, is to be divided."""

    node: int
    place: int


class RowsEdit(NamedTuple):
    """Rows of a product's weight, and its bias, are to be divided."""

    product: int
    start: int
    stop: int


Edit = ConstantEdit | RowsEdit


@dataclass(slots=True)
class Scaling:
    """What is multiplied and divided so far; all by node.

    Attributes:
        columns: factors of a product's weight, one per input.
        rows: divisors of a product's weight and bias, one per output.
        constants: divisors of a node's constant input, by node and place.
    """

    columns: dict[int, Array] = field(default_factory=dict)
    rows: dict[int, Array] = field(default_factory=dict)
    constants: dict[ConstantEdit, Array] = field(default_factory=dict)

    def add(self, group: Iterable[Product], edits: Iterable[Edit], scale: Array, by_node: dict[int, Product]) -> None:
        """Divide the common input of a group by `scale`, by these edits, and multiply their weights."""
        for product in group:
            self.columns[product.node] = scale
        for edit in edits:
            if isinstance(edit, ConstantEdit):
                self.constants[edit] = scale
            else:
                rows = self.rows.setdefault(edit.product, np.ones(by_node[edit.product].rows, np.float32))
                rows[edit.start : edit.stop] *= scale


def foldable(graph: Graph, products: list[Product]) -> dict[str, tuple[list[Product], list[Edit]]]:
    """Inputs of products that can be divided for free: by name, the products that share one, and the edits."""
    by_node = {product.node: product for product in products}
    groups: dict[str, list[Product]] = {}
    for product in products:
        groups.setdefault(product.source, []).append(product)
    found = {}
    for name, group in groups.items():
        nodes = {product.node for product in group}
        if any(set(graph.users[product.weight]) - nodes for product in group):
            continue  # a weight that others share
        edits = _divide(graph, by_node, name, nodes, group[0].columns, _DEEPEST)
        if edits:
            found[name] = (group, edits)
    return found


def _divide(
    graph: Graph, products: dict[int, Product], name: str, users: set[int], width: int, depth: int
) -> list[Edit] | None:
    """Edits after which a value is divided, channel by channel; None where others than `users` would see it."""
    if depth == 0 or name in graph.outputs or set(graph.users.get(name, ())) != users or name not in graph.makers:
        return None
    index = graph.makers[name]
    node = graph.nodes[index]
    first = node.output[0] == name
    if node.op_type in _NORMS and first:
        places = [place for place in _NORMS[node.op_type] if place < len(node.input) and node.input[place]]
        whole = all(_is_vector(graph, node.input[place], width) for place in places)
        return [*(ConstantEdit(index, place) for place in places)] if whole else None
    if node.domain not in ("", "ai.onnx"):
        return None
    deeper: Callable[[str], list[Edit] | None] = lambda inner: _divide(  # noqa: E731
        graph, products, inner, {index}, width, depth - 1
    )
    if index in products:
        product = products[index]
        private = set(graph.users[product.weight]) == {index}
        return [RowsEdit(index, 0, product.rows)] if private and product.rows == width else None
    if node.op_type == "Relu":
        return deeper(node.input[0])
    if node.op_type in ("Mul", "Add"):
        sides: list[list[Edit] | None] = [
            [ConstantEdit(index, place)] if _is_vector(graph, name, width) else deeper(name)
            for place, name in enumerate(node.input)
        ]
        if node.op_type == "Mul":
            return next((side for side in sides if side), None)
        return [*sides[0], *sides[1]] if sides[0] and sides[1] else None
    if node.op_type == "Split":
        return _divide_part(graph, products, index, name, width)
    return None


def _divide_part(graph: Graph, products: dict[int, Product], index: int, name: str, width: int) -> list[Edit] | None:
    """Edits for one part of a product's output that is split along its last axis into equal ones."""
    node = graph.nodes[index]
    maker = graph.makers.get(node.input[0], -1)
    product = products.get(maker)
    if product is None or set(graph.users[product.output]) != {index} or product.output in graph.outputs:
        return None
    if len(node.input) > 1 and node.input[1]:
        return None  # parts of given sizes
    if attribute(node, "axis", 0) != -1 or product.rows != width * len(node.output):
        return None
    if set(graph.users[product.weight]) != {maker}:
        return None
    start = list(node.output).index(name) * width
    return [RowsEdit(maker, start, start + width)]


def _is_vector(graph: Graph, name: str, width: int) -> bool:
    constant = graph.constant(name) if name else None
    return constant is not None and constant.shape == (width,)


def activation_aware(matrices: list[Array], grid: Grid, statistics: InputStatistics) -> Array | None:
    """AWQ's scale for weights that share their inputs (Lin et al. 2023); None where none is better than plain rounding.

    Searches s = mean|x|^a for a from 0 to 1, and takes the least squared output error, input channels seen as
    independent.
    """
    size = np.maximum(statistics.mean_absolute, 1e-8)
    best, least = None, _lost(matrices, grid, np.ones_like(size), statistics)
    for step in range(1, _STEPS + 1):
        scale = _balanced(size ** np.float32(step / _STEPS))
        lost = _lost(matrices, grid, scale, statistics)
        if lost < least:
            best, least = scale, lost
    return best


def smoothing(matrices: list[Array], statistics: InputStatistics, strength: float | None) -> Array | None:
    """SmoothQuant's scale (Xiao et al. 2022): max|x|^strength / max|W|^(1 - strength), channel by channel.

    Without a strength, the one of 0 to 1, or no scale at all, for which the rounding of inputs per tensor and weights
    per output makes the least noise; with the paper's 0.5 for all, MiniLM came out worse than unscaled.
    """
    inputs = np.maximum(np.maximum(np.abs(statistics.low), np.abs(statistics.high)), 1e-5)
    weights = np.maximum(np.max([np.abs(matrix).max(axis=0) for matrix in matrices], axis=0), 1e-5)

    def scale_of(share: float) -> Array:
        return _balanced((inputs**share / weights ** (1 - share)).astype(np.float32))

    if strength is not None:
        return scale_of(strength)
    best, least = None, _noise(matrices, statistics, np.ones_like(inputs))
    for step in range(_STEPS + 1):
        scale = scale_of(step / _STEPS)
        noise = _noise(matrices, statistics, scale)
        if noise < least:
            best, least = scale, noise
    return best


def _noise(matrices: list[Array], statistics: InputStatistics, scale: Array) -> float:
    """Mean squared output error that rounding inputs / scale per tensor and weights * scale per output brings about."""
    seen = statistics.divided(scale)
    input_step = (max(float(seen.high.max()), 0.0) - min(float(seen.low.min()), 0.0)) / 255
    power = float(seen.mean_square.sum())
    noise = 0.0
    for matrix in matrices:
        scaled = matrix * scale
        weight_step = np.abs(scaled).max(axis=1) / 127
        noise += input_step**2 * float(np.square(scaled).sum()) + float(np.square(weight_step).sum()) * power
    return noise / 12


def _lost(matrices: list[Array], grid: Grid, scale: Array, statistics: InputStatistics) -> float:
    total = 0.0
    for matrix in matrices:
        packed = round_weight(matrix * scale, bits=grid.bits, block=grid.block, asymmetric=grid.asymmetric)
        lost = unpack(packed) / scale - matrix
        total += float((np.square(lost) @ statistics.mean_square).sum())
    return total


def _balanced(scale: Array) -> Array:
    """Around 1, and never so far from it that a constant divided by it gets lost."""
    balanced: Array = np.clip(scale / np.sqrt(scale.max() * scale.min()), 1e-4, 1e4).astype(np.float32)
    return balanced
