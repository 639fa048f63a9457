"""An ONNX model on disk as it is read: the graph first, each weight when its turn comes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from seawall.inference.errors import CorruptModelError, InvalidSettingError, MissingExtraError, NotFiniteError
from seawall.inference.models.cache import MANIFEST, read_verified

from .layout import Array, not_finite

try:
    import onnx
    from onnx import TensorProto, numpy_helper
except ImportError as error:
    raise MissingExtraError(error.name or "onnx") from error

__all__ = ["MODEL", "TOKENIZER", "Source", "TensorProto", "onnx"]  # the others import onnx from here

MODEL = "model.onnx"
TOKENIZER = "tokenizer.json"


class Source:
    """A model to quantize.

    Attributes:
        path: its .onnx file.
        folder: the prepared folder that it lies in, or None for a file alone.
        facts: what the folder's manifest says; empty for a file alone.
        proto: the graph, without external data.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        given = Path(source).expanduser()
        self.folder = given if given.is_dir() else None
        self.path = given / MODEL if self.folder else given
        if not self.path.is_file():
            raise InvalidSettingError(
                f"source must be an .onnx file, or a folder that holds {MODEL}, got {str(given)!r}"
            )
        self.facts = _facts(given)
        try:
            self.proto: Any = onnx.load(self.path, load_external_data=False)
        except Exception as error:  # protobuf's DecodeError, and whatever a hostile file brings about
            raise CorruptModelError(self.path, f"it is no ONNX model: {error}") from error
        if not self.proto.graph.node:
            raise CorruptModelError(self.path, "it holds no graph")
        _constants_to_initializers(self.proto.graph)
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self._external: dict[str, Path] = {}

    @property
    def opset(self) -> int:
        """Version of the standard operators that it is written in."""
        return next((one.version for one in self.proto.opset_import if one.domain in ("", "ai.onnx")), 1)

    def array(self, name: str) -> Array:
        """The values of an initializer."""
        return self.values(self.tensors[name])

    def values(self, tensor: Any) -> Array:
        """The values of a tensor of the model, wherever they are stored."""
        try:
            if tensor.data_location == TensorProto.EXTERNAL:
                inline = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
                inline.raw_data = self.external_bytes(tensor)
                tensor = inline
            values: Array = numpy_helper.to_array(tensor)
        except CorruptModelError:
            raise
        except Exception as error:  # wrong lengths, unknown types: numpy and onnx raise what they like
            raise CorruptModelError(self.path, f"tensor {tensor.name!r} cannot be read: {error}") from error
        return values

    def weights(self, name: str) -> Array:
        """The values of a float initializer as float32, all finite.

        Raises NotFiniteError with the tensor's name.
        """
        values = self.array(name)
        if not np.isfinite(values).all():
            found = not_finite(values)
            raise NotFiniteError(found.count, found.index, name)
        return np.asarray(values, np.float32)

    def digest(self) -> str:
        """SHA-256 over the digests of the .onnx file and of each file of external data."""
        digest = hashlib.sha256()
        for path in self.files():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def files(self) -> list[Path]:
        """The .onnx file, and those of its external data."""
        locations = sorted({_entry(tensor, "location") for tensor in self.tensors.values() if _is_external(tensor)})
        return [self.path, *(self._checked(location) for location in locations)]

    def other_files(self) -> list[Path]:
        """Files of the folder that belong to the model but are no part of the graph, such as the tokenizer."""
        if self.folder is None:
            return []
        return [path for path in (self.folder / TOKENIZER,) if path.is_file()]

    def external_bytes(self, tensor: Any) -> bytes:
        """The bytes of a tensor that is stored beside the graph, as many as its type and shape take."""
        path = self._checked(_entry(tensor, "location"))
        try:
            offset, length = int(_entry(tensor, "offset") or 0), int(_entry(tensor, "length") or -1)
        except ValueError as error:
            raise CorruptModelError(self.path, f"tensor {tensor.name!r} has no usable place in {path.name}") from error
        size = path.stat().st_size
        if length < 0:
            length = size - offset
        if offset < 0 or length < 0 or offset + length > size:
            raise CorruptModelError(
                self.path, f"tensor {tensor.name!r} is said to end at byte {offset + length} of {path.name}, of {size}"
            )
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def _checked(self, location: str) -> Path:
        """The file of external data, which must lie in the model's own folder: a file is no licence to read others."""
        if location not in self._external:
            base = self.path.parent
            path = base / location
            if (
                not location
                or Path(location).is_absolute()
                or ".." in Path(location).parts
                or not path.resolve().is_relative_to(base.resolve())
            ):
                raise CorruptModelError(self.path, f"its data lies outside its folder, at {location!r}")
            if not path.is_file():
                raise CorruptModelError(self.path, f"its data file {location!r} is missing")
            self._external[location] = path
        return self._external[location]


def _constants_to_initializers(graph: Any) -> None:
    """Constant nodes that hold a tensor become initializers, which is the same in one place less."""
    kept = []
    for node in graph.node:
        values = [one.t for one in node.attribute if one.name == "value" and one.type == onnx.AttributeProto.TENSOR]
        if node.op_type == "Constant" and not node.domain and values and node.output:
            graph.initializer.add().CopyFrom(values[0])
            graph.initializer[-1].name = node.output[0]
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)


def _facts(given: Path) -> dict[str, Any]:
    if not (given.is_dir() and (given / MANIFEST).is_file()):
        return {}
    facts = read_verified(given)
    if facts is None:
        raise CorruptModelError(given, "its files do not match its manifest: prepare it again")
    return facts


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _entry(tensor: Any, key: str) -> str:
    return next((str(entry.value) for entry in tensor.external_data if entry.key == key), "")
