"""Writes a BERT sentence encoder as an ONNX graph of twelve nodes per layer.

Inputs (B texts, padded to S tokens):

    input_ids       int64 [B, S]
    attention_mask  int64 [B, S]    1 for a token, 0 for padding

Outputs:

    token_embeddings    float [B, S, hidden]    rows of padding hold numbers without a meaning
    sentence_embedding  float [B, hidden]       pooled, and of length 1 where the model normalises

Weights stay inputs of plain MatMul and Gather nodes, so that every quantization recipe finds them; around
them stand ONNX Runtime's fused attention, skip-norm and exact (erf) GELU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .bert import BertConfig, BertWeights
from .onnx_writer import CONTRIB, WEIGHTS, OnnxWriter, floats, integers
from .safetensors_file import SafetensorsFile

_FLOAT, _INT32 = 1, 6  # TensorProto's numbers of the types


def write_graph(
    folder: Path, file: SafetensorsFile, config: BertConfig, *, progress: Callable[[float], None] = lambda _: None
) -> None:
    """Write the model to `folder`, layer by layer; at most one matrix is in memory at a time."""
    weights = BertWeights(file, config)
    with (folder / WEIGHTS).open("wb") as target:
        graph = _Encoder(OnnxWriter(target), weights, config)
        hidden = graph.embeddings()
        for layer in range(config.layers):
            hidden = graph.layer(layer, hidden)
            progress((layer + 1) / (config.layers + 1))
        graph.pool(hidden)
        graph.save(folder)
    progress(1.0)


class _Encoder:
    def __init__(self, writer: OnnxWriter, weights: BertWeights, config: BertConfig) -> None:
        self._to = writer
        self._weights = weights
        self._config = config

    def embeddings(self) -> str:
        """Look up tokens, add positions, normalise."""
        to, weights = self._to, self._weights
        words = to.node("Gather", [to.tensor("words", weights.words()), "input_ids"], "embedded")
        length = to.node("Shape", ["input_ids"], "length", start=1, end=2)
        zero = to.tensor("zero", np.zeros(1, np.int64))
        places = to.node("Slice", [to.tensor("positions", weights.positions()), zero, length, zero], "places")
        placed = to.node("Add", [words, places], "placed")
        to.node("Cast", ["attention_mask"], "mask_int32", to=_INT32)
        scale, shift = self._norm("embeddings.LayerNorm")
        return to.node("LayerNormalization", [placed, scale, shift], "normed", axis=-1, epsilon=self._config.epsilon)

    def layer(self, layer: int, hidden: str) -> str:
        """Add one layer; gives the name of its output."""
        at, size = f"encoder.layer.{layer}", self._config.hidden
        projected, biases = [], []
        for role in ("query", "key", "value"):
            matrix, bias = self._weights.linear(f"{at}.attention.self.{role}", size, size)
            projected.append(self._matmul(f"{at}.{role}", hidden, matrix))
            biases.append(bias)
        attended = self._to.node(
            "MultiHeadAttention",
            [*projected, self._to.tensor(f"{at}.qkv.bias", np.concatenate(biases)), "mask_int32"],
            f"{at}.attended", CONTRIB, num_heads=self._config.heads,
        )  # fmt: skip
        hidden = self._linear_and_norm(f"{at}.attention.output", attended, hidden, size)
        matrix, bias = self._weights.linear(f"{at}.intermediate.dense", size, self._config.intermediate)
        wide = self._matmul(f"{at}.up", hidden, matrix)
        active = self._to.node("BiasGelu", [wide, self._to.tensor(f"{at}.up.bias", bias)], f"{at}.gelu", CONTRIB)
        return self._linear_and_norm(f"{at}.output", active, hidden, self._config.intermediate)

    def pool(self, hidden: str) -> None:
        """Add the vector of each text."""
        to = self._to
        to.node("Identity", [hidden], "token_embeddings")
        if self._config.pooling == "cls":
            pooled = to.node("Gather", [hidden, to.tensor("first", np.array(0, np.int64))], "pooled", axis=1)
        else:
            mask = to.node("Cast", ["attention_mask"], "mask", to=_FLOAT)
            along = to.tensor("along", np.array([1], np.int64))
            last = to.tensor("last", np.array([2], np.int64))
            kept = to.node("Mul", [hidden, to.node("Unsqueeze", [mask, last], "mask_column")], "kept")
            summed = to.node("ReduceSum", [kept, along], "summed", keepdims=0)
            count = to.node("ReduceSum", [mask, along], "count", keepdims=1)
            pooled = to.node("Div", [summed, self._at_least("counted", count, 1e-9)], "pooled")
        if self._config.normalize:
            length = to.node("ReduceL2", [pooled, to.tensor("across", np.array([1], np.int64))], "norm", keepdims=1)
            to.node("Div", [pooled, self._at_least("positive", length, 1e-12)], "sentence_embedding")
        else:
            to.node("Identity", [pooled], "sentence_embedding")

    def save(self, folder: Path) -> None:
        """Write the graph file."""
        ids, size = ["batch", "tokens"], self._config.hidden
        inputs = [integers("input_ids", ids), integers("attention_mask", ids)]
        outputs = [floats("token_embeddings", [*ids, size]), floats("sentence_embedding", ["batch", size])]
        self._to.save(folder, "sentence-encoder", inputs, outputs)

    def _matmul(self, name: str, source: str, matrix: np.ndarray) -> str:
        return self._to.node("MatMul", [source, self._to.tensor(f"{name}.weight", matrix)], f"{name}.matmul")

    def _linear_and_norm(self, at: str, source: str, skip: str, inputs: int) -> str:
        matrix, bias = self._weights.linear(f"{at}.dense", inputs, self._config.hidden)
        product = self._matmul(f"{at}.dense", source, matrix)
        norm = self._norm(f"{at}.LayerNorm")
        return self._to.node(
            "SkipLayerNormalization", [product, skip, *norm, self._to.tensor(f"{at}.dense.bias", bias)],
            f"{at}.normed", CONTRIB, epsilon=self._config.epsilon,
        )  # fmt: skip

    def _norm(self, name: str) -> tuple[str, str]:
        scale, shift = self._weights.norm(name)
        return self._to.tensor(f"{name}.scale", scale), self._to.tensor(f"{name}.shift", shift)

    def _at_least(self, name: str, value: str, least: float) -> str:
        return self._to.node("Max", [value, self._to.tensor(f"{name}.least", np.array(least, np.float32))], name)
