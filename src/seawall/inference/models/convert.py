"""From a model's name, or a GGUF file, to a folder that a decoder can load: converted once, then verified."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seawall.inference.errors import (
    CorruptModelError,
    ModelCacheError,
    UnknownModelError,
    UnknownPrecisionError,
)

from .cache import cache_folder, locked, publishing, read_verified, sha256_of, write_manifest
from .catalogue import CATALOGUE
from .fetch import Progress, locate, silent

FORMAT = 1  # raise it whenever the graph, the packing or the tokenizer of the same source changes
PRECISIONS = ("int8", "int8-block32", "int4", "fp32")
_END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
_END_NAMES = ("<|endoftext|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A converted model on disk, its files verified.

    Attributes:
        folder: holds `model.onnx`, `weights.bin`, `tokenizer.json` and `manifest.json`.
        facts: what the manifest says about the model: name, precision, config, source digest ...
    """

    folder: Path
    facts: dict[str, Any]


def prepare(
    model: str | os.PathLike[str],
    *,
    precision: str = "int8",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> PreparedModel:
    """Return the converted model from the cache, converting it first where it is missing or damaged.

    Several processes may call this at once: one converts, the others wait for it. A converted model is
    found and used in a read-only cache folder as well.

    Raises UnknownModelError, UnknownPrecisionError, ModelNotInstalledError, CorruptModelError or
    ModelCacheError.
    """
    if precision not in PRECISIONS:
        raise UnknownPrecisionError(precision, PRECISIONS)
    name, given = _named_or_file(model)
    source_digest = _digest(given) if given else CATALOGUE[name].sha256
    target = cache_folder(cache_dir) / name / f"{precision}-v{FORMAT}-{source_digest[:12]}"
    identity = {"format": FORMAT, "precision": precision, "source_sha256": source_digest}
    if (facts := _usable(target, identity)) is None:
        with locked(target):
            if (facts := _usable(target, identity)) is None:
                source = given or locate(name, cache_dir)
                facts = _convert(source, target, name, identity, progress or silent)
    return PreparedModel(target, facts)


def _named_or_file(model: str | os.PathLike[str]) -> tuple[str, Path | None]:
    if isinstance(model, str) and model in CATALOGUE:
        return model, None
    try:
        path = Path(model).expanduser()
        found = path.is_file()
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # no path that could exist
        raise UnknownModelError(str(model), CATALOGUE) from error
    if not found:
        raise UnknownModelError(str(model), CATALOGUE)
    return "files", path


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CorruptModelError(path, f"it cannot be read: {error.strerror}") from error


def _usable(target: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    facts = read_verified(target)
    return facts if facts is not None and identity.items() <= facts.items() else None


def _convert(source: Path, target: Path, name: str, identity: dict[str, Any], progress: Progress) -> dict[str, Any]:
    # Imported here: whoever loads a converted model needs neither gguf nor onnx.
    from .gguf_file import GGUFFile
    from .graph import RECIPES, write_graph
    from .llama import read_config
    from .tokenizer import FILE, build_tokenizer

    recipe = RECIPES[identity["precision"]]
    with GGUFFile(source) as gguf:
        config = read_config(gguf)
        tokenizer = build_tokenizer(gguf.metadata, source)
        facts: dict[str, Any] = {
            **identity,
            "model": name if name in CATALOGUE else source.stem,
            "config": asdict(config),
            "recipe": asdict(recipe),
            "end_tokens": _end_tokens(gguf.metadata, source),
            "chat_template": _chat_template(gguf.metadata, source),
            "licence": str(gguf.metadata.get("general.license", "unknown")),
        }
        bits = recipe.bits or 32
        weights = sum(_elements(info.shape) for info in gguf.tensors.values())
        with publishing(target, needed_bytes=weights * (bits + 2) // 8 + (64 << 20)) as folder:
            write_graph(folder, gguf, config, recipe, progress=lambda done: progress("converting", done))
            tokenizer.save(str(folder / FILE), pretty=False)
            write_manifest(folder, facts)
            if (verified := read_verified(folder)) is None:
                raise ModelCacheError(folder, OSError("what was written does not read back the same"))
    return verified


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _end_tokens(metadata: dict[str, Any], path: Path) -> list[int]:
    """Tokens that end an answer: those the header names, and the family's control tokens for it."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    named = [metadata[key] for key in _END_TOKENS if key in metadata]
    if not all(type(token) is int and 0 <= token < len(tokens) for token in named):
        raise CorruptModelError(path, f"its end tokens {named!r} are not in its vocabulary")
    known = [tokens.index(name) for name in _END_NAMES if name in tokens]
    return sorted({*named, *known})


def _chat_template(metadata: dict[str, Any], path: Path) -> str:
    template = metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise CorruptModelError(path, "its chat template is no text")
    return template
