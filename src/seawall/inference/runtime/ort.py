"""The only module that imports ONNX Runtime.

Official wheels of ONNX Runtime report usage to their vendor by default, and decide so at import: a file
in the home folder, a thread, HTTPS. So the switch is set before the import. Set `SEAWALL_ORT_TELEMETRY=1`
to leave ONNX Runtime's own choice alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seawall.inference.errors import (
    GenerationCancelledError,
    InvalidSettingError,
    MissingExtraError,
    RuntimeDeviceError,
    RuntimeExhaustedError,
    RuntimeFailure,
    RuntimeInterruptedError,
    RuntimeMisuseError,
)

from .distributions import check_no_skew, check_single_distribution, installed_distributions

_OPT_IN = "SEAWALL_ORT_TELEMETRY"
_OPT_OUT = "ORT_DISABLE_TELEMETRY"


def _silence_telemetry() -> None:
    if os.environ.get(_OPT_IN) == "1":
        return
    if "onnxruntime" in sys.modules and os.environ.get(_OPT_OUT) != "1":
        warnings.warn(
            f"onnxruntime was imported before seawall and without {_OPT_OUT}=1, so its telemetry may be on: "
            f"set {_OPT_OUT}=1 in the environment, or import seawall.inference.runtime.ort first",
            RuntimeWarning,
            stacklevel=3,
        )
    os.environ[_OPT_OUT] = "1"


_silence_telemetry()
try:
    import onnxruntime as _ort  # type: ignore[import-untyped, unused-ignore]
except ImportError as error:
    raise MissingExtraError("onnxruntime") from error

Session = Any
OrtValue = Any
RunOptions = Any

version: str = _ort.__version__

EXCEPTIONS: tuple[type[BaseException], ...] = (
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
    *(
        found
        for found in vars(_ort.capi.onnxruntime_pybind11_state).values()
        if isinstance(found, type) and issubclass(found, Exception)
    ),
)
KINDS: Mapping[str, type[RuntimeFailure]] = {
    "Fail": RuntimeFailure,
    "RuntimeException": RuntimeFailure,
    "RuntimeError": RuntimeFailure,
    "InvalidArgument": RuntimeMisuseError,
    "InvalidGraph": RuntimeMisuseError,
    "InvalidProtobuf": RuntimeMisuseError,
    "ModelLoaded": RuntimeMisuseError,
    "ModelRequiresCompilation": RuntimeMisuseError,
    "NoModel": RuntimeMisuseError,
    "NoSuchFile": RuntimeMisuseError,
    "NotFound": RuntimeMisuseError,
    "NotImplemented": RuntimeMisuseError,
    "TypeError": RuntimeMisuseError,
    "ValueError": RuntimeMisuseError,
    "MemoryError": RuntimeExhaustedError,
    "DeviceReset": RuntimeDeviceError,
    "EPFail": RuntimeDeviceError,
    "EngineError": RuntimeDeviceError,
    "ModelLoadCanceled": RuntimeInterruptedError,
}
_OUT_OF_MEMORY = ("allocate memory", "bad_alloc", "out of memory", "bad allocation", "available memory of")


def typed(doing: str, error: BaseException) -> RuntimeFailure | GenerationCancelledError:
    """The typed error for what ONNX Runtime raised; its own classes share no base and reuse `Fail`."""
    text = str(error)
    if "terminate flag" in text:
        return GenerationCancelledError("the sequence was cancelled while a step was running")
    if any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        return RuntimeExhaustedError(doing, error)
    return KINDS.get(type(error).__name__, RuntimeFailure)(doing, error)


def build_session(
    model: Path | bytes,
    *,
    threads: int,
    folder: Path | None = None,
    initializers: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Session:
    """Load an ONNX model for the CPU with exactly `threads` threads, that of the caller included.

    The pool stops spinning when a run ends: two pools that spin between runs slow each other down to
    less than half. Nothing falls back to another provider, and nothing is printed.

    Args:
        model: a file, or a graph whose external data lies in `folder`.
        threads: of a run.
        folder: where the external data of a graph given as bytes is.
        initializers: takes the place of external data, by name.
    """
    check_single_distribution(installed_distributions())
    options = _options(threads)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if folder is not None:
        _complete(options, folder, initializers or {})
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = _ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except EXCEPTIONS as error:
        raise typed(f"loading {folder if isinstance(model, bytes) else model}", error) from error
    session.seawall_initializers = initializers  # it shares their memory, so they live as long as it does
    return session


def _complete(options: Any, folder: Path, initializers: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Say where the external data of a graph given as bytes is: in a folder, or in memory."""
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if initializers:
        options.add_external_initializers(list(initializers), [shared_value(one) for one in initializers.values()])


def run_options() -> RunOptions:
    """Fresh options for one run: the terminate flag is sticky, so they are never used twice."""
    options = _ort.RunOptions()
    options.log_severity_level = _severity
    options.add_run_config_entry(*_GRAPH)
    return options


logger = logging.getLogger("seawall.onnxruntime")
_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
_USUAL, _SILENT = 2, 4
_severity = _SILENT  # of sessions that are loaded from now on, and of their runs: errors reach the caller as exceptions


def log_runtime(level: int = logging.WARNING) -> None:
    """Hand ONNX Runtime's own log to the logger `seawall.onnxruntime`, from this level on.

    Off until called: it is for whoever asks why a provider did not start, or an optimization was left out. Call it
    before models are loaded. It holds for the process, for sessions of others as well. What ONNX Runtime logs in
    threads of its own does not pass Python, and goes to the standard error stream. `logging.CRITICAL` ends it.

    Raises:
        InvalidSettingError: not a level.
        RuntimeMisuseError: this ONNX Runtime can't; 1.32 can.
    """
    global _severity
    if type(level) is not int or level < 0:
        raise InvalidSettingError(f"level must be one of logging's, a whole number from 0, got {level!r}")
    register = getattr(_ort, "set_default_logger_callback", None)
    if register is None:
        raise RuntimeMisuseError("taking its log", f"version {version} has no way to hand it over; 1.32 has")
    severity = next((index for index, known in enumerate(_LEVELS) if known >= level), _SILENT)
    if severity == _SILENT:
        _ort.set_default_logger_severity(_USUAL)  # first: taking the callback away leaves the level as it was
    register(None if severity == _SILENT else _logged, severity)
    _severity = severity


def _logged(severity: int, category: str, logid: str, location: str, message: str) -> None:
    logger.log(_LEVELS[min(severity, _SILENT)], "%s [%s]", message, location)


def shared_value(array: np.ndarray[Any, Any]) -> OrtValue:
    """An OrtValue over the array's own memory; keep the array alive for as long as the value."""
    return _ort.OrtValue.ortvalue_from_numpy(array)


def run(session: Session, binding: Any, options: RunOptions) -> None:
    """Run the bound inputs into the bound outputs; the GIL is released meanwhile."""
    try:
        session.run_with_iobinding(binding, options)
    except EXCEPTIONS as error:
        raise typed("running the model", error) from error


class Node(NamedTuple):
    """A node as it was handed to a provider, before that provider's own rewrites."""

    provider: str
    name: str
    op_type: str


class InMemory(NamedTuple):
    """A graph that differs from its file.

    Attributes:
        graph: the bytes of it.
        path: the file; what is external data in the graph still lies beside it.
        initializers: take the place of external data, by name; a session shares their memory.
        expanded: names of the nodes whose weights are among them, since the file stores them in 8-bit floats.
    """

    graph: bytes
    path: Path
    initializers: Mapping[str, np.ndarray[Any, Any]]
    expanded: frozenset[str] = frozenset()


class Opened(NamedTuple):
    """A session, and the bytes that its memory limit leaves for runs, None without one."""

    session: Session
    room: int | None


_CPU_ARENA = ("Cpu", _ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, _ort.OrtMemType.DEFAULT)
_SPIN_US = "200"  # measured: as fast as spinning 30 ms, and an idle pool sleeps; not spinning at all costs 50 %
_GRAPH = ("gpu_graph_id", "0")  # what it is anyway; 1.32 asks in every run, and takes 25 to 70 us to find it missing
_SHRINK = ("memory.enable_memory_arena_shrinkage", "cpu:0")
_PROBE = (  # y = ConstantOfShape(n), for `_room`
    b'\x08\n\x12\x00:?\n\x17\n\x01n\x12\x01y"\x0fConstantOfShape\x12\x01gZ\x0f\n\x01n\x12\n\n\x08\x08\x07\x12\x04\n\x02'
    b"\x08\x01b\x10\n\x01y\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01nB\x04\n\x00\x10\x15"
)
_loading = threading.Lock()  # a load puts its own arena into the process-wide environment for a while
_shared: list[int] = []


def available_providers() -> list[str]:
    """The execution providers that this build of ONNX Runtime knows."""
    return list(_ort.get_available_providers())


def share_threads(threads: int) -> None:
    """Make one pool of `threads` threads for all sessions that are loaded from now on; see `pool.share_threads`."""
    with _loading:
        if _shared:
            if _shared != [threads]:
                raise InvalidSettingError(
                    f"threads must be {_shared[0]}, the size that the shared pool has already, got {threads}"
                )
            return
        try:
            _ort.set_global_thread_pool_sizes(threads, 1)
        except EXCEPTIONS as error:
            raise typed("sharing threads", error) from error
        _shared.append(threads)


def shared_threads() -> int | None:
    """Threads of the shared pool, or None where every session has a pool of its own."""
    return _shared[0] if _shared else None


def _options(threads: int) -> Any:
    options = _ort.SessionOptions()
    if _shared:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    options.execution_mode = _ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _severity
    options.enable_mem_pattern = False  # a pattern is kept for every shape ever seen
    return options


def open_session(
    model: str | bytes | InMemory,
    *,
    providers: Sequence[tuple[str, Mapping[str, str]]],
    threads: int,
    memory_limit: int | None = None,
    entries: Mapping[str, str] | None = None,
    optimized_to: Path | None = None,
) -> Opened:
    """Load any ONNX model; ONNX Runtime's own exceptions pass.

    The session gets an arena of its own, which grows by what is asked for, not by doubling, and up to
    `memory_limit` bytes. Only an arena of the process-wide environment can be limited, so this one is
    registered there, picked up by the session, and taken out again.
    """
    check_single_distribution(found := installed_distributions())
    check_no_skew(found, version, _ort.get_version_string())
    options = _options(threads)
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.use_env_allocators", "1")
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    if isinstance(model, InMemory):
        _complete(options, model.path.parent, model.initializers)
        model = model.graph
    asked = [(name, dict(settings)) for name, settings in providers]
    with _loading:
        _register_arena(memory_limit or 0)
        try:
            session = _ort.InferenceSession(model, options, providers=asked, enable_fallback=0)
            return Opened(session, None if memory_limit is None else _room(memory_limit))
        finally:
            _register_arena(0)  # or the environment would keep the memory after the session is gone


def _room(limit: int) -> int:
    """Bytes that the weights in the registered arena leave for runs; 0 where they take all of it, or more.

    Weights count but are not checked, and where they exceed the limit what is left wraps around and nothing is
    limited any more. ONNX Runtime tells what is left only in its refusal, so it is asked for far too much.
    """
    options = _options(1)
    options.log_severity_level = _SILENT  # it is meant to fail
    options.add_session_config_entry("session.use_env_allocators", "1")
    probe = _ort.InferenceSession(_PROBE, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    try:
        silent = run_options()
        silent.log_severity_level = _SILENT
        probe.run(None, {"n": np.array([1 << 50], np.int64)}, silent)
    except EXCEPTIONS as error:
        found = re.search(r"Available memory of (\d+)", str(error))
        return min(int(found[1]), limit) if found else 0
    return 0


def _register_arena(limit: int) -> None:
    arena = _ort.OrtArenaCfg({"max_mem": limit, "arena_extend_strategy": 1})  # 1: kSameAsRequested
    _ort.create_and_register_allocator(_ort.OrtMemoryInfo(*_CPU_ARENA), arena)


def run_narrow(
    session: Session,
    names: Sequence[str],
    narrow: Mapping[str, np.dtype[Any]],
    feed: Mapping[str, Any],
    options: RunOptions,
) -> list[Any]:
    """A run of a model with outputs of the types `narrow`, by name, which ONNX Runtime makes no numpy arrays of."""
    values = {name: _ort.OrtValue.ortvalue_from_numpy(value) for name, value in feed.items()}
    found = session.run_with_ort_values(list(names), values, options)
    return [
        _copied(value, narrow[name]) if name in narrow else value.numpy()
        for name, value in zip(names, found, strict=True)
    ]


def _copied(value: OrtValue, kind: np.dtype[Any]) -> np.ndarray[Any, Any]:
    assert value.device_name() == "cpu", "outputs of a run come to the CPU"
    shape = value.shape()
    size = math.prod(shape) * kind.itemsize
    if not size:
        return np.empty(shape, kind)
    memory = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    return np.frombuffer(memory, kind).reshape(shape).copy()


def assigned_nodes(session: Session) -> list[Node]:
    """Which provider got which node; empty where this ONNX Runtime does not tell."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return []
    return [Node(part.ep_name, node.name, node.op_type) for part in tell() for node in part.get_nodes()]


def shrink(session: Session, feed: Mapping[str, Any]) -> None:
    """Give the arena's unused memory back to the system, in 35 us: a run that is terminated before its first node."""
    options = run_options()
    options.log_severity_level = _SILENT
    options.add_run_config_entry(*_SHRINK)
    options.terminate = True
    with contextlib.suppress(*EXCEPTIONS):
        session.run(None, feed, options)
