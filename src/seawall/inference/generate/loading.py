"""From a prepared folder to a session: the graph as it is on disk, or changed on its way into memory."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seawall.inference.errors import CorruptModelError, MissingExtraError, RuntimeMisuseError
from seawall.inference.models.catalogue import CATALOGUE
from seawall.inference.models.chat import ChatTemplate
from seawall.inference.models.convert import PreparedModel
from seawall.inference.models.kv_cache import cache_width, with_quantized_cache, with_query_seqlens
from seawall.inference.models.tokenizer import TextCodec
from seawall.inference.runtime import ort

from .calibration import calibrated_scales, load_scales, save_scales
from .slot import Array

MODEL = "model.onnx"
_SIZES = ("layers", "kv_heads", "head_size", "vocabulary", "context")
_FLOAT8 = ("fp8-e4m3", "fp8-e5m2")
_FACTS = {"model": str, "precision": str, "end_tokens": list, "chat_template": str}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A session and what is known about its graph.

    Attributes:
        session: ready to run.
        operators: how many nodes of each kind the graph has, before ONNX Runtime's own rewrites.
        expanded: nodes whose weights are stored as 8-bit floats and were turned into something fast.
    """

    session: ort.Session
    operators: Mapping[str, int]
    expanded: int


class _Graph:
    """A decoder's graph on its way into memory."""

    def __init__(self, model: PreparedModel, threads: int) -> None:
        onnx = _onnx()
        self._path = model.folder / MODEL
        self._threads = threads
        self.arrays: Mapping[str, Array] = {}
        self.expanded = 0
        self._changed = storage_of(model.facts) in _FLOAT8
        if self._changed:
            from seawall.inference.quantize import expand_fp8

            found = expand_fp8(self._path)
            self.arrays, self.expanded = found.initializers, len(found.nodes)
            self.proto = onnx.load_model_from_string(found.model)
            return
        try:
            self.proto = onnx.load(self._path, load_external_data=False)
        except Exception as error:  # protobuf's DecodeError, and whatever a hostile file brings about
            raise CorruptModelError(self._path, f"it is no ONNX model: {error}") from error

    def change(self, change: Callable[[Any], None]) -> None:
        change(self.proto)
        self._changed = True

    def open_ragged(self) -> ort.Session:
        """A session that takes `query_seqlens`; before ONNX Runtime 1.32 one without."""
        plain = copy.deepcopy(self.proto), self._changed
        self.change(with_query_seqlens)
        try:
            return self.open()
        except RuntimeMisuseError:
            self.proto, self._changed = plain
            return self.open()

    def open(self) -> ort.Session:
        if not self._changed:
            return ort.build_session(self._path, threads=self._threads)
        source, folder = self.proto.SerializeToString(), self._path.parent
        return ort.build_session(source, threads=self._threads, folder=folder, initializers=self.arrays)


def open_decoder(model: PreparedModel, *, threads: int, kv: str, codec: TextCodec, template: ChatTemplate) -> Loaded:
    """Load a prepared decoder with a cache of kind `kv`, and for ragged batches where ONNX Runtime knows them."""
    graph = _Graph(model, threads)

    def measured() -> Array:
        session = graph.open()
        _check_ports(session, model, "fp32")
        return calibrated_scales(session, model.facts["config"], codec, template, kv)

    if kv != "fp32":
        scales = _scales(model, kv, measured)
        graph.change(lambda proto: with_quantized_cache(proto, scales, kv))
    operators = Counter(node.op_type for node in graph.proto.graph.node)
    session = graph.open_ragged()
    _check_ports(session, model, kv)
    return Loaded(session, operators, graph.expanded)


def _check_ports(session: ort.Session, model: PreparedModel, kv: str) -> None:
    """The graph has to be of the shape that its manifest tells: caches of another would be written past their end."""
    config = model.facts["config"]
    cache = [config["kv_heads"], cache_width(kv, config["head_size"])]
    expected = {f"past.{layer}.{part}": cache for layer in range(config["layers"]) for part in "kv"}
    inputs = {port.name: port.shape for port in session.get_inputs()}
    found = {
        name: [shape[1], shape[3]] for name, shape in inputs.items() if name.startswith("past.") and len(shape) == 4
    }
    missing = {"input_ids", "seqlens_k", "total_len", "logit_rows"} - inputs.keys()
    logits = [port.shape[-1] for port in session.get_outputs() if port.name == "logits"]
    if found != expected or missing or logits != [config["vocabulary"]]:
        raise CorruptModelError(
            model.folder / MODEL, "its inputs and outputs are not those of the decoder in its manifest"
        )


def storage_of(facts: Mapping[str, Any]) -> str | None:
    """How a prepared folder says that its weights are stored, where a loader has to know."""
    told = facts.get("quantization")
    return told.get("storage") if isinstance(told, dict) else None


def as_folder(name_or_path: object) -> Path | None:
    """The prepared folder that was meant, or None for a name or a file."""
    if not isinstance(name_or_path, (str, os.PathLike)) or str(name_or_path) in CATALOGUE:
        return None
    try:
        path = Path(name_or_path).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, TypeError, ValueError):  # no path that could exist
        return None


def checked_config(model: PreparedModel) -> dict[str, Any]:
    """The numbers of a prepared decoder; CorruptModelError for a folder that holds something else."""
    facts = model.facts
    config = facts.get("config")
    if not isinstance(config, dict) or "kv_heads" not in config:
        raise CorruptModelError(model.folder, "it holds no decoder: load it with Backend.load")
    wrong = [name for name in _SIZES if type(config.get(name)) is not int or config[name] < 1]
    wrong += [] if isinstance(config.get("rope_base"), float) else ["rope_base"]
    wrong += [name for name, kind in _FACTS.items() if not isinstance(facts.get(name), kind)]
    if not wrong and not all(type(token) is int and 0 <= token < config["vocabulary"] for token in facts["end_tokens"]):
        wrong = ["end_tokens"]
    if wrong:
        raise CorruptModelError(model.folder, f"its manifest says nothing usable about {', '.join(wrong)}")
    return config


def _scales(model: PreparedModel, kv: str, measure: Callable[[], Array]) -> Array:
    config = model.facts["config"]
    shape = (2, config["layers"], config["kv_heads"], config["head_size"])
    if model.cache is None:
        return measure()
    beside = model.cache / f"cache-{kv}-{model.folder.name}"
    scales = load_scales(beside, shape)
    if scales is None:
        scales = measure()
        save_scales(beside, scales)
    return scales


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx") from error
    return onnx
