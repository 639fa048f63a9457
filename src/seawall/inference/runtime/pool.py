"""One pool of threads for every session of the process, for those who own all of them."""

from __future__ import annotations

from seawall.inference.errors import InvalidSettingError

from . import ort
from .threads import available_threads


def share_threads(threads: int | None = None) -> int:
    """Let all models that are loaded from now on share one pool of threads; its size is returned.

    Call it once, before the first load. None sizes the pool from affinity and CPU quota. It is not the
    default for two reasons, both ONNX Runtime's: afterwards every `InferenceSession` that other code of this
    process makes with threads of its own is refused, and the pool's threads spin for about 30 ms after each
    run, which cannot be turned off from Python.
    """
    size = available_threads() if threads is None else checked_threads(threads)
    ort.share_threads(size)
    return size


def checked_threads(threads: int) -> int:
    """The number itself, if it is one."""
    if type(threads) is not int or not 1 <= threads <= 1024:
        raise InvalidSettingError(f"threads must be a whole number from 1 to 1024, got {threads!r}")
    return threads
