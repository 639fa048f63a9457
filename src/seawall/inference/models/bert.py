"""What a BERT sentence encoder on disk says about itself, in the layout of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seawall.inference.errors import CorruptModelError

from .safetensors_file import SafetensorsFile, Weights

WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
FILES = (
    WEIGHTS_FILE, "config.json", "modules.json", TOKENIZER_FILE, "sentence_bert_config.json", "1_Pooling/config.json",
)  # fmt: skip
_MAX_JSON = 1 << 20
_MODULES = ("Transformer", "Pooling", "Normalize")
_LIMITS = {  # of what a hostile header may claim; the weights have to match in any case
    "hidden_size": 16_384, "num_hidden_layers": 256, "num_attention_heads": 256, "intermediate_size": 65_536,
    "vocab_size": 1 << 20, "max_position_embeddings": 65_536, "type_vocab_size": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BertConfig:
    """Sizes of a BERT encoder, and how its tokens become one vector.

    Attributes:
        pooling: "mean" over the text's tokens, or "cls", the first one.
        normalize: whether vectors are scaled to length 1.
        max_tokens: longest text the model was trained for, its two marks included; at most `positions`.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    types: int
    epsilon: float
    pooling: str
    normalize: bool
    max_tokens: int


def read_config(files: Mapping[str, Path]) -> BertConfig:
    """Read and check the JSON files; whatever is not exactly understood is a CorruptModelError."""
    path = files["config.json"]
    config = _json_object(path)
    expected = {"model_type": "bert", "hidden_act": "gelu"}
    absolute = config.get("position_embedding_type", "absolute")
    if absolute != "absolute" or any(config.get(key) != value for key, value in expected.items()):
        raise CorruptModelError(path, "only BERT with exact GELU and absolute positions is read")
    sizes = {key: _natural(config, key, limit, path) for key, limit in _LIMITS.items()}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise CorruptModelError(path, "hidden_size is not a multiple of num_attention_heads")
    epsilon = config.get("layer_norm_eps", 1e-12)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise CorruptModelError(path, f"layer_norm_eps is {epsilon!r}")
    limits = files["sentence_bert_config.json"]
    positions = sizes["max_position_embeddings"]
    return BertConfig(
        hidden=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        intermediate=sizes["intermediate_size"],
        vocabulary=sizes["vocab_size"],
        positions=positions,
        types=sizes["type_vocab_size"],
        epsilon=epsilon,
        pooling=_pooling(files["1_Pooling/config.json"]),
        normalize=_normalizes(files["modules.json"]),
        max_tokens=_natural(_json_object(limits), "max_seq_length", positions, limits),
    )


def _pooling(path: Path) -> str:
    modes = [key for key, value in _json_object(path).items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise CorruptModelError(path, f"its pooling is {modes}; only one of {', '.join(known)} is read")
    return known[modes[0]]


def _normalizes(path: Path) -> bool:
    modules = _read_json(path)
    try:
        names = tuple(module["type"].rpartition(".")[2] for module in modules)
    except (TypeError, KeyError, AttributeError) as error:
        raise CorruptModelError(path, "it is no list of modules") from error
    if names not in {_MODULES, _MODULES[:2]}:
        raise CorruptModelError(path, f"its modules are {names}; only {_MODULES} or {_MODULES[:2]} are read")
    return names == _MODULES


def _natural(config: dict[str, Any], key: str, limit: int, path: Path) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= limit:
        raise CorruptModelError(path, f"{key} is {value!r}, expected 1 to {limit}")
    return value


def _json_object(path: Path) -> dict[str, Any]:
    found = _read_json(path)
    if not isinstance(found, dict):
        raise CorruptModelError(path, "it is no JSON object")
    return found


def _read_json(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return json.loads(file.read(_MAX_JSON))
    except OSError as error:
        raise CorruptModelError(path, f"it cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptModelError(path, f"it is no JSON: {error}") from error


class BertWeights:
    """The tensors of an encoder by their role; each is read when asked for, and has the shape that the config says."""

    def __init__(self, file: SafetensorsFile, config: BertConfig) -> None:
        self._file = file
        self._config = config
        self._prefix = "bert." if "bert.embeddings.word_embeddings.weight" in file.tensors else ""

    def words(self) -> Weights:
        """Embedding of each token, [vocabulary, hidden]."""
        return self._floats("embeddings.word_embeddings.weight", self._config.vocabulary, self._config.hidden)

    def positions(self) -> Weights:
        """What is added at each position of a text of one sentence, [positions, hidden]."""
        places = self._floats("embeddings.position_embeddings.weight", self._config.positions, self._config.hidden)
        types = self._floats("embeddings.token_type_embeddings.weight", self._config.types, self._config.hidden)
        added: Weights = places + types[0]
        return added

    def norm(self, name: str) -> tuple[Weights, Weights]:
        """Scale and shift of a LayerNorm."""
        return self.vector(f"{name}.weight", self._config.hidden), self.vector(f"{name}.bias", self._config.hidden)

    def vector(self, name: str, size: int) -> Weights:
        """A tensor of one dimension."""
        return self._floats(name, size)

    def linear(self, name: str, inputs: int, outputs: int) -> tuple[Weights, Weights]:
        """Weights [inputs, outputs], as MatMul takes them, and bias [outputs]."""
        return self._floats(f"{name}.weight", outputs, inputs).T, self.vector(f"{name}.bias", outputs)

    def _floats(self, name: str, *shape: int) -> Weights:
        return self._file.floats(self._prefix + name, shape)
