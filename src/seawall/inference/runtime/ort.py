"""The only module that imports ONNX Runtime.

Official wheels of ONNX Runtime report usage to their vendor by default, and decide so at import: a file
in the home folder, a thread, HTTPS. So the switch is set before the import. Set `SEAWALL_ORT_TELEMETRY=1`
to leave ONNX Runtime's own choice alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from seawall.inference.errors import (
    GenerationCancelledError,
    MissingExtraError,
    RuntimeExhaustedError,
    RuntimeFailure,
    RuntimeMisuseError,
)

_OPT_IN = "SEAWALL_ORT_TELEMETRY"
_OPT_OUT = "ORT_DISABLE_TELEMETRY"
_DISTRIBUTIONS = tuple(
    f"onnxruntime{flavour}"
    for flavour in ("", "-gpu", "-directml", "-openvino", "-qnn", "-rocm", "-migraphx", "-silicon", "-training")
)


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


def installed_distributions() -> list[str]:
    """Installed distributions that bring a module `onnxruntime`, each with its version.

    Asked for by name: listing what every installed package brings takes 0.2 s.
    """
    found = []
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def check_single_distribution(installed: list[str]) -> None:
    """Raise where several distributions overwrote each other's `onnxruntime` folder."""
    if len(installed) > 1:
        raise RuntimeMisuseError(
            "importing onnxruntime",
            f"{' and '.join(installed)} are both installed and overwrite each other's files: "
            "uninstall all of them, then install seawall[cpu] or seawall[gpu], never both",
        )


_silence_telemetry()
try:
    import onnxruntime as _ort  # type: ignore[import-untyped, unused-ignore]
except ImportError as error:
    raise MissingExtraError("onnxruntime") from error

Session = Any
OrtValue = Any
RunOptions = Any

version: str = _ort.__version__

_EXCEPTIONS: tuple[type[BaseException], ...] = (
    RuntimeError,
    ValueError,
    *(
        found
        for found in vars(_ort.capi.onnxruntime_pybind11_state).values()
        if isinstance(found, type) and issubclass(found, Exception)
    ),
)
_MISUSE = frozenset(
    {
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NoModel",
        "NotImplemented",
        "ValueError",
    }
)
_OUT_OF_MEMORY = ("allocate memory", "bad_alloc", "out of memory", "bad allocation")


def typed(doing: str, error: BaseException) -> RuntimeFailure | GenerationCancelledError:
    """The typed error for what ONNX Runtime raised; its own classes share no base and reuse `Fail`."""
    text = str(error)
    if "terminate flag" in text:
        return GenerationCancelledError("the sequence was cancelled while a step was running")
    if any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        return RuntimeExhaustedError(doing, error)
    kind = RuntimeMisuseError if type(error).__name__ in _MISUSE else RuntimeFailure
    return kind(doing, error)


def build_session(path: Path, *, threads: int) -> Session:
    """Load an ONNX model for the CPU with exactly `threads` threads, that of the caller included.

    The pool stops spinning when a run ends: two pools that spin between runs slow each other down to
    less than half. Nothing falls back to another provider, and nothing is printed.
    """
    check_single_distribution(installed_distributions())
    options = _ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = _ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # errors reach the caller as exceptions; ORT would print them as well
    options.enable_mem_pattern = False  # a pattern is kept for every chunk length ever seen
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return _ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except _EXCEPTIONS as error:
        raise typed(f"loading {path}", error) from error


def run_options() -> RunOptions:
    """Fresh options for one run: the terminate flag is sticky, so they are never used twice."""
    options = _ort.RunOptions()
    options.log_severity_level = 4
    return options


def shared_value(array: np.ndarray[Any, Any]) -> OrtValue:
    """An OrtValue over the array's own memory; keep the array alive for as long as the value."""
    return _ort.OrtValue.ortvalue_from_numpy(array)


def run(session: Session, binding: Any, options: RunOptions) -> None:
    """Run the bound inputs into the bound outputs; the GIL is released meanwhile."""
    try:
        session.run_with_iobinding(binding, options)
    except _EXCEPTIONS as error:
        raise typed("running the model", error) from error
