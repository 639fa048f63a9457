"""Collects the nodes and weights of a graph; large weights go straight to a file beside it, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from seawall.inference.errors import MissingExtraError

try:
    from onnx import NodeProto, TensorProto, ValueInfoProto, helper
    from onnx.helper import np_dtype_to_tensor_dtype
except ImportError as error:
    raise MissingExtraError(error.name or "onnx") from error

MODEL = "model.onnx"
WEIGHTS = "weights.bin"
CONTRIB = "com.microsoft"
_ALIGNMENT = 4096  # a page, so that weights are mapped instead of copied
_INLINE = 4096  # bytes; smaller tensors live in the graph file

Array = np.ndarray[Any, Any]
Shape = Sequence[int | str]


class OnnxWriter:
    """A graph in the making. `file` is the open weights file, `WEIGHTS` in the model's folder."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._nodes: list[NodeProto] = []
        self._tensors: list[TensorProto] = []

    def node(
        self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], domain: str = "", **attributes: Any
    ) -> str:
        """Add a node named like its first output; gives that name."""
        outputs = [outputs] if isinstance(outputs, str) else outputs
        self._nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def tensor(self, name: str, array: Array, kind: int | None = None) -> str:
        """Add a constant, whose type is `kind` of TensorProto where the array holds codes of it; gives its name."""
        array = np.ascontiguousarray(array) if array.ndim else array
        kind = np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
        tensor = TensorProto(name=name, dims=array.shape, data_type=kind)
        if array.nbytes < _INLINE:
            tensor.raw_data = array.tobytes()
        else:
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS), ("offset", self._file.tell()), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            self._file.write(array.data)
        self._tensors.append(tensor)
        return name

    def reshaped(self, name: str, of: str, shape: Sequence[int]) -> str:
        """Add a constant that shares the stored bytes of an earlier one; gives its name."""
        tensor = TensorProto()
        tensor.CopyFrom(next(one for one in self._tensors if one.name == of))
        tensor.name = name
        del tensor.dims[:]
        tensor.dims.extend(shape)
        self._tensors.append(tensor)
        return name

    def save(
        self, folder: Path, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
    ) -> None:
        """Write the graph to `MODEL` in `folder`."""
        graph = helper.make_graph(self._nodes, name, inputs, outputs, self._tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="seawall")
        (folder / MODEL).write_bytes(model.SerializeToString())


def floats(name: str, shape: Shape) -> ValueInfoProto:
    """An input or output of float32."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def integers(name: str, shape: Shape) -> ValueInfoProto:
    """An input or output of int64."""
    return helper.make_tensor_value_info(name, TensorProto.INT64, shape)
