"""Products of 8-bit inputs and 8-bit weights, both with scales that calibration fixed: Q/DQ around a MatMul.

ONNX Runtime fuses the pattern into one integer product when it loads the model; `Backend.report()` shows it. Since no
scale depends on what comes in, no row of a batch sees another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .blocks import Blocks
from .calibration import Feed, collect
from .layout import Array
from .processor import Integers, preferred
from .products import Graph, Product
from .scaling import ConstantEdit, Edit
from .source import Source, TensorProto, onnx
from .target import Target
from .weights import InputStatistics


class RoundedInput(NamedTuple):
    """An input of products after its rounding: the value's name, and its step."""

    name: str
    step: np.float32


class Rounded(NamedTuple):
    """A weight in int8, [inputs, outputs], one step per output."""

    codes: Array
    steps: Array

    @property
    def values(self) -> Array:
        """What the codes stand for, [outputs, inputs]."""
        values: Array = (self.codes * self.steps).T
        return values


class Static(Blocks):
    """Puts Q/DQ patterns in place of products; lookups, and products of the model's outputs, are kept in blocks."""

    _multiplied: frozenset[str] = frozenset()

    def run(self, feeds: list[Feed]) -> None:
        """Replace every product and lookup."""
        wanted = preferred()
        self.integers = Integers(wanted.narrow if self.recipe.narrow is None else self.recipe.narrow, wanted.signed)
        self._ranks = known_ranks(self.source)
        for lookup in self.found.lookups:
            self.look_up(lookup)
        self.scale(feeds)
        groups: dict[str, list[Product]] = {}
        for product in self.found.products:
            if product.last or product.kind != TensorProto.FLOAT:
                self.multiply(product, None)
                self.advance()
            else:
                groups.setdefault(product.source, []).append(product)
        for statistics in collect(self.source, {name: group[0].columns for name, group in groups.items()}, feeds):
            for name, of_input in statistics.items():
                self._round_group(groups[name], of_input)

    def remarks(self) -> dict[str, Any]:
        """How integers are rounded, which depends on the processor where the recipe leaves it open."""
        return {"narrow": self.integers.narrow, "signed_inputs": self.integers.signed}

    def groups(self) -> dict[str, tuple[list[Product], list[Edit]]]:
        """Every inner input can be divided: where nothing else pays for it, by a Mul in front."""
        folded = super().groups()
        groups: dict[str, tuple[list[Product], list[Edit]]] = {}
        for product in self.found.products:
            if not product.last and product.kind == TensorProto.FLOAT and product.source not in folded:
                groups.setdefault(product.source, ([], []))[0].append(product)
        self._multiplied = frozenset(groups)
        return {**folded, **groups}

    def _round_group(self, group: list[Product], statistics: InputStatistics) -> None:
        """Replace products that share an input, which is rounded once, in front of the first of them."""
        first = min(group, key=lambda product: product.node)
        seen = self.seen(first, statistics)
        assert seen is not None
        factor = None
        if first.source in self._multiplied and first.node in self.scaling.columns:
            factor = np.float32(1) / self.scaling.columns[first.node]
        nodes, entry = input_nodes(self.target, first.source, seen, factor, signed=self.integers.signed)
        for product in sorted(group, key=lambda product: product.node):
            matrix = self.matrix(product)
            rounded = round_columns(matrix, narrow=self.integers.narrow)
            bias, output = self.bias(product), product.output
            added = added_bias(self.graph, product, self._ranks) if bias is None else None
            if added is not None and not self._is_edited(added[0]):
                bias = self.source.array(added[1])
                output = self.graph.nodes[added[0]].output[0]
                self.target.replace(added[0])
            nodes += product_nodes(self.target, product, rounded, entry, bias, output)
            self.target.replace(product.node, *nodes)
            nodes = []
            stored = f"{7 if self.integers.narrow else 8} bits, per output, inputs of fixed scale"
            self.tell(product.weight, product.name, stored, matrix, rounded.values, matrix.size + 4 * product.rows)
            self.advance()

    def _is_edited(self, node: int) -> bool:
        return any(ConstantEdit(node, place) in self.scaling.constants for place in (0, 1))


def round_columns(matrix: Array, *, narrow: bool) -> Rounded:
    """Round a [outputs, inputs] matrix to int8, symmetric, per output; to 7 bits where `narrow`."""
    highest = np.float32(63 if narrow else 127)
    largest = np.abs(matrix).max(axis=1)
    steps = np.where(largest > 0, np.maximum(largest / highest, 1e-30), 1).astype(np.float32)
    return Rounded(np.ascontiguousarray(np.rint(matrix / steps[:, None]).astype(np.int8).T), steps)


def input_nodes(
    target: Target, source: str, statistics: InputStatistics, factor: Array | None, *, signed: bool
) -> tuple[list[Any], RoundedInput]:
    """Nodes that multiply an input by `factor`, where there is one, and round it over the range that was seen."""
    nodes = []
    at = f"{source}.static"
    if factor is not None:
        nodes.append(target.node("Mul", [source, target.tensor(f"{at}.factor", factor)], [f"{at}.x"], name=f"{at}.mul"))
        source = f"{at}.x"
    low, high = min(float(statistics.low.min()), 0.0), max(float(statistics.high.max()), 0.0)
    step = np.float32((max(high, -low) / 127 if signed else (high - low) / 255) or 1)
    zero = np.zeros((), np.int8) if signed else np.clip(np.rint(-low / step), 0, 255).astype(np.uint8)
    ends = [target.tensor(f"{at}.step", np.asarray(step)), target.tensor(f"{at}.zero", zero)]
    nodes.append(target.node("QuantizeLinear", [source, *ends], [f"{at}.q"], name=f"{at}.quantize"))
    nodes.append(target.node("DequantizeLinear", [f"{at}.q", *ends], [f"{at}.dq"], name=f"{at}.dequantize"))
    return nodes, RoundedInput(f"{at}.dq", step)


def product_nodes(
    target: Target, product: Product, rounded: Rounded, entry: RoundedInput, bias: Array | None, output: str
) -> list[Any]:
    """The product; as a Gemm with the bias in its sums where there is one, for inputs of two axes."""
    at = f"{product.output}.static"
    codes = target.tensor(f"{at}.q", rounded.codes)
    steps = target.tensor(f"{at}.s", rounded.steps)
    zeros = target.tensor(f"{at}.z", np.zeros(product.rows, np.int8))
    value = f"{product.output}.weight"
    nodes = [target.node("DequantizeLinear", [codes, steps, zeros], [value], name=value, axis=1)]
    if bias is None:
        return [*nodes, target.node("MatMul", [entry.name, value], [output], name=product.name)]
    step = rounded.steps * entry.step
    sums = np.clip(np.rint(bias / step.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
    added = f"{product.output}.bias"
    inputs = [
        target.tensor(f"{added}.q", sums),
        target.tensor(f"{added}.s", step.astype(np.float32)),
        target.tensor(f"{added}.z", np.zeros(product.rows, np.int32)),
    ]
    nodes.append(target.node("DequantizeLinear", inputs, [added], name=added, axis=0))
    return [*nodes, target.node("Gemm", [entry.name, value, added], [output], name=product.name)]


def added_bias(graph: Graph, product: Product, ranks: dict[str, int]) -> tuple[int, str] | None:
    """The Add of a constant vector that follows a MatMul of two axes, and the vector's name.

    ONNX Runtime would make a float Gemm of the two before it looks for the Q/DQ pattern.
    """
    users = graph.users.get(product.output, [])
    if ranks.get(product.source) != 2 or len(users) != 1 or product.output in graph.outputs:
        return None
    node = graph.nodes[users[0]]
    if node.op_type != "Add" or node.domain:
        return None
    other = next((name for name in node.input if name != product.output), "")
    constant = graph.constant(other) if other else None
    if constant is None or constant.shape != (product.rows,) or constant.kind != TensorProto.FLOAT:
        return None
    return users[0], constant.tensor


def known_ranks(source: Source) -> dict[str, int]:
    """How many axes values have, where that can be inferred."""
    model = onnx.ModelProto()
    model.CopyFrom(source.proto)
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # what it raises is not documented, and nothing depends on its success
        graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in values
        if value.type.tensor_type.HasField("shape")
    }
