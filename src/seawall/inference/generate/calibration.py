"""Scales of a quantized cache, measured on a short text by the model itself, and kept beside it."""

from __future__ import annotations

import contextlib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from seawall.inference.errors import InvalidPromptError, ModelCacheError
from seawall.inference.models.cache import locked, publishing, read_verified, write_manifest
from seawall.inference.models.chat import ChatTemplate
from seawall.inference.models.kv_cache import cache_scales
from seawall.inference.models.tokenizer import TextCodec
from seawall.inference.runtime import ort

from .slot import CHUNK, Array, Slot

_FILE = "scales.npy"
_FORMAT = 1  # raise it whenever the text or the rule changes
_LONGEST = 1024  # tokens of one calibration sequence


def calibrated_scales(
    session: ort.Session, config: dict[str, Any], codec: TextCodec, template: ChatTemplate, kv: str
) -> Array:
    """Run the calibration text through a session of the float cache: once as plain text, once as a conversation.

    A second or two. The conversation matters, since control tokens have the largest keys of all.
    """
    text = resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    sequences = [codec.encode_verbatim(text)]
    half = len(text) // 2
    with contextlib.suppress(InvalidPromptError):  # a template without a system message
        sequences.append(
            template.encode([{"role": "system", "content": "Be brief."}, {"role": "user", "content": text[:half]}])
        )
    longest = min(_LONGEST, config["context"])
    parts = [sequence[:longest] for sequence in sequences if sequence] or [[0]]
    slot = Slot(session, config, longest)
    measured = (_cache(slot, tokens) for tokens in parts)
    return cache_scales(measured, kv=kv, rope_base=config["rope_base"], context=config["context"])


def _cache(slot: Slot, tokens: list[int]) -> Array:
    for start in range(0, len(tokens), CHUNK):
        slot.run(tokens[start : start + CHUNK], start, ort.run_options())
    kept: Array = slot.cache[:, :, 0, :, : len(tokens)].copy()
    return kept


def load_scales(folder: Path, shape: tuple[int, ...]) -> Array | None:
    """What `save_scales` wrote, or None where that is missing, damaged or of another kind."""
    facts = read_verified(folder)
    if facts is None or facts.get("format") != _FORMAT:
        return None
    scales: Array = np.load(folder / _FILE, allow_pickle=False)
    return scales if scales.shape == shape and scales.dtype == np.float32 else None


def save_scales(folder: Path, scales: Array) -> None:
    """Keep scales in a folder of their own; a cache that cannot be written to costs the calibration at each load."""
    with contextlib.suppress(ModelCacheError), locked(folder), publishing(folder, needed_bytes=1 << 20) as new:
        np.save(new / _FILE, scales, allow_pickle=False)
        write_manifest(new, {"format": _FORMAT})
