"""How many threads this process may keep busy: CPU affinity, then the cgroup's CPU quota.

ONNX Runtime sizes its pool from the machine, so in a container with a quota it starts threads
that spend their time throttled. The parsers are pure: text in, number of CPUs out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self/cgroup")


def quota_v2(cpu_max: str) -> float | None:
    """CPUs granted by a cgroup v2 `cpu.max` file ("200000 100000" is 2.0), or None where unlimited."""
    fields = cpu_max.split()
    if not fields or fields[0] == "max":
        return None
    return _ratio(fields[0], fields[1] if len(fields) > 1 else "100000")


def quota_v1(quota_us: str, period_us: str) -> float | None:
    """CPUs granted by cgroup v1's `cpu.cfs_quota_us` and `cpu.cfs_period_us`; -1 means unlimited."""
    return _ratio(quota_us.strip(), period_us.strip())


def _ratio(quota: str, period: str) -> float | None:
    try:
        cpus = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return cpus if cpus > 0 else None


def cgroup_folders(proc_self_cgroup: str) -> tuple[list[str], list[str]]:
    """Folders (v2, v1), innermost first, whose CPU quotas bind a process with this `/proc/self/cgroup`.

    A parent's quota binds as well, so every ancestor is listed.
    """
    unified: list[str] = []
    legacy: list[str] = []
    for line in proc_self_cgroup.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            unified += _ancestors(path)
        elif "cpu" in controllers.split(","):
            legacy += [f"{controllers}{folder}" for folder in _ancestors(path)]
            legacy += [f"cpu{folder}" for folder in _ancestors(path)]
    return unified or ["/"], legacy or ["cpu/"]


def _ancestors(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return ["/" + "/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def smallest_quota(proc_self_cgroup: str, read: Callable[[str], str | None]) -> float | None:
    """The tightest CPU quota that binds the process, or None.

    `read` gets a path below the cgroup mount and returns the file's text, or None where there is none.
    """
    unified, legacy = cgroup_folders(proc_self_cgroup)
    quotas: list[float | None] = []
    for folder in unified:
        text = read(f"{folder.strip('/')}/cpu.max".lstrip("/"))
        quotas.append(None if text is None else quota_v2(text))
    for folder in legacy:
        quota = read(f"{folder.rstrip('/')}/cpu.cfs_quota_us")
        period = read(f"{folder.rstrip('/')}/cpu.cfs_period_us")
        quotas.append(None if quota is None or period is None else quota_v1(quota, period))
    return min((quota for quota in quotas if quota is not None), default=None)


def thread_count(cpus: int, quota: float | None) -> int:
    """Threads worth starting on `cpus` usable CPUs under a quota; a part of a CPU counts as one.

    ```python
    from seawall.inference.runtime.threads import thread_count

    print(thread_count(8, 2.5), thread_count(2, None), thread_count(4, 0.2))
    #> 3 2 1
    ```
    """
    return max(1, cpus if quota is None else min(cpus, math.ceil(quota)))


def available_threads() -> int:
    """Threads that this process may keep busy at once; at least 1, and never a guess above its affinity."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return thread_count(cpus, smallest_quota(_read(_SELF) or "", lambda name: _read(_CGROUP / name)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
