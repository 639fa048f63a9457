"""The quantized model on its way to disk: new nodes in place of old ones, and a file of weights beside the graph."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from seawall.inference.errors import QuantizationError
from seawall.inference.models.packing import PackedWeight

from .layout import Array
from .products import Graph, Product, names_used
from .recipes import Grid
from .source import MODEL, Source, TensorProto, onnx

WEIGHTS = "weights.bin"
CONTRIB = "com.microsoft"
_ALIGNMENT = 4096  # a page, so that weights are mapped instead of copied
_INLINE = 4096  # bytes; smaller tensors live in the graph file
_INT8_ACTIVATIONS = 4  # accuracy_level; any other dequantizes first and decodes about 15 times slower


class Target:
    """Collects what replaces nodes and weights of a source; `finish` writes the graph."""

    def __init__(self, source: Source, graph: Graph, file: BinaryIO | None = None) -> None:
        self._source = source
        self._graph = graph
        self._file = file
        self._first: list[Any] = []
        self._nodes: dict[int, list[Any]] = {}
        self._tensors: dict[str, Any] = {}
        self._places: dict[bytes, int] = {}
        self._opsets: dict[str, int] = {}

    def replace(self, node: int, *new: Any) -> None:
        """Put `new` in place of a node; it makes the same outputs."""
        self._nodes[node] = list(new)

    def begin_with(self, *new: Any) -> None:
        """Put nodes before all others; what they make stands in for initializers of the same name."""
        self._first.extend(new)

    def replaced(self, node: int) -> list[Any]:
        """What stands in a node's place now."""
        return self._nodes.get(node, [self._graph.nodes[node]])

    def needs(self, domain: str, version: int) -> None:
        """Say that nodes of a domain are used."""
        self._opsets[domain] = max(version, self._opsets.get(domain, 0))

    def node(self, op: str, inputs: list[str], outputs: list[str], *, name: str, domain: str = "", **more: Any) -> Any:
        """A new node."""
        if domain:
            self.needs(domain, 1)
        return onnx.helper.make_node(op, inputs, outputs, name=name, domain=domain, **more)

    def tensor(self, name: str, array: Array) -> str:
        """Add an initializer; what is already there under that name stays. Gives the name."""
        if name not in self._tensors:
            array = np.ascontiguousarray(array)
            self.raw(name, array.shape, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.tobytes())
        return name

    def raw(self, name: str, dims: Any, kind: int, data: bytes) -> str:
        """Add an initializer by its bytes; equal ones are stored once, whatever their shapes."""
        if name in self._tensors:
            return name
        if name in self._source.tensors or name in self._graph.makers:
            raise QuantizationError(f"the model has a value {name!r} already, which a new weight needs: rename it")
        return self.add(name, dims, kind, data)

    def add(self, name: str, dims: Any, kind: int, data: bytes) -> str:
        """Add an initializer that may have the name of one of the source."""
        tensor = TensorProto(name=name, dims=dims, data_type=kind)
        if len(data) < _INLINE:
            tensor.raw_data = data
        else:
            self._put_aside(tensor, data)
        self._tensors[name] = tensor
        return name

    def has(self, name: str) -> bool:
        """Whether there is an initializer of that name already."""
        return name in self._tensors

    def packed(self, at: str, packed: PackedWeight, kind: int) -> None:
        """Add the initializers of a MatMulNBits under names that begin with `at`."""
        self.tensor(f"{at}.q", packed.data)
        self.tensor(f"{at}.s", packed.scales.astype(onnx.helper.tensor_dtype_to_np_dtype(kind)))
        if packed.zero_points is not None:
            self.tensor(f"{at}.z", packed.zero_points)

    def product(self, product: Product, grid: Grid, at: str, bias: str = "") -> Any:
        """A MatMulNBits node with the initializers that `packed` added."""
        inputs = [product.source, f"{at}.q", f"{at}.s"]
        if grid.asymmetric:
            inputs.append(f"{at}.z")
        if bias:
            inputs += [""] * (5 - len(inputs)) + [bias]
        return self.node(
            "MatMulNBits", inputs, [product.output], name=product.name, domain=CONTRIB, K=product.columns,
            N=product.rows, bits=grid.bits, block_size=grid.block, accuracy_level=_INT8_ACTIVATIONS,
        )  # fmt: skip

    def finish(self, folder: Path) -> None:
        """Write the graph, with every initializer of the source that is still in use."""
        (folder / MODEL).write_bytes(self.model().SerializeToString(deterministic=True))

    def model(self) -> Any:
        """The graph, with every initializer of the source that is still in use."""
        model = onnx.ModelProto()
        model.CopyFrom(self._source.proto)
        graph = model.graph
        nodes = self._live()
        used = {name for node in nodes for name in names_used(node)} | {port.name for port in graph.output}
        made = {name for node in nodes for name in node.output} | self._tensors.keys()
        kept = [tensor for tensor in graph.initializer if tensor.name in used and tensor.name not in made]
        for tensor in kept:
            self.keep(tensor)
        names = {name for node in nodes for name in node.output} | used
        values = [value for value in graph.value_info if value.name in names]
        for field, content in (("node", nodes), ("initializer", self._in_use(used)), ("value_info", values)):
            copies = [type(one).FromString(one.SerializeToString()) for one in content]
            graph.ClearField(field)
            getattr(graph, field).extend(copies)
        for node in graph.node:
            self._embed(node)
        self._import_opsets(model)
        model.producer_name = "seawall"
        return model

    def _in_use(self, used: set[str]) -> list[Any]:
        return [tensor for name, tensor in self._tensors.items() if name in used]

    def _live(self) -> list[Any]:
        """The nodes in order, without those whose only users were replaced, such as transposes of weights."""
        nodes = self._first + [new for index in range(len(self._graph.nodes)) for new in self.replaced(index)]
        while True:
            used = {name for node in nodes for name in names_used(node)} | self._graph.outputs
            live = [
                node
                for node in nodes
                if node.op_type not in ("Identity", "Transpose") or any(name in used for name in node.output)
            ]
            if len(live) == len(nodes):
                return nodes
            nodes = live

    def keep(self, tensor: Any) -> None:
        """Take an initializer of the source over."""
        if tensor.data_location == TensorProto.EXTERNAL:
            self.add(tensor.name, tensor.dims, tensor.data_type, self._source.external_bytes(tensor))
        elif tensor.raw_data:
            self.add(tensor.name, tensor.dims, tensor.data_type, tensor.raw_data)
        else:  # typed fields
            self.take_over(tensor)

    def take_over(self, tensor: Any) -> None:
        """Keep an initializer of the source as it is."""
        self._tensors[tensor.name] = tensor

    def _embed(self, node: Any) -> None:
        """Take external data of subgraphs and attributes into the graph; they are small."""
        for one in node.attribute:
            tensors = [one.t, *one.tensors]
            for inner in (one.g, *one.graphs):
                tensors += list(inner.initializer)
                for nested in inner.node:
                    self._embed(nested)
            for tensor in tensors:
                if tensor.data_location == TensorProto.EXTERNAL:
                    data = self._source.external_bytes(tensor)
                    del tensor.external_data[:]
                    tensor.data_location = TensorProto.DEFAULT
                    tensor.raw_data = data

    def _import_opsets(self, model: Any) -> None:
        for domain, version in sorted(self._opsets.items()):
            found = [one for one in model.opset_import if one.domain == domain]
            if not found:
                model.opset_import.append(onnx.helper.make_opsetid(domain, version))

    def _put_aside(self, tensor: Any, data: bytes) -> None:
        """Store data in the file, each only once, and say so in the tensor."""
        assert self._file is not None
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
            self._places[digest] = self._file.tell()
            self._file.write(data)
        place_outside(tensor, WEIGHTS, self._places[digest], len(data))


def place_outside(tensor: Any, location: str, offset: int, length: int) -> None:
    """Say that a tensor's data is in a file of its own."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
