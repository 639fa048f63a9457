"""Writes a Llama model as an ONNX graph of ten nodes per layer.

Inputs (B sequences, S new tokens each, L positions of cache, M rows of logits wanted):

    input_ids      int64 [B, S]
    seqlens_k      int32 [B]       tokens in the cache after this run, minus 1
    total_len      int32 scalar    the longest of them, not minus 1
    logit_rows     int64 [M]       rows of the flattened [B * S] hidden states to project to logits
    past.i.k/.v    float [B, kv_heads, L, head_size]

Outputs: logits float [M, vocabulary], and present.i.k/.v, to be bound to the memory of past.i.k/.v.
Rows are picked before the projection to the vocabulary, which is a fifth of all the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from seawall.inference.errors import MissingExtraError

from .gguf_file import GGUFFile
from .llama import LayerWeights, LlamaConfig, layer_weights, rotary_tables
from .lossless import BLOCK, Blocks, adopt_q4, copies
from .onnx_writer import CONTRIB, WEIGHTS, OnnxWriter, floats, integers
from .packing import Array, PackedWeight, adopt_q8, pack

try:
    from onnx import TensorProto, ValueInfoProto, helper
except ImportError as error:
    raise MissingExtraError(error.name or "onnx") from error

_INT8_ACTIVATIONS = 4  # accuracy_level; any other dequantises first and decodes about 15 times slower


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights are stored.

    Attributes:
        bits: per weight; None keeps float32.
        block: inputs that share a scale.
        head_block: the same in the output projection, whose weights have 8 bits in every recipe but float32.
        lossless: 4-bit blocks of the file are taken over; what the file stores in more bits gets 8.
        float8: weights are stored as 8-bit floats, "e4m3" or "e5m2", one scale per output, and expanded at load.
        meaning: in a few words.
    """

    bits: int | None
    block: int = 64
    head_block: int = 64
    lossless: bool = False
    float8: str = ""
    meaning: str = ""


RECIPES: dict[str, Recipe] = {
    "int8": Recipe(8, meaning="8-bit weights, one scale per 64: near-lossless"),
    "int8-block32": Recipe(8, 32, 32, meaning="8-bit weights, one scale per 32: the careful choice"),
    "int4": Recipe(4, 32, 32, lossless=True, meaning="the file's own 4-bit blocks, taken over: small, fast, no loss"),
    "int4-rtn": Recipe(4, 32, meaning="4-bit weights, rounded plainly: lossy"),
    "fp8-e4m3": Recipe(8, float8="e4m3", meaning="8-bit floats on disk, expanded at load: a format, not a speed"),
    "fp8-e5m2": Recipe(8, float8="e5m2", meaning="8-bit floats of more range and less precision"),
    "fp32": Recipe(None, meaning="the reference: the source's values, expanded"),
}


def write_graph(
    folder: Path,
    gguf: GGUFFile,
    config: LlamaConfig,
    recipe: Recipe,
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Write the model to `folder`, layer by layer; at most two layers are in memory as float32."""
    with (folder / WEIGHTS).open("wb") as file:
        writer = _LlamaWriter(file, config, recipe)
        writer.rotary()
        if recipe.lossless:
            writer.tensor("in_blocks", np.array([0, 0, -1, BLOCK], dtype=np.int64))
            writer.tensor("last_axis", np.array([3], dtype=np.int64))
        embedding = writer.embedding(gguf)
        hidden = "embedded"
        weights = layer_weights(gguf, config, 0, blocks=recipe.lossless)
        normed = writer.first_norm(hidden, weights.attention_norm)
        for layer in range(config.layers):
            last = layer + 1 == config.layers
            following = None if last else layer_weights(gguf, config, layer + 1, blocks=recipe.lossless)
            next_norm = following.attention_norm if following else gguf.dequantized("output_norm.weight")
            hidden, normed = writer.layer(layer, hidden, normed, weights, next_norm)
            weights = following or weights
            progress((layer + 1) / (config.layers + 2))
        writer.head(gguf, normed, embedding)
        writer.save(folder, "llama", *writer.ports())
    progress(1.0)


class _LlamaWriter(OnnxWriter):
    """The nodes of a Llama."""

    def __init__(self, file: BinaryIO, config: LlamaConfig, recipe: Recipe) -> None:
        super().__init__(file)
        self._config = config
        self._recipe = recipe

    def rotary(self) -> None:
        cosines, sines = rotary_tables(self._config)
        self.tensor("rotary.cos", cosines)
        self.tensor("rotary.sin", sines)

    def embedding(self, gguf: GGUFFile) -> PackedWeight | None:
        """Add the lookup of `input_ids`; gives the table where it is packed.

        A quantised recipe keeps the table as the source has it where that is 8-bit already.
        """
        if self._recipe.float8:
            table, scale = self._float8("embedding", gguf.dequantized("token_embd.weight"))
            self.tensor("embedding.rows", scale[:, None])
            self.node(
                "GatherBlockQuantized", [table, "input_ids", "embedding.rows"], "embedded", CONTRIB,
                block_size=max(16, 1 << (self._config.hidden - 1).bit_length()), gather_axis=0, quantize_axis=1,
            )  # fmt: skip
            return None
        stored = gguf.quantized_q8("token_embd.weight") if self._recipe.bits else None
        if stored is None and not self._recipe.lossless:
            self.tensor("embedding", gguf.dequantized("token_embd.weight"))
            self.node("Gather", ["embedding", "input_ids"], "embedded")
            return None
        packed = adopt_q8(*stored) if stored else pack(gguf.dequantized("token_embd.weight"), bits=8, block=32)
        self.tensor("embedding.q", packed.data.reshape(packed.rows, -1))
        self.tensor("embedding.s", packed.scales)
        self.node(
            "GatherBlockQuantized", ["embedding.q", "input_ids", "embedding.s"], "embedded", CONTRIB,
            bits=8, block_size=32, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        return packed

    def first_norm(self, hidden: str, scale: Array) -> str:
        self.tensor("norm.0", scale)
        return self.node("SimplifiedLayerNormalization", [hidden, "norm.0"], "normed.0",
                         axis=-1, stash_type=1, epsilon=self._config.epsilon)  # fmt: skip

    def layer(self, layer: int, hidden: str, normed: str, weights: LayerWeights, next_norm: Array) -> tuple[str, str]:
        """Add one layer; returns the names of the residual stream and of its normalised form."""
        at = f"layer.{layer}"
        qkv = self._linear(f"{at}.qkv", normed, weights.qkv)
        attended = self._attention(layer, qkv)
        projected = self._linear(f"{at}.out", attended, weights.attention_out)
        hidden, normed = self._add_and_norm(f"{at}.mlp", hidden, projected, weights.mlp_norm)
        gate_up = self._linear(f"{at}.gate_up", normed, weights.gate_up)
        self.node("Split", [gate_up], [f"{at}.gate", f"{at}.up"], axis=-1, num_outputs=2)
        self.node("QuickGelu", [f"{at}.gate"], f"{at}.silu", CONTRIB, alpha=1.0)  # alpha 1 is SiLU
        self.node("Mul", [f"{at}.silu", f"{at}.up"], f"{at}.gated")
        lowered = self._linear(f"{at}.down", f"{at}.gated", weights.down)
        return self._add_and_norm(f"{at}.end", hidden, lowered, next_norm)

    def _attention(self, layer: int, qkv: str) -> str:
        config = self._config
        inputs = [qkv, "", "", f"past.{layer}.k", f"past.{layer}.v", "seqlens_k", "total_len",
                  "rotary.cos", "rotary.sin"]  # fmt: skip
        return self.node(
            "GroupQueryAttention", inputs, [f"layer.{layer}.attended", f"present.{layer}.k", f"present.{layer}.v"],
            CONTRIB, num_heads=config.heads, kv_num_heads=config.kv_heads, do_rotary=1, rotary_interleaved=0,
            scale=config.head_size**-0.5,
        )  # fmt: skip

    def _add_and_norm(self, name: str, hidden: str, added: str, scale: Array) -> tuple[str, str]:
        self.tensor(f"{name}.norm", scale)
        normed = self.node(
            "SkipSimplifiedLayerNormalization", [hidden, added, f"{name}.norm"],
            [f"{name}.normed", "", "", f"{name}.sum"], CONTRIB, epsilon=self._config.epsilon,
        )  # fmt: skip
        return f"{name}.sum", normed

    def head(self, gguf: GGUFFile, normed: str, embedding: PackedWeight | None) -> None:
        """Add the projection of the wanted rows to the vocabulary; `embedding` is what `embedding` gave."""
        self.tensor("flat", np.array([-1, self._config.hidden], dtype=np.int64))
        self.node("Reshape", [normed, "flat"], "rows")
        self.node("Gather", ["rows", "logit_rows"], "wanted")
        name = "token_embd.weight" if self._config.tied else "output.weight"
        if self._recipe.float8:
            table = "embedding" if self._config.tied else "head"
            if not self._config.tied:
                self._float8(table, gguf.dequantized(name))
            self.node("DequantizeLinear", [f"{table}.f8", f"{table}.scale"], f"{table}.table", axis=0)
            self.node("Gemm", ["wanted", f"{table}.table"], "logits", transB=1)
            return
        if self._recipe.bits is None:
            if not self._config.tied:
                self.tensor("head", gguf.dequantized(name))
            self.node("Gemm", ["wanted", "embedding" if self._config.tied else "head"], "logits", transB=1)
            return
        block = self._recipe.head_block
        if self._config.tied and embedding is not None and block == embedding.block:
            data = self.reshaped("head.q", "embedding.q", embedding.data.shape)
            self._product("wanted", data, "embedding.s", embedding, "logits")
            return
        stored = gguf.quantized_q8(name) if block == BLOCK else None
        packed = adopt_q8(*stored) if stored else pack(gguf.dequantized(name), bits=8, block=block)
        self._packed("head", "wanted", packed, "logits")

    def _linear(self, name: str, source: str, matrix: Array | Blocks) -> str:
        output = f"{name}.y"
        if isinstance(matrix, Blocks):
            repeated = copies(matrix.scales.shape[1])
            blocks = self.node("Reshape", [source, "in_blocks"], f"{name}.blocks")
            means = self.node("ReduceMean", [blocks, "last_axis"], f"{name}.means", keepdims=0)
            extended = self.node("Concat", [source, *[means] * repeated], f"{name}.x", axis=-1)
            return self._packed(name, extended, adopt_q4(matrix), output)
        if self._recipe.float8:
            stored, _ = self._float8(name, matrix)
            self.node("DequantizeLinear", [stored, f"{name}.scale"], f"{name}.w", axis=0)
            return self.node("MatMul", [source, self.node("Transpose", [f"{name}.w"], f"{name}.t")], output)
        if self._recipe.bits is None:
            self.tensor(name, np.ascontiguousarray(matrix.T))
            return self.node("MatMul", [source, name], output)
        bits = 8 if self._recipe.lossless else self._recipe.bits
        return self._packed(name, source, pack(matrix, bits=bits, block=self._recipe.block), output)

    def _float8(self, name: str, matrix: Array) -> tuple[str, Array]:
        """Add a matrix [rows, columns] as 8-bit floats, and a scale per row; gives the codes' name, and the scales."""
        from seawall.inference.quantize.float8 import encode_e4m3, encode_e5m2

        encode, largest, kind = {
            "e4m3": (encode_e4m3, 448.0, TensorProto.FLOAT8E4M3FN),
            "e5m2": (encode_e5m2, 57344.0, TensorProto.FLOAT8E5M2),
        }[self._recipe.float8]
        size = np.abs(matrix).max(axis=1)
        scale = np.where(size == 0, 1, np.maximum(size / largest, 1e-30)).astype(np.float32)
        self.tensor(f"{name}.f8", encode(matrix / scale[:, None]), kind)
        self.tensor(f"{name}.scale", scale)
        return f"{name}.f8", scale

    def _packed(self, name: str, source: str, packed: PackedWeight, output: str) -> str:
        data, scales = self.tensor(f"{name}.q", packed.data), self.tensor(f"{name}.s", packed.scales)
        zero = "" if packed.zero_points is None else self.tensor(f"{name}.z", packed.zero_points)
        return self._product(source, data, scales, packed, output, zero)

    def _product(self, source: str, data: str, scales: str, packed: PackedWeight, output: str, zero: str = "") -> str:
        return self.node(
            "MatMulNBits", [source, data, scales, *([zero] if zero else [])], output, CONTRIB,
            K=packed.columns, N=packed.rows, bits=packed.bits, block_size=packed.block,
            accuracy_level=_INT8_ACTIVATIONS,
        )  # fmt: skip

    def ports(self) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
        """The graph's inputs and outputs."""
        config = self._config
        cache: list[int | str] = ["batch", config.kv_heads, "positions", config.head_size]
        names = [f"{layer}.{part}" for layer in range(config.layers) for part in "kv"]
        inputs = [
            integers("input_ids", ["batch", "tokens"]),
            _small("seqlens_k", ["batch"]),
            _small("total_len", []),
            integers("logit_rows", ["wanted"]),
            *(floats(f"past.{name}", cache) for name in names),
        ]
        outputs = [
            floats("logits", ["wanted", config.vocabulary]),
            *(floats(f"present.{name}", cache) for name in names),
        ]
        return inputs, outputs


def _small(name: str, shape: list[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT32, shape)
