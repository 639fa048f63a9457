"""The key/value cache in 8 or 4 bits: scales that hold at every position, and the graph that uses them.

Scales are fixed before the first token: one per head and channel, symmetric. Keys are stored after their rotation by
position, so a key's size wanders between the two channels of a rotary pair, and what was measured on 512 positions
does not hold at 2,048 (measured: KL divergence 0.60 instead of 0.003). So each measured key is turned back to
position 0 and forward again to positions of the whole context, and the scale has to hold for all of them: the
two channels of a fast pair get the same, those of a pair too slow to turn within the context keep their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from seawall.inference.errors import CorruptModelError, MissingExtraError

Array = np.ndarray[Any, Any]

CACHES = ("fp32", "int8", "int4")
_PAST = re.compile(r"past\.(\d{1,4})\.k")
_BITS = {"int8": 8, "int4": 4}
_POSITIONS = 24  # at which a measured key is tried
_MARGIN = 1.25  # 8 bits: texts hold larger values than the calibration's; a clipped one costs more than a wider step
_CLIPS = np.linspace(0.2, 1.0, 17)  # 4 bits: largest values are rare, and clipping them is worth finer steps


def cache_dtype(kv: str) -> np.dtype[Any]:
    """What an element of the cache is stored as; two 4-bit values share a byte."""
    return np.dtype({"fp32": np.float32, "int8": np.int8, "int4": np.uint8}[kv])


def cache_width(kv: str, head_size: int) -> int:
    """Elements of one vector in the cache."""
    return head_size // 2 if kv == "int4" else head_size


def cache_scales(measured: Iterable[Array], *, kv: str, rope_base: float, context: int) -> Array:
    """Scales of keys and values, float32 [2, layers, kv_heads, head_size].

    Args:
        measured: caches of float32, [layers, 2, kv_heads, tokens, head_size], each from position 0 on.
        kv: "int8" or "int4".
        rope_base: of the rotation, in halves: channels i and i + head_size / 2 turn together.
        context: positions that the keys' scales have to hold for.
    """
    caches = list(measured)
    layers = len(caches[0])
    scales = np.empty((2, layers, caches[0].shape[2], caches[0].shape[4]), np.float32)
    for layer in range(layers):
        keys = [at_all_positions(cache[layer, 0], rope_base, context) for cache in caches]
        scales[0, layer] = _scale(np.concatenate(keys, axis=1), _BITS[kv])
        scales[1, layer] = _scale(np.concatenate([cache[layer, 1] for cache in caches], axis=1), _BITS[kv])
    return scales


def at_all_positions(keys: Array, rope_base: float, context: int) -> Array:
    """Rotated keys [heads, tokens, head_size] of positions 0, 1, ... as they would be all over a context."""
    unrotated = rotated(keys, -np.arange(keys.shape[1]), rope_base)
    positions = np.linspace(0, context - 1, _POSITIONS)
    return np.concatenate([rotated(unrotated, position[None], rope_base) for position in positions], axis=1)


def rotated(keys: Array, positions: Array, rope_base: float) -> Array:
    """Keys [heads, tokens, head_size] turned by `positions`, [tokens] or [1]."""
    half = keys.shape[-1] // 2
    angles = positions[:, None] * rope_base ** (-np.arange(half) / half)
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = keys[..., :half], keys[..., half:]
    return np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)


def _scale(values: Array, bits: int) -> Array:
    """Per head and channel of [heads, samples, channels]; 1 for a channel of zeros."""
    top = (1 << bits - 1) - 1
    largest = np.abs(values).max(axis=1)
    if bits == 8:
        scale = largest * np.float32(_MARGIN / top)
    else:
        scale, least = largest, np.full(largest.shape, np.inf)
        for clip in _CLIPS:
            step = np.where(largest == 0, 1, largest * np.float32(clip / top))[:, None]
            error = np.square(np.clip(np.rint(values / step), -top - 1, top) * step - values).sum(axis=1)
            scale, least = np.where(error < least, step[:, 0], scale), np.minimum(error, least)
    return np.where(largest == 0, 1, scale).astype(np.float32)


def with_quantized_cache(model: Any, scales: Array, kv: str) -> None:
    """Change a written graph, an onnx ModelProto, so that it keeps its cache as `kv` says."""
    onnx = _onnx()
    kind = onnx.helper.np_dtype_to_tensor_dtype(cache_dtype(kv))
    for layer, node in _attention(model, layers=scales.shape[1]):
        names = [f"cache.{layer}.{part}.scale" for part in "kv"]
        for name, values in zip(names, scales[:, layer], strict=True):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values[:, None]), name))
        _connect(node, 12, names)
        for name, value in (
            ("k_quant_type", "PER_CHANNEL"), ("v_quant_type", "PER_CHANNEL"), ("kv_cache_bit_width", _BITS[kv]),
        ):  # fmt: skip
            node.attribute.append(onnx.helper.make_attribute(name, value))
    for port in (*model.graph.input, *model.graph.output):
        if port.name.startswith(("past.", "present.")):
            port.type.tensor_type.elem_type = kind
            size = port.type.tensor_type.shape.dim[3]
            size.dim_value = cache_width(kv, size.dim_value)


def with_query_seqlens(model: Any) -> None:
    """Change a written graph so that it takes `query_seqlens`, int32 [B]: real tokens per row of a right-padded batch.

    ONNX Runtime 1.32 needs it to run several rows of several tokens over existing caches.
    """
    onnx = _onnx()
    port = onnx.helper.make_tensor_value_info("query_seqlens", onnx.TensorProto.INT32, ["batch"])
    model.graph.input.append(port)
    for _, node in _attention(model):
        _connect(node, 16, ["query_seqlens"])


def _attention(model: Any, layers: int | None = None) -> list[tuple[int, Any]]:
    """Each attention node with the number of its layer."""
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    names = [_PAST.fullmatch(node.input[3]) if len(node.input) > 4 else None for node in nodes]
    numbers = [int(name[1]) for name in names if name is not None]
    if not nodes or len(numbers) < len(nodes) or (layers is not None and sorted(numbers) != list(range(layers))):
        raise CorruptModelError("the graph", "it has no GroupQueryAttention over caches named past.LAYER.k and .v")
    return list(zip(numbers, nodes, strict=True))


def _connect(node: Any, place: int, names: list[str]) -> None:
    node.input.extend([""] * (place + len(names) - len(node.input)))
    for offset, name in enumerate(names):
        node.input[place + offset] = name


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx") from error
    return onnx
