"""Converts a sentence encoder, and takes over a model that is ONNX already, into a folder being published."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seawall.inference.errors import CorruptModelError

from .bert import FILES, TOKENIZER_FILE, WEIGHTS_FILE, read_config
from .cache import sha256_of

FORMAT = 1  # raise it whenever the graph or the tokenizer of the same source changes
KIND = "sentence-encoder"


def files_in(folder: Path) -> dict[str, Path] | None:
    """The files of an encoder in sentence-transformers' layout; None where this folder is something else."""
    found = {name: folder / name for name in FILES}
    return found if all(path.is_file() for path in found.values()) else None


def digest_of(digests: Mapping[str, str]) -> str:
    """One SHA-256 for files that are known by theirs."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def digest_files(files: Mapping[str, Path]) -> str:
    """One SHA-256 for files on disk."""
    try:
        return digest_of({name: sha256_of(path) for name, path in files.items()})
    except OSError as error:
        raise CorruptModelError(error.filename, f"it cannot be read: {error.strerror}") from error


def convert(files: Mapping[str, Path], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Write graph, weights and tokenizer of a BERT encoder to `folder`; gives what is to be known about it."""
    from .bert_graph import write_graph
    from .safetensors_file import SafetensorsFile
    from .tokenizer import FILE, load_tokenizer

    config = read_config(files)
    tokenizer = load_tokenizer(files[TOKENIZER_FILE])
    if tokenizer.get_vocab_size() > config.vocabulary:
        raise CorruptModelError(files[TOKENIZER_FILE], "it has tokens that the model does not know")
    with SafetensorsFile(files[WEIGHTS_FILE]) as weights:
        write_graph(folder, weights, config, progress=progress)
    tokenizer.save(str(folder / FILE), pretty=False)
    return {"kind": KIND, "config": asdict(config), "max_tokens": config.max_tokens}


def adopt(files: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Copy the files of a model that is ONNX already."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    return {"kind": "onnx"}
