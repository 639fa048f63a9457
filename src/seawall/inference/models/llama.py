"""What a GGUF file must say to be a Llama model, and its weights in the order the graph wants them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from seawall.inference.errors import CorruptModelError

from .gguf_file import GGUFFile, Weights
from .lossless import Blocks, stacked

_LIMITS = {
    "block_count": 512,
    "embedding_length": 32_768,
    "feed_forward_length": 262_144,
    "attention.head_count": 512,
    "attention.head_count_kv": 512,
    "context_length": 1 << 17,
}


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The numbers of a Llama model."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    rope_base: float
    epsilon: float
    tied: bool


def read_config(gguf: GGUFFile) -> LlamaConfig:
    """Read and check the model's numbers; CorruptModelError for another architecture or absurd sizes."""
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "llama":
        raise CorruptModelError(gguf.path, f"its architecture is {architecture!r}; only 'llama' is read")
    sizes = {key: _size(gguf, key, limit) for key, limit in _LIMITS.items()}
    hidden, heads, kv_heads = (
        sizes["embedding_length"],
        sizes["attention.head_count"],
        sizes["attention.head_count_kv"],
    )
    head_size = hidden // heads
    if hidden % heads or heads % kv_heads or head_size % 8 or head_size > 256:
        raise CorruptModelError(
            gguf.path, f"{hidden} channels do not divide into {heads} heads ({kv_heads} for keys and values)"
        )
    _check_rope(gguf, head_size)
    config = LlamaConfig(
        layers=sizes["block_count"],
        hidden=hidden,
        feed_forward=sizes["feed_forward_length"],
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=_vocabulary(gguf),
        context=sizes["context_length"],
        rope_base=_real(gguf, "rope.freq_base", 1.0, 1e9, default=10_000.0),
        epsilon=_real(gguf, "attention.layer_norm_rms_epsilon", 1e-9, 1e-2),
        tied="output.weight" not in gguf.tensors,
    )
    _check_tensors(gguf, config)
    return config


def _size(gguf: GGUFFile, key: str, limit: int) -> int:
    value = gguf.metadata.get(f"llama.{key}")
    if type(value) is not int or not 1 <= value <= limit:
        raise CorruptModelError(gguf.path, f"llama.{key} is {value!r}; it must be from 1 to {limit}")
    return value


def _real(gguf: GGUFFile, key: str, low: float, high: float, default: float | None = None) -> float:
    value = gguf.metadata.get(f"llama.{key}", default)
    if not isinstance(value, float) or not low <= value <= high:
        raise CorruptModelError(gguf.path, f"llama.{key} is {value!r}; it must be from {low} to {high}")
    return value


def _vocabulary(gguf: GGUFFile) -> int:
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CorruptModelError(gguf.path, "it carries no vocabulary")
    return len(tokens)


def _check_rope(gguf: GGUFFile, head_size: int) -> None:
    rotated = gguf.metadata.get("llama.rope.dimension_count", head_size)
    scaling = gguf.metadata.get("llama.rope.scaling.type", "none")
    if rotated != head_size or scaling != "none":
        raise CorruptModelError(
            gguf.path,
            f"rotary positions over {rotated} of {head_size} channels, scaled by {scaling!r}, are not read",
        )


def _check_tensors(gguf: GGUFFile, config: LlamaConfig) -> None:
    """Exactly the expected tensors with exactly the expected shapes: a bias we skipped would be silent."""
    width, kv_width = config.hidden, config.kv_heads * config.head_size
    expected: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocabulary, width),
        "output_norm.weight": (width,),
    }
    if not config.tied:
        expected["output.weight"] = (config.vocabulary, width)
    for layer in range(config.layers):
        for name, shape in {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (kv_width, width),
            "attn_v": (kv_width, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (config.feed_forward, width),
            "ffn_up": (config.feed_forward, width),
            "ffn_down": (width, config.feed_forward),
        }.items():
            expected[f"blk.{layer}.{name}.weight"] = shape
    for name in expected.keys() | gguf.tensors.keys():
        found = gguf.tensors[name].shape if name in gguf.tensors else None
        if found != expected.get(name):
            raise CorruptModelError(gguf.path, f"tensor {name!r} has shape {found}, expected {expected.get(name)}")


def unpermuted(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """The order of rows that undoes the one llama.cpp gives Q and K, which interleaves the two rotary halves."""
    halves = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; each matrix is [outputs, inputs], projections that share their input are stacked.

    A matrix is float32, or the blocks that the file stores where they were asked for and all its parts are such.
    """

    attention_norm: Weights
    qkv: Weights | Blocks
    attention_out: Weights | Blocks
    mlp_norm: Weights
    gate_up: Weights | Blocks
    down: Weights | Blocks


def layer_weights(gguf: GGUFFile, config: LlamaConfig, layer: int, *, blocks: bool = False) -> LayerWeights:
    """Read one layer; with `blocks`, matrices of 4 bits are not expanded."""

    def norm(name: str) -> Weights:
        return gguf.dequantized(f"blk.{layer}.{name}.weight")

    def matrix(*parts: str) -> Weights | Blocks:
        names = [f"blk.{layer}.{part}.weight" for part in parts]
        orders = [unpermuted(gguf.tensors[name].shape[0], heads[part]) if part in heads else slice(None)
                  for part, name in zip(parts, names, strict=True)]  # fmt: skip
        if blocks:
            stored = [gguf.quantized_q4(name) for name in names]
            found = [one.rows(order) for one, order in zip(stored, orders, strict=True) if one is not None]
            if len(found) == len(parts):
                return stacked(found)
        values = [gguf.dequantized(name)[order] for name, order in zip(names, orders, strict=True)]
        return values[0] if len(values) == 1 else np.concatenate(values)

    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
    return LayerWeights(
        attention_norm=norm("attn_norm"),
        qkv=matrix("attn_q", "attn_k", "attn_v"),
        attention_out=matrix("attn_output"),
        mlp_norm=norm("ffn_norm"),
        gate_up=matrix("ffn_gate", "ffn_up"),
        down=matrix("ffn_down"),
    )


def rotary_tables(config: LlamaConfig) -> tuple[Weights, Weights]:
    """Cosines and sines, [positions, head_size / 2], computed in float64 and rounded once."""
    exponents = np.arange(0, config.head_size, 2, dtype=np.float64) / config.head_size
    frequencies = config.rope_base**-exponents
    angles = np.arange(config.context, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
