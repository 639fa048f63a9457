"""What all forms of quantizing a graph share: weights as they are to be rounded, sizes moved, and an account of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .calibration import Feed, collect
from .layout import Array
from .measures import errors
from .products import Found, Graph, Product
from .recipes import Grid, Recipe
from .scaling import Edit, Scaling, activation_aware, foldable, smoothing
from .source import Source, onnx
from .target import Target
from .weights import InputStatistics


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """What became of one weight.

    Attributes:
        name: the initializer's name in the source.
        nodes: the nodes that use it.
        stored: such as "4 bits, block 32, hqq, zero points".
        elements: how many values it has.
        bytes: what its codes, scales and zero points take.
        sqnr_db: power of the weight over that of the error, in decibels.
    """

    name: str
    nodes: tuple[str, ...]
    stored: str
    elements: int
    bytes: int
    sqnr_db: float


class Weights:
    """The weights of a graph on their way from source to target.

    Attributes:
        done: what became of each, by name and form.
        scaling: what is moved from inputs into weights.
    """

    def __init__(
        self,
        source: Source,
        graph: Graph,
        found: Found,
        recipe: Recipe,
        target: Target,
        progress: Callable[[str, float], None],
    ) -> None:
        self.source = source
        self.graph = graph
        self.found = found
        self.recipe = recipe
        self.target = target
        self.done: dict[str, QuantizedWeight] = {}
        self.scaling = Scaling()
        self._progress = progress
        self._count = 0

    def run(self, feeds: list[Feed]) -> None:
        """Replace what the recipe replaces."""
        raise NotImplementedError

    def remarks(self) -> dict[str, Any]:
        """What the manifest is to say besides."""
        return {}

    def grid(self, product: Product) -> Grid:
        """How a product's weight is rounded: by the recipe's plan, or as inner or last ones are."""
        planned = self.recipe.planned.get(product.name)
        return planned or (self.recipe.head if product.last else self.recipe.body)

    def matrix(self, product: Product) -> Array:
        """The weight as float32 [outputs, inputs], with all that is moved into or out of it."""
        weights = self.source.weights(product.weight)
        matrix = np.ascontiguousarray(weights.T if product.transposed else weights)
        if product.alpha != 1:
            matrix = matrix * np.float32(product.alpha)
        if (columns := self.scaling.columns.get(product.node)) is not None:
            matrix = matrix * columns
        if (rows := self.scaling.rows.get(product.node)) is not None:
            matrix = matrix / rows[:, None]
        return matrix

    def is_plain(self, product: Product) -> bool:
        """Whether the matrix is the initializer itself, or its transpose."""
        moved = self.scaling.columns.keys() | self.scaling.rows.keys()
        return product.alpha == 1 and product.node not in moved

    def bias(self, product: Product) -> Array | None:
        """The bias of a Gemm, one value per output."""
        if not product.bias:
            return None
        values = self.source.array(product.bias)
        rows = self.scaling.rows.get(product.node, 1)
        return np.asarray(values * product.beta / rows, values.dtype).ravel()

    def seen(self, product: Product, statistics: InputStatistics | None) -> InputStatistics | None:
        """The statistics of a product's input, after what was moved out of it."""
        columns = self.scaling.columns.get(product.node)
        return statistics if statistics is None or columns is None else statistics.divided(columns)

    def scale(self, feeds: list[Feed]) -> None:
        """Find what can be moved from inputs into weights, and change the constants that pay for it."""
        if self.recipe.scaling == "none":
            return
        by_node = {product.node: product for product in self.found.products}
        groups = self.groups()
        names = {name: group[0].columns for name, (group, _) in groups.items()}
        found = 0
        for statistics in collect(self.source, names, feeds):
            for name, of_input in statistics.items():
                group, edits = groups[name]
                scale = self._scale_of(group, of_input)
                if scale is not None:
                    self.scaling.add(group, edits, scale, by_node)
                found += 1
                self._progress("scaling", found / len(names))
        for edit, scale in self.scaling.constants.items():
            self._divide_constant(edit.node, edit.place, scale)

    def groups(self) -> Mapping[str, tuple[list[Product], list[Edit]]]:
        """Inputs that can be divided, the products that share each, and the edits that divide it."""
        return foldable(self.graph, self.found.products)

    def advance(self) -> None:
        """One more product is done."""
        self._count += 1
        self._progress("quantizing", self._count / len(self.found.products))

    def tell(self, weight: str, node: str, stored: str, exact: Array, kept: Array, size: int) -> None:
        """Write down what became of a weight."""
        lost = errors(exact, kept)
        key = f"{weight}: {stored}"
        while key in self.done:  # two products of one weight, each scaled in its own way
            key += "'"
        self.done[key] = QuantizedWeight(weight, (node,), stored, exact.size, size, lost.sqnr_db)

    def tell_again(self, weight: str, node: str, stored: str) -> None:
        """Write down that one more node uses a weight."""
        key = f"{weight}: {stored}"
        self.done[key] = replace(self.done[key], nodes=(*self.done[key].nodes, node))

    def _scale_of(self, group: list[Product], statistics: InputStatistics) -> Array | None:
        matrices = [self.matrix(product) for product in group]
        if self.recipe.scaling == "smooth":
            return smoothing(matrices, statistics, self.recipe.strength)
        return activation_aware(matrices, self.grid(group[0]), statistics)

    def _divide_constant(self, index: int, place: int, scale: Array) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(self.target.replaced(index)[0])
        constant = self.graph.constant(node.input[place])
        assert constant is not None
        exact = self.source.array(constant.tensor)
        name = f"{node.input[place]}.{node.output[0]}"
        node.input[place] = self.target.tensor(name, (exact / scale).astype(exact.dtype))
        self.target.replace(index, node)
