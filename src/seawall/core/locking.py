"""The one lock of the process. Held for microseconds, never while waiting or running code of the user's."""

from __future__ import annotations

import os
import threading
from typing import Any

# Re-entrant, because a finaliser or signal handler of the user's may run at any allocation, also while this
# thread holds it, and may itself leave a guarded stream.
lock: Any = threading.RLock()  # typeshed does not know `_is_owned`, which threading.Condition needs as well


def held() -> bool:
    """Whether this thread holds the lock."""
    return bool(lock._is_owned())


def release_if_held() -> None:
    """Give the lock back after an interruption, which may have come before it was ours."""
    if lock._is_owned():
        lock.release()


if hasattr(os, "register_at_fork"):  # another thread may hold it as this one forks; the child would wait for ever
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
