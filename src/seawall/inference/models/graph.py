"""Writes a Llama model as an ONNX graph of ten nodes per layer.

Inputs (B sequences, S new tokens each, L positions of cache, M rows of logits wanted):

    input_ids      int64 [B, S]
    seqlens_k      int32 [B]       tokens in the cache after this run, minus 1
    total_len      int32 scalar    the longest of them, not minus 1
    logit_rows     int64 [M]       rows of the flattened [B * S] hidden states to project to logits
    past.i.k/.v    float [B, kv_heads, L, head_size]
    query_seqlens  int32 [B]       only on request: real tokens per row of a right-padded batch

Outputs: logits float [M, vocabulary], and present.i.k/.v, to be bound to the memory of past.i.k/.v.
Rows are picked before the projection to the vocabulary, which is a fifth of all the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from seawall.inference.errors import MissingExtraError

from .gguf_file import GGUFFile
from .llama import LayerWeights, LlamaConfig, layer_weights, rotary_tables
from .packing import Array, PackedWeight, adopt_q8, pack

try:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
    from onnx.helper import np_dtype_to_tensor_dtype
except ImportError as error:
    raise MissingExtraError(error.name or "onnx") from error

MODEL = "model.onnx"
WEIGHTS = "weights.bin"
_ALIGNMENT = 4096  # a page, so that weights are mapped instead of copied
_INLINE = 4096  # bytes; smaller tensors live in the graph file
_CONTRIB = "com.microsoft"
_INT8_ACTIVATIONS = 4  # accuracy_level; any other dequantises first and decodes about 15 times slower


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights are stored. `bits` None keeps float32.

    The embedding of a quantised recipe stays as the source has it where that is 8-bit already.
    """

    bits: int | None
    block: int = 64
    head_block: int = 64
    meaning: str = ""


RECIPES: dict[str, Recipe] = {
    "fp32": Recipe(None, meaning="the reference: the source's values, expanded"),
    "int8": Recipe(8, 64, 64, meaning="8-bit weights, one scale per 64: the fast choice, near-lossless"),
    "int8-block32": Recipe(8, 32, 32, meaning="8-bit weights, one scale per 32: the careful choice"),
    "int4": Recipe(4, 32, 64, meaning="4-bit weights, plain rounding, 8-bit output projection: lossy"),
}


def write_graph(
    folder: Path,
    gguf: GGUFFile,
    config: LlamaConfig,
    recipe: Recipe,
    *,
    query_seqlens: bool = False,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Write the model to `folder`, layer by layer; at most one layer is in memory as float32.

    `query_seqlens` adds the input of that name, which onnxruntime 1.32 needs to run several rows of
    several tokens over existing caches.
    """
    with (folder / WEIGHTS).open("wb") as file:
        writer = _Writer(config, recipe, file, query_seqlens=query_seqlens)
        writer.rotary()
        embedding = writer.embedding(gguf)
        hidden = "embedded"
        weights = layer_weights(gguf, config, 0)
        normed = writer.first_norm(hidden, weights.attention_norm)
        for layer in range(config.layers):
            following = layer_weights(gguf, config, layer + 1) if layer + 1 < config.layers else None
            next_norm = following.attention_norm if following else gguf.dequantized("output_norm.weight")
            hidden, normed = writer.layer(layer, hidden, normed, weights, next_norm)
            weights = following or weights
            progress((layer + 1) / (config.layers + 2))
        writer.head(gguf, normed, embedding)
    (folder / MODEL).write_bytes(writer.model().SerializeToString())
    progress(1.0)


class _Writer:
    """Collects nodes and initializers; large initializers go straight to the weights file."""

    def __init__(self, config: LlamaConfig, recipe: Recipe, file: BinaryIO, *, query_seqlens: bool) -> None:
        self._config = config
        self._recipe = recipe
        self._file = file
        self._query_seqlens = query_seqlens
        self._nodes: list[NodeProto] = []
        self._tensors: list[TensorProto] = []

    def rotary(self) -> None:
        cosines, sines = rotary_tables(self._config)
        self._tensor("rotary.cos", cosines)
        self._tensor("rotary.sin", sines)

    def embedding(self, gguf: GGUFFile) -> Array | None:
        """Add the lookup of `input_ids`; gives the table where the output projection can share it."""
        stored = gguf.quantized_q8("token_embd.weight") if self._recipe.bits else None
        if stored is None:
            table = gguf.dequantized("token_embd.weight")
            self._tensor("embedding", table)
            self._node("Gather", ["embedding", "input_ids"], ["embedded"])
            return table
        packed = adopt_q8(*stored)
        self._tensor("embedding.q", packed.data.reshape(packed.rows, -1))
        self._tensor("embedding.s", packed.scales)
        self._node(
            "GatherBlockQuantized", ["embedding.q", "input_ids", "embedding.s"], ["embedded"], _CONTRIB,
            bits=8, block_size=32, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        return None

    def first_norm(self, hidden: str, scale: Array) -> str:
        self._tensor("norm.0", scale)
        self._node("SimplifiedLayerNormalization", [hidden, "norm.0"], ["normed.0"],
                   axis=-1, stash_type=1, epsilon=self._config.epsilon)  # fmt: skip
        return "normed.0"

    def layer(self, layer: int, hidden: str, normed: str, weights: LayerWeights, next_norm: Array) -> tuple[str, str]:
        """Add one layer; returns the names of the residual stream and of its normalised form."""
        at = f"layer.{layer}"
        qkv = self._linear(f"{at}.qkv", normed, weights.qkv)
        attended = self._attention(layer, qkv)
        projected = self._linear(f"{at}.out", attended, weights.attention_out)
        hidden, normed = self._add_and_norm(f"{at}.mlp", hidden, projected, weights.mlp_norm)
        gate_up = self._linear(f"{at}.gate_up", normed, weights.gate_up)
        self._node("Split", [gate_up], [f"{at}.gate", f"{at}.up"], axis=-1, num_outputs=2)
        self._node("QuickGelu", [f"{at}.gate"], [f"{at}.silu"], _CONTRIB, alpha=1.0)  # alpha 1 is SiLU
        self._node("Mul", [f"{at}.silu", f"{at}.up"], [f"{at}.gated"])
        lowered = self._linear(f"{at}.down", f"{at}.gated", weights.down)
        return self._add_and_norm(f"{at}.end", hidden, lowered, next_norm)

    def _attention(self, layer: int, qkv: str) -> str:
        config = self._config
        output = f"layer.{layer}.attended"
        inputs = [qkv, "", "", f"past.{layer}.k", f"past.{layer}.v", "seqlens_k", "total_len",
                  "rotary.cos", "rotary.sin"]  # fmt: skip
        if self._query_seqlens:
            inputs += [""] * 7 + ["query_seqlens"]
        self._node(
            "GroupQueryAttention", inputs, [output, f"present.{layer}.k", f"present.{layer}.v"], _CONTRIB,
            num_heads=config.heads, kv_num_heads=config.kv_heads, do_rotary=1, rotary_interleaved=0,
            scale=config.head_size**-0.5,
        )  # fmt: skip
        return output

    def _add_and_norm(self, name: str, hidden: str, added: str, scale: Array) -> tuple[str, str]:
        self._tensor(f"{name}.norm", scale)
        self._node(
            "SkipSimplifiedLayerNormalization", [hidden, added, f"{name}.norm"],
            [f"{name}.normed", "", "", f"{name}.sum"], _CONTRIB, epsilon=self._config.epsilon,
        )  # fmt: skip
        return f"{name}.sum", f"{name}.normed"

    def head(self, gguf: GGUFFile, normed: str, shared: Array | None) -> None:
        """Add the projection of the wanted rows to the vocabulary."""
        self._tensor("flat", np.array([-1, self._config.hidden], dtype=np.int64))
        self._node("Reshape", [normed, "flat"], ["rows"])
        self._node("Gather", ["rows", "logit_rows"], ["wanted"])
        name = "token_embd.weight" if self._config.tied else "output.weight"
        if self._recipe.bits is None:
            if not (self._config.tied and shared is not None):
                self._tensor("head", gguf.dequantized(name))
            weight = "embedding" if self._config.tied else "head"
            self._node("Gemm", ["wanted", weight], ["logits"], transB=1)
            return
        stored = gguf.quantized_q8(name) if self._recipe.head_block == 32 else None
        packed = adopt_q8(*stored) if stored else pack(gguf.dequantized(name), bits=8, block=self._recipe.head_block)
        self._packed("head", "wanted", packed, "logits")

    def _linear(self, name: str, source: str, matrix: Array) -> str:
        output = f"{name}.y"
        if self._recipe.bits is None:
            self._tensor(name, np.ascontiguousarray(matrix.T))
            self._node("MatMul", [source, name], [output])
        else:
            packed = pack(matrix, bits=self._recipe.bits, block=self._recipe.block)
            self._packed(name, source, packed, output)
        return output

    def _packed(self, name: str, source: str, packed: PackedWeight, output: str) -> None:
        self._tensor(f"{name}.q", packed.data)
        self._tensor(f"{name}.s", packed.scales)
        self._node(
            "MatMulNBits", [source, f"{name}.q", f"{name}.s"], [output], _CONTRIB,
            K=packed.columns, N=packed.rows, bits=packed.bits, block_size=packed.block,
            accuracy_level=_INT8_ACTIVATIONS,
        )  # fmt: skip

    def _node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> None:
        self._nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))

    def _tensor(self, name: str, array: Array) -> None:
        array = np.ascontiguousarray(array)
        tensor = TensorProto(name=name, dims=array.shape, data_type=np_dtype_to_tensor_dtype(array.dtype))
        if array.nbytes < _INLINE:
            tensor.raw_data = array.tobytes()
        else:
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", WEIGHTS),
                ("offset", self._file.tell()),
                ("length", array.nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
            self._file.write(array.data)
        self._tensors.append(tensor)

    def model(self) -> ModelProto:
        """The finished graph."""
        config = self._config
        cache = ["batch", config.kv_heads, "positions", config.head_size]
        inputs = [
            _value("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            _value("seqlens_k", TensorProto.INT32, ["batch"]),
            _value("total_len", TensorProto.INT32, []),
            _value("logit_rows", TensorProto.INT64, ["wanted"]),
        ]
        if self._query_seqlens:
            inputs.append(_value("query_seqlens", TensorProto.INT32, ["batch"]))
        outputs = [_value("logits", TensorProto.FLOAT, ["wanted", config.vocabulary])]
        for layer in range(config.layers):
            for part in "kv":
                inputs.append(_value(f"past.{layer}.{part}", TensorProto.FLOAT, cache))
                outputs.append(_value(f"present.{layer}.{part}", TensorProto.FLOAT, cache))
        graph = helper.make_graph(self._nodes, "llama", inputs, outputs, self._tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="seawall")


def _value(name: str, kind: int, shape: list[Any]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)
