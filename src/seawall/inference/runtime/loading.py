"""From a model's file and its settings to a session that serves as asked, or to the error that says why not."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from seawall.inference.errors import (
    CorruptModelError,
    InvalidSettingError,
    ModelError,
    ProviderError,
    RuntimeExhaustedError,
)
from seawall.inference.models.cache import read_facts

from . import ort, providers
from .pool import checked_threads

_CORRUPT = frozenset({"InvalidProtobuf", "InvalidGraph", "InvalidArgument", "NoModel"})
_LEAST_MEMORY = 1 << 20
_MODEL = "model.onnx"
_FLOAT8 = ("fp8-e4m3", "fp8-e5m2")


def source_of(model: object) -> tuple[str | bytes, str]:
    """What ONNX Runtime is given, and a name for it."""
    if isinstance(model, bytes):
        return model, f"a model of {len(model)} bytes"
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        if isinstance(path, str):
            if os.path.isdir(path):  # noqa: PTH112 - as the line below
                path = os.path.join(path, _MODEL)  # noqa: PTH118
            return os.path.abspath(path), path  # noqa: PTH100 - resolve() would follow links away from external data
    raise InvalidSettingError(f"model must be a path or bytes, got {type(model).__name__}")


def checked_settings(
    requested: Sequence[providers.Provider], threads: int | None, memory_limit: int | None, workers: int
) -> list[tuple[str, dict[str, str]]]:
    """The providers with their options, once every setting is known to be in its range."""
    if threads is not None:
        checked_threads(threads)
        if (shared := ort.shared_threads()) not in {None, threads}:
            raise InvalidSettingError(f"threads is {threads}, but share_threads made a pool of {shared} for all")
    if memory_limit is not None and (type(memory_limit) is not int or memory_limit < _LEAST_MEMORY):
        raise InvalidSettingError(f"memory_limit must be bytes, at least {_LEAST_MEMORY}, got {memory_limit!r}")
    if type(workers) is not int or not 1 <= workers <= 1024:
        raise InvalidSettingError(f"workers must be a whole number from 1 to 1024, got {workers!r}")
    return providers.normalized(requested)


def readied(source: str | bytes, asked: list[tuple[str, dict[str, str]]]) -> str | bytes | ort.InMemory:
    """The model as it is loaded: expanded where its folder says that 8-bit floats are stored, and a CPU is to serve."""
    if isinstance(source, bytes) or [name for name, _ in asked] != [providers.CPU]:
        return source
    told = read_facts(Path(source).parent).get("quantization")
    if not isinstance(told, dict) or told.get("storage") not in _FLOAT8:
        return source
    from seawall.inference.quantize.expand import expand_fp8

    expanded = expand_fp8(source)
    return ort.InMemory(expanded.model, Path(source), expanded.initializers, expanded.nodes)


def open_model(
    source: str | bytes | ort.InMemory,
    name: str,
    asked: list[tuple[str, dict[str, str]]],
    *,
    strict: bool,
    threads: int,
    memory_limit: int | None,
) -> ort.Opened:
    """A session that serves as asked; with `strict`, or ProviderError."""
    requested = [provider for provider, _ in asked]
    open_with: Callable[..., ort.Opened] = partial(ort.open_session, source, threads=threads, memory_limit=memory_limit)
    try:
        if not strict:
            return _lenient(open_with, asked)
        providers.check_available(requested, ort.available_providers())
        entries = {} if providers.CPU in requested else {"session.disable_cpu_ep_fallback": "1"}
        opened = open_with(providers=asked, entries=entries)
    except ort.EXCEPTIONS as error:
        if isinstance(error, ModelError):
            raise
        if "fallback to CPU EP has been explicitly disabled" in str(error):
            raise ProviderError(requested, [providers.CPU], "some nodes would run on the CPU") from error
        raise _failed_load(name, error) from error
    nodes = [(node.provider, node.name or node.op_type) for node in ort.assigned_nodes(opened.session)]
    providers.check_serving(requested, opened.session.get_providers(), nodes)
    return opened


def _lenient(open_with: Callable[..., ort.Opened], asked: list[tuple[str, dict[str, str]]]) -> ort.Opened:
    """Serve with whatever there is, and warn where that is not what was asked for."""
    available = ort.available_providers()
    opened = open_with(providers=[(name, options) for name, options in asked if name in available])
    try:
        providers.check_serving([name for name, _ in asked], opened.session.get_providers(), [])
    except ProviderError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=4)
    return opened


def _failed_load(name: str, error: BaseException) -> ModelError:
    failure = ort.typed(f"loading {name}", error)
    if isinstance(failure, RuntimeExhaustedError):
        return failure
    if type(error).__name__ in _CORRUPT or "xternal" in str(error):
        return CorruptModelError(name, str(error))
    return failure


def digest_of(source: str | bytes) -> str:
    """SHA-256 of the model's own file."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
