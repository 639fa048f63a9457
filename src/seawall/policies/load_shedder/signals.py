"""What tells a load shedder that this process is overloaded. Sampled now and then, never under the gate's lock."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

from seawall.core import checks
from seawall.core.sleeping import on_asyncio


class Signal(Protocol):
    """Says how much of the load is too much. One signal belongs to one shedder."""

    def sample(self, now: float) -> float:
        """The share of calls to refuse, 0 to 1. `now` is the gate's clock; called at most ten times a second."""


class _Ramp:
    """From 0 at `start` to 1 at `full`."""

    def __init__(self, start: float, full: float) -> None:
        self.start = checks.positive("start", start)
        self.full = checks.positive("full", full)
        if start >= full:
            raise ValueError(f"start must be less than full, got {start!r} and {full!r}")

    def __call__(self, value: float) -> float:
        return min(1.0, max(0.0, (value - self.start) / (self.full - self.start)))


class CpuSignal:
    """Sheds while the processor is busy: this process's time on it, over the cores it may use.

    The mean of about the last second. A service that does its work on one thread, as most asyncio services do, uses
    one core however many there are: say `cores=1`.

    Args:
        start: share of the cores in use from which calls are refused.
        full: share at which all would be.
        cores: how many there are to use; unless told, those this process may run on.
        container: count the whole container instead, and its quota: reads the files of cgroup v2 at each sample.

    Raises:
        ValueError: for `container` where there is no cgroup v2.

    Examples:
        >>> busy = CpuSignal(start=0.8, full=1.0, cores=1)
    """

    def __init__(
        self, *, start: float = 0.8, full: float = 1.0, cores: float | None = None, container: bool = False
    ) -> None:
        self._ramp = _Ramp(start, full)
        cgroup = _cgroup() if container else None
        self._used: Callable[[], float] = time.process_time if cgroup is None else lambda: _seconds_used(cgroup)
        self.cores = checks.positive("cores", cores) if cores is not None else _cores(cgroup)
        self._before: tuple[float, float] | None = None
        self._busy = 0.0

    def sample(self, now: float) -> float:
        """See `Signal.sample`."""
        used, before = self._used(), self._before
        if before is None or now <= before[0]:
            self._before = self._before or (now, used)
            return self._ramp(self._busy)
        elapsed = now - before[0]
        self._before = now, used
        share = (used - before[1]) / elapsed / self.cores
        self._busy += (share - self._busy) * (1 - math.exp(-elapsed))
        return self._ramp(self._busy)


def _cores(cgroup: Path | None) -> float:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    limit = cgroup / "cpu.max" if cgroup is not None else None
    if limit is not None and limit.exists():  # the root has none
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    return cores


def _cgroup() -> Path:
    """The folder of this process's cgroup; in a container its own looks like the root."""
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    lines = own.read_text().splitlines() if own.exists() else []
    names = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    for folder in (*(root / name for name in names), root):
        if (folder / "cpu.stat").exists():
            return folder
    raise ValueError("container=True needs cgroup v2, and there is none here; leave it out to count this process")


def _seconds_used(cgroup: Path) -> float:
    for line in (cgroup / "cpu.stat").read_text().splitlines():
        if line.startswith("usage_usec "):
            return int(line.split()[1]) / 1e6
    return 0.0


class QueueDelaySignal:
    """Sheds while work stands in a queue: how long it waits, at least, over five samples.

    A queue that is empty now and then only smooths a burst; one that never is (a standing queue, as CoDel calls
    it) is an overload. So the least of the last five delays counts.

    Args:
        source: returns the seconds that the head of a queue has waited, quickly and without blocking; unless told,
            how long a callback waits for its turn on the asyncio loop that makes the calls.
        start: seconds from which calls are refused.
        full: seconds at which all would be.

    Examples:
        >>> late = QueueDelaySignal(lambda: 0.3, start=0.1, full=0.5)
        >>> tuple(round(late.sample(now), 2) for now in range(6))
        (0.0, 0.0, 0.0, 0.0, 0.5, 0.5)
    """

    def __init__(self, source: Callable[[], float] | None = None, *, start: float = 0.05, full: float = 0.5) -> None:
        if not (source is None or callable(source)):
            raise TypeError(f"source must be a function that returns seconds, got {source!r}")
        self._source = _LoopLag() if source is None else source
        self._ramp = _Ramp(start, full)
        self._delays: deque[float] = deque([0.0] * 5, maxlen=5)

    def sample(self, now: float) -> float:
        """See `Signal.sample`."""
        self._delays.append(self._source())
        return self._ramp(min(self._delays))


class _LoopLag:
    """How late the running loop is: seconds a callback waited, or waits still, for its turn."""

    def __init__(self) -> None:
        self._asked: WeakKeyDictionary[asyncio.AbstractEventLoop, float] = WeakKeyDictionary()
        self._lag = 0.0

    def __call__(self) -> float:
        if not on_asyncio():
            return self._lag
        loop = asyncio.get_running_loop()
        asked = self._asked.get(loop)
        if asked is not None:
            return max(self._lag, loop.time() - asked)
        self._asked[loop] = loop.time()
        loop.call_soon(self._answer, loop)
        return self._lag

    def _answer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._lag = loop.time() - self._asked.pop(loop)
