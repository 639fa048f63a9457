"""A model whose weights are stored as 8-bit floats, made ready to run: expanded once, in memory, at load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seawall.inference.errors import CorruptModelError, InvalidSettingError

from .blocks import Blocks
from .float8 import decode_e4m3, decode_e5m2
from .layout import Array
from .products import Graph, attribute, find
from .recipes import RECIPES
from .source import Source, TensorProto, onnx
from .target import Target, place_outside

_DECODERS = {TensorProto.FLOAT8E4M3FN: decode_e4m3, TensorProto.FLOAT8E5M2: decode_e5m2}
_IN_MEMORY = "expanded-in-memory"


class ExpandedModel(NamedTuple):
    """What a session is built from.

    Attributes:
        model: the bytes of the ONNX model, whose other weights stay in the files of `folder`.
        initializers: the weights that were expanded, by name. A session shares their memory: keep them as long as it.
        folder: where the model's files are.
        nodes: names of the nodes whose weights were expanded; a report calls them that, not native.
    """

    model: bytes
    initializers: dict[str, Array]
    folder: Path
    nodes: frozenset[str]


def expand_fp8(source: str | os.PathLike[str], *, into: str = "int8") -> ExpandedModel:
    """Expand the 8-bit floats of a model, such as one of the recipes fp8-e4m3 and fp8-e5m2, for a CPU.

    Args:
        source: the .onnx file or its folder.
        into: "int8" rounds weights of products once more, to 8 bits in blocks of 32 for the fast kernel, which adds
            a twentieth to the error of E4M3; other weights become float32. "float32" is exact, and as large and slow
            as the model was.

    Rows that are looked up in 8-bit floats stay: few are expanded at a time. Weights in `initializers` are as large
    as they will be in memory; what a file saves, only the disk saves.

    Raises:
        InvalidSettingError: an unknown `into`, or a model without 8-bit floats.
        CorruptModelError: the model is damaged.
    """
    if into not in ("int8", "float32"):
        raise InvalidSettingError(f"into must be 'int8' or 'float32', got {into!r}")
    model = _Expanded(source)
    graph = Graph(model)
    target = _Memory(model, graph)
    found = find(model, graph, smallest=1)
    products = [product for product in found.products if product.weight in model.stored]
    if into == "int8":
        work = found._replace(products=products, lookups=[])
        _Untold(model, graph, work, RECIPES["int8-block32"], target, lambda _stage, _done: None).run([])
    proto = target.model()
    nodes = frozenset(product.name for product in products)
    return ExpandedModel(proto.SerializeToString(), target.arrays, model.path.parent, nodes)


class _Untold(Blocks):
    """Rounds without measuring what was lost, which takes seven times as long."""

    def tell(self, weight: str, node: str, stored: str, exact: Array, kept: Array, size: int) -> None:
        """Nobody asks."""

    def tell_again(self, weight: str, node: str, stored: str) -> None:
        """Nobody asks."""


class _Expanded(Source):
    """A source that has float initializers where it had DequantizeLinear of 8-bit floats.

    Attributes:
        stored: of each, the codes, the scales and the axis of the scales.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        super().__init__(source)
        self.stored: dict[str, tuple[Any, Any, int]] = {}
        kept = []
        for node in self.proto.graph.node:
            codes = self.tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            scale = self.tensors.get(node.input[1]) if codes is not None else None
            if codes is None or scale is None or codes.data_type not in _DECODERS:
                kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
                continue
            name = node.output[0]
            self.stored[name] = (codes, scale, attribute(node, "axis", 1))
            self.tensors[name] = TensorProto(name=name, dims=codes.dims, data_type=TensorProto.FLOAT)
            self.proto.graph.initializer.append(self.tensors[name])
        if not self.stored:
            raise InvalidSettingError(f"{self.path} holds no weights that are stored as 8-bit floats")
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(kept)

    def values(self, tensor: Any) -> Array:
        """The values, expanded where they are stored as 8-bit floats."""
        if tensor.name not in self.stored:
            return super().values(tensor)
        codes, scale, axis = self.stored[tensor.name]
        data = self.external_bytes(codes) if codes.data_location == TensorProto.EXTERNAL else codes.raw_data
        steps = super().values(scale)
        shape = tuple(codes.dims)
        try:
            values = _DECODERS[codes.data_type](np.frombuffer(data, np.uint8).reshape(shape))
            if steps.ndim == 1:
                steps = steps.reshape([-1 if place == axis % len(shape) else 1 for place in range(len(shape))])
            expanded: Array = values * steps.astype(np.float32)
        except (ValueError, ZeroDivisionError) as error:
            raise CorruptModelError(self.path, f"tensor {codes.name!r} does not fit its scales: {error}") from error
        return expanded


class _Memory(Target):
    """A target whose large initializers stay in memory, and whose source's files stay in use.

    Attributes:
        arrays: the initializers.
    """

    def __init__(self, source: Source, graph: Graph) -> None:
        super().__init__(source, graph)
        self.arrays: dict[str, Array] = {}
        self._expanded = source

    def keep(self, tensor: Any) -> None:
        """Leave it where it is, unless it has to be expanded."""
        assert isinstance(self._expanded, _Expanded)
        if tensor.name in self._expanded.stored:
            values = self._expanded.values(tensor)
            self.add(tensor.name, values.shape, TensorProto.FLOAT, values.tobytes())
        else:
            self.take_over(tensor)

    def _put_aside(self, tensor: Any, data: bytes) -> None:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        self.arrays[tensor.name] = np.frombuffer(data, kind).reshape(tuple(tensor.dims))
        place_outside(tensor, _IN_MEMORY, 0, len(data))
