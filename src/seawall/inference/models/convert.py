"""From a model's name, or its files, to a folder that can be loaded: converted once, then verified."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seawall.inference.errors import (
    CorruptModelError,
    InvalidSettingError,
    ModelCacheError,
    UnknownModelError,
    UnknownPrecisionError,
)

from . import encoder
from .cache import MANIFEST, cache_folder, locked, publishing, read_verified, sha256_of, write_manifest
from .catalogue import CATALOGUE
from .fetch import Progress, locate, locate_files, silent

FORMAT = 3  # of Llamas; raise it whenever the graph, the packing or the tokenizer of the same source changes
PRECISIONS = ("int8", "int8-block32", "int4", "int4-rtn", "fp8-e4m3", "fp8-e5m2", "fp32")
_OTHER_PRECISIONS = {"sentence-encoder": ("fp32",), "onnx": ("original",)}
_END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
_END_NAMES = ("<|endoftext|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A converted model on disk, its files verified.

    Attributes:
        folder: holds `model.onnx` and `manifest.json`; a Llama or encoder `weights.bin` and `tokenizer.json` as well.
        facts: what the manifest says about the model: name, precision, config, source digest ...
        cache: where files made of it may be kept, or None where they may not.
    """

    folder: Path
    facts: dict[str, Any]
    cache: Path | None = None


def prepare(
    model: str | os.PathLike[str],
    *,
    precision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> PreparedModel:
    """Return the converted model from the cache, converting it first where it is missing or damaged.

    `model` is a name in the catalogue, a GGUF file (a Llama), or a folder in sentence-transformers' layout (a BERT
    encoder). `precision` None is "int4" for a Llama whose file stores blocks of 4 bits, which are taken over as they
    are, and "int8-block32" for any other. An encoder is converted as "fp32", and what is ONNX already stays
    "original"; `quantize_model` takes either from there.

    Several processes may call this at once: one converts, the others wait for it. A converted model is
    found and used in a read-only cache folder as well.

    Raises UnknownModelError, UnknownPrecisionError, ModelNotInstalledError, CorruptModelError or
    ModelCacheError.
    """
    name, given = _named_or_path(model)
    kind = CATALOGUE[name].kind if given is None else "gguf" if given.is_file() else encoder.KIND
    known = PRECISIONS if kind == "gguf" else _OTHER_PRECISIONS[kind]
    precision = _usual_precision(name, kind, given) if precision is None else precision
    if precision not in known:
        raise UnknownPrecisionError(precision, known)
    source_digest = _digest(name, kind, given)
    version = FORMAT if kind == "gguf" else encoder.FORMAT
    target = cache_folder(cache_dir) / name / f"{precision}-v{version}-{source_digest[:12]}"
    identity = {"format": version, "precision": precision, "source_sha256": source_digest}
    if (facts := _usable(target, identity)) is None:
        with locked(target):
            if (facts := _usable(target, identity)) is None:
                report = progress or silent
                if kind == "gguf":
                    facts = _convert(given or locate(name, cache_dir), target, name, identity, report)
                else:
                    facts = _convert_files(_files(name, given, cache_dir), target, name, kind, identity, report)
    return PreparedModel(target, facts, target.parent)


def open_prepared(folder: str | os.PathLike[str]) -> PreparedModel:
    """A folder as `prepare` and `quantize_model` make them, its files verified by digest.

    Raises CorruptModelError where a file is missing, damaged or not the one that the manifest lists.
    """
    path = Path(folder).expanduser()
    if not (path / MANIFEST).is_file():
        raise CorruptModelError(path, f"it holds no {MANIFEST}, which prepare and quantize_model write last")
    facts = read_verified(path)
    if facts is None:
        raise CorruptModelError(path, f"its files are not those that its {MANIFEST} lists: make it again")
    return PreparedModel(path, facts)


def _named_or_path(model: str | os.PathLike[str]) -> tuple[str, Path | None]:
    if isinstance(model, str) and model in CATALOGUE:
        return model, None
    try:
        path = Path(model).expanduser()
        found = path.is_file() or encoder.files_in(path) is not None
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # no path that could exist
        raise UnknownModelError(str(model), CATALOGUE) from error
    if not found:
        raise UnknownModelError(str(model), CATALOGUE)
    return "files", path


def _usual_precision(name: str, kind: str, given: Path | None) -> str:
    """The smallest that its own gate lets serve."""
    if kind != "gguf":
        return _OTHER_PRECISIONS[kind][0]
    four_bits = CATALOGUE[name].four_bits if given is None else _stores_four_bits(given)
    return "int4" if four_bits else "int8-block32"


def _stores_four_bits(source: Path) -> bool:
    from .gguf_file import GGUFFile  # imported here: a name in the catalogue needs no gguf once it is converted

    with GGUFFile(source) as gguf:
        return gguf.stores_four_bits


def _files(name: str, given: Path | None, cache_dir: str | os.PathLike[str] | None) -> Mapping[str, Path]:
    return locate_files(name, cache_dir) if given is None else encoder.files_in(given) or {}


def _digest(name: str, kind: str, given: Path | None) -> str:
    if given is None:
        files = CATALOGUE[name].files
        return files[0].sha256 if kind == "gguf" else encoder.digest_of({file.name: file.sha256 for file in files})
    if kind != "gguf":
        return encoder.digest_files(encoder.files_in(given) or {})
    try:
        return sha256_of(given)
    except OSError as error:
        raise CorruptModelError(given, f"it cannot be read: {error.strerror}") from error


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
        if recipe.lossless and not gguf.stores_four_bits:
            raise InvalidSettingError(
                f"precision {identity['precision']!r} takes over blocks of 4 bits (Q4_0, Q4_1 or Q4_K), and {source} "
                "stores none: choose 'int8-block32', or round it with quantize_model(..., recipe='int4-kquant')"
            )
        tokenizer = build_tokenizer(gguf.metadata, source)
        facts: dict[str, Any] = {
            **identity,
            "model": name if name in CATALOGUE else source.stem,
            "config": asdict(config),
            "recipe": asdict(recipe),
            **({"quantization": {"storage": identity["precision"]}} if recipe.float8 else {}),
            "end_tokens": _end_tokens(gguf.metadata, source),
            "chat_template": _chat_template(gguf.metadata, source),
            "licence": str(gguf.metadata.get("general.license", "unknown")),
        }
        bits = recipe.bits or 32
        weights = sum(_elements(info.shape) for info in gguf.tensors.values())
        with publishing(target, needed_bytes=weights * (bits + 2) // 8 + (64 << 20)) as folder:
            write_graph(folder, gguf, config, recipe, progress=lambda done: progress("converting", done))
            tokenizer.save(str(folder / FILE), pretty=False)
            return _sealed(folder, facts)


def _convert_files(
    files: Mapping[str, Path], target: Path, name: str, kind: str, identity: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Publish an encoder, or a model that is ONNX already."""
    known = CATALOGUE.get(name)
    facts = {
        **identity,
        "model": known.name if known else next(iter(files.values())).parent.name,
        "licence": known.licence if known else "unknown",
    }
    needed = sum(path.stat().st_size for path in files.values())
    with publishing(target, needed_bytes=2 * needed + (64 << 20)) as folder:
        if kind == encoder.KIND:
            facts |= encoder.convert(files, folder, lambda done: progress("converting", done))
        else:
            facts |= encoder.adopt(files, folder)
        return _sealed(folder, facts)


def _sealed(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest, and read everything back."""
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
