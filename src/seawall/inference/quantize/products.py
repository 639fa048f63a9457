"""What of a graph can be quantized: products with constant weights, lookups in constant tables, and what is left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from .source import Source, TensorProto, onnx

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_PASSING = ("Add", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze", "Flatten")
_TABLES = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}  # sines are no weights
_LARGE = 1024  # elements; a constant of fewer is no weight worth a word


@dataclass(frozen=True, slots=True)
class Product:
    """A MatMul or Gemm with a constant weight of [outputs, inputs], stored that way or transposed.

    Attributes:
        node: its place in the graph.
        name: the node's name, or that of its output.
        source: name of its input.
        output: name of its output.
        weight: name of the initializer.
        transposed: whether that is stored as [inputs, outputs].
        bias: name of a constant bias, or "".
        alpha: what the weight is multiplied by.
        beta: what the bias is multiplied by.
        rows: outputs.
        columns: inputs.
        last: whether its result is an output of the model, but for additions and changes of shape.
        kind: TensorProto type of the weight.
    """

    node: int
    name: str
    source: str
    output: str
    weight: str
    transposed: bool
    bias: str
    alpha: float
    beta: float
    rows: int
    columns: int
    last: bool
    kind: int


@dataclass(frozen=True, slots=True)
class Lookup:
    """A Gather of rows of a constant table."""

    node: int
    name: str
    indices: str
    output: str
    table: str
    rows: int
    columns: int
    kind: int


class Left(NamedTuple):
    """A node that stays as it is although it holds weights, and why."""

    node: str
    op_type: str
    why: str


class Constant(NamedTuple):
    """An initializer, seen through Identity and Transpose."""

    tensor: str
    shape: tuple[int, ...]
    kind: int
    transposed: bool


class Found(NamedTuple):
    """What a graph holds."""

    products: list[Product]
    lookups: list[Lookup]
    left: list[Left]


class Graph:
    """Names of a main graph: who makes a value, who uses it, and what is constant."""

    def __init__(self, source: Source) -> None:
        self.graph: Any = source.proto.graph
        self.nodes: list[Any] = list(self.graph.node)
        self.outputs = {port.name for port in self.graph.output}
        self.makers = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.users: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in names_used(node):
                self.users.setdefault(name, []).append(index)
        self._tensors = source.tensors
        self._overridable = {port.name for port in self.graph.input}

    def constant(self, name: str) -> Constant | None:
        """The initializer behind a value, or None."""
        transposed = False
        for _ in range(8):  # Identity of Transpose of Identity ... a cycle would be no graph
            if name in self._tensors and name not in self._overridable:
                tensor = self._tensors[name]
                shape = tuple(tensor.dims)
                return Constant(name, shape[::-1] if transposed else shape, tensor.data_type, transposed)
            node = self.nodes[self.makers[name]] if name in self.makers else None
            if node is None or node.domain or node.op_type not in ("Identity", "Transpose"):
                return None
            if node.op_type == "Transpose":
                perm = attribute(node, "perm", [1, 0])
                if list(perm) != [1, 0]:
                    return None
                transposed = not transposed
            name = node.input[0]
        return None

    def is_overridable(self, name: str) -> bool:
        """Whether a value is an initializer that is also an input: only a default."""
        return name in self._overridable and name in self._tensors

    def ends(self, name: str) -> bool:
        """Whether a value is an output of the model, but for additions and changes of shape."""
        for _ in range(8):
            if name in self.outputs:
                return True
            users = self.users.get(name, [])
            if len(users) != 1 or self.nodes[users[0]].op_type not in _PASSING or not self.nodes[users[0]].output:
                return False
            name = self.nodes[users[0]].output[0]
        return False


def find(source: Source, graph: Graph, smallest: int) -> Found:
    """Everything in the model that holds weights."""
    found = Found([], [], [])
    for index, node in enumerate(graph.nodes):
        one = _product(graph, index, node, smallest) or _lookup(graph, index, node, smallest)
        if isinstance(one, Product):
            found.products.append(one)
        elif isinstance(one, Lookup):
            found.lookups.append(one)
        else:
            why = one or _why_left(graph, node)
            if why:
                found.left.append(Left(node.name or _first(node.output), node.op_type, why))
        found.left.extend(_inside(node))
    for sparse in source.proto.graph.sparse_initializer:
        found.left.append(Left(sparse.values.name, "sparse_initializer", "sparse weights are left alone"))
    for function in source.proto.functions:
        found.left.append(Left(function.name, "function", "functions of a model are left alone"))
    return found


def attribute(node: Any, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def names_used(node: Any) -> Iterator[str]:
    """Names of the values that a node takes, those its subgraphs take included; a name may come more than once."""
    yield from (name for name in node.input if name)
    for inner in _subgraphs(node):
        for one in inner.node:
            yield from names_used(one)
        yield from (port.name for port in inner.output)


def _product(graph: Graph, index: int, node: Any, smallest: int) -> Product | str | None:
    """The product; or why it is none; or None where it is something else."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
        return None
    weight = graph.constant(node.input[1])
    if weight is None:
        if graph.is_overridable(node.input[1]):
            return "its weight is an input that callers may override: take it out of the graph's inputs"
        if graph.constant(node.input[0]) is not None:
            return "its constant is the left factor; only right ones are quantized"
        return None
    gemm = node.op_type == "Gemm"
    if len(weight.shape) != 2:
        return f"its weight has {len(weight.shape)} axes; only matrices are quantized"
    if weight.kind not in _FLOATS:
        return f"its weight is {TensorProto.DataType.Name(weight.kind)}; only FLOAT and FLOAT16 are quantized"
    if gemm and attribute(node, "transA", 0):
        return "its input is transposed (transA)"
    shape = weight.shape[::-1] if gemm and attribute(node, "transB", 0) else weight.shape  # [inputs, outputs]
    if shape[0] * shape[1] < smallest:
        return f"its weight has {shape[0] * shape[1]} elements; fewer than {smallest} stay as they are"
    bias = node.input[2] if gemm and len(node.input) > 2 else ""
    if bias:
        constant = graph.constant(bias)
        if constant is None or constant.transposed or constant.tensor != bias:
            return "its bias is no initializer"
        if constant.shape not in ((shape[1],), (1, shape[1])):
            return f"its bias has the shape {list(constant.shape)}, not one value per output"
    stored_as_rows = (gemm and bool(attribute(node, "transB", 0))) != weight.transposed
    return Product(
        index, node.name or node.output[0], node.input[0], node.output[0], weight.tensor, not stored_as_rows, bias,
        float(attribute(node, "alpha", 1.0)) if gemm else 1.0, float(attribute(node, "beta", 1.0)) if gemm else 1.0,
        shape[1], shape[0], graph.ends(node.output[0]), weight.kind,
    )  # fmt: skip


def _lookup(graph: Graph, index: int, node: Any, smallest: int) -> Lookup | str | None:
    if node.domain not in ("", "ai.onnx") or node.op_type != "Gather" or len(node.input) != 2:
        return None
    table = graph.constant(node.input[0])
    if table is None or table.kind not in _FLOATS or len(table.shape) != 2:
        return None
    if table.shape[0] * table.shape[1] < smallest:
        return None
    if attribute(node, "axis", 0) != 0 or table.transposed:
        return "only rows of a table are looked up in fewer bits"
    return Lookup(
        index, node.name or node.output[0], node.input[1], node.output[0], table.tensor, *table.shape, table.kind
    )


def _why_left(graph: Graph, node: Any) -> str:
    """Why a node with large constant floats stays as it is; "" for one without."""
    if node.op_type in ("Identity", "Transpose") and not node.domain:
        return ""  # what uses it has its own line
    for place, name in enumerate(node.input):
        constant = graph.constant(name) if name and place not in _TABLES.get(node.op_type, ()) else None
        if constant is None or len(constant.shape) < 2:  # biases and norms are no weights
            continue
        elements = math.prod(constant.shape)
        if elements >= _LARGE and constant.kind in (*_FLOATS, TensorProto.BFLOAT16, TensorProto.DOUBLE):
            return "this operator is not quantized"
        if elements >= _LARGE and node.op_type in ("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"):
            return "it is quantized already"
    return ""


def _inside(node: Any) -> Iterator[Left]:
    """What the subgraphs of a node hold; they are left alone."""
    counts = Counter(
        one.op_type
        for inner in _subgraphs(node)
        for one in inner.node
        if one.op_type in ("MatMul", "Gemm", "Conv", "Gather", "LSTM", "GRU")
    )
    for op_type, count in sorted(counts.items()):
        yield Left(node.name or _first(node.output), node.op_type, f"{count} {op_type} in its subgraph: left alone")


def _subgraphs(node: Any) -> Iterator[Any]:
    for one in node.attribute:
        if one.type == onnx.AttributeProto.GRAPH:
            yield one.g
        yield from one.graphs


def _first(names: Any) -> str:
    return next((str(name) for name in names if name), "")
