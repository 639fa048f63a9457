"""What objectives counted, in a file: so that a restart does not forget how much of the budget is gone."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from seawall.core import checks, events
from seawall.core.events import Event
from seawall.slo.objective import SLO
from seawall.slo.tracker import RingState, TrackerState

if sys.platform != "win32":
    import fcntl

FORMAT = "seawall-slo"
VERSION = 1
LARGEST = 16_000_000  # bytes of a file; an objective has some ten thousand
_MOST = 2**53  # calls of a slot


class SnapshotError(ValueError):
    """A file is no snapshot that this version can read."""


@dataclass(frozen=True, slots=True)
class SnapshotRestored(Event):
    """An objective goes on from a snapshot that is `age` seconds old."""

    age: float


@dataclass(frozen=True, slots=True)
class SnapshotIgnored(Event):
    """An objective begins anew, for its snapshot can't be used: `problem` says why."""

    path: str
    problem: str


def write_snapshot(path: str | os.PathLike[str], slos: Iterable[SLO]) -> None:
    """Put what the objectives counted into a file, all at once: whoever reads it meets the old one or the new one.

    OSError if the disk says no; the old file stays then.
    """
    path = Path(path)
    states = {slo.name: asdict(slo.state()) for slo in slos}
    data = {"format": FORMAT, "version": VERSION, "written": time.time(), "objectives": states}
    new = path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(data, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def read_snapshot(path: str | os.PathLike[str]) -> tuple[dict[str, TrackerState], float]:
    """What the objectives of a file had counted, by name, and how many seconds ago that was.

    FileNotFoundError if there is none, SnapshotError if it is none of this version.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise SnapshotError(f"{path} has more than {LARGEST:,} bytes, which no snapshot has")
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotError(f"{path} is no snapshot: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SnapshotError(f"{path} is no snapshot of objectives: its format is not {FORMAT!r}")
    if data.get("version") != VERSION:
        raise SnapshotError(f"{path} has version {data.get('version')!r}, and this seawall reads version {VERSION}")
    try:
        written = _number(data["written"])
        states = {str(name): _state(state) for name, state in dict(data["objectives"]).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return states, max(0.0, time.time() - written)


def persist(path: str | os.PathLike[str], *slos: SLO, every: float | timedelta = 60.0) -> Callable[[], None]:
    """Go on where the file left off, and keep it up to date: from a thread, and when the process ends.

    A process that is killed loses what came since the last writing. A file that can't be used is ignored, with a
    `SnapshotIgnored` event, and overwritten. Each process needs a file of its own, and a forked one calls this itself.
    A file that another process still keeps, as in a restart that overlaps, is taken over when that one ends, and what
    both counted adds up; a lock file beside it says so.

    Args:
        path: of the file, in a folder that exists.
        slos: what to keep; their names must differ.
        every: seconds between two writings.

    Returns:
        A function that writes a last time and stops.

    Examples:
        >>> import tempfile
        >>> answers = SLO("answers", target=0.999)
        >>> stop = persist(f"{tempfile.mkdtemp()}/slo.json", answers)
        >>> stop()
    """
    names = [slo.name for slo in slos]
    if not slos or len(set(names)) < len(names):
        raise ValueError(f"slos must be one or more, each with a name of its own, got {', '.join(names) or 'none'}")
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise NotADirectoryError(f"path must be in a folder that exists, got {str(path)!r}")
    keeper = _Keeper(path, slos, checks.seconds("every", every))
    atexit.register(keeper.close)
    return keeper.close


class _Keeper:
    """Keeps one file, once no other process does: a lock beside it, which the kernel lets go of, says so."""

    def __init__(self, path: Path, slos: tuple[SLO, ...], every: float) -> None:
        self._path, self._slos, self._every = path, slos, every
        self._descriptor: int | None = None
        self._ours = False
        self._open = True
        self._stopping = threading.Event()
        self._take_over()
        self._thread = threading.Thread(target=self._write_often, name="seawall-slo-snapshots", daemon=True)
        self._thread.start()
        _keepers.add(self)

    def _take_over(self) -> None:
        """Go on from the file, if nobody else keeps it."""
        self._ours = self._ours or self._locked()
        if self._ours:
            _restore(self._path, self._slos)

    def _locked(self) -> bool:
        if sys.platform == "win32":
            return True
        if self._descriptor is None:
            lock = self._path.with_name(f"{self._path.name}.lock")
            self._descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _write_often(self) -> None:
        while not self._stopping.wait(self._every):
            self._write()

    def _write(self) -> None:
        try:
            if not self._ours:
                self._take_over()
            if self._ours:
                write_snapshot(self._path, self._slos)
        except Exception:
            events.logger.exception("the snapshot of objectives could not be written to %s; will try again", self._path)

    def close(self) -> None:
        """Write a last time and stop."""
        if self._open:
            self._open = False
            self._stopping.set()
            self._thread.join()
            self._write()
            self._let_go()
            atexit.unregister(self.close)

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def forget(self) -> None:
        """In a forked child: the file is the parent's, and so is the lock, which must not outlive it here."""
        self._open = False
        self._let_go()


_keepers: weakref.WeakSet[_Keeper] = weakref.WeakSet()


def _forked() -> None:
    for keeper in list(_keepers):
        keeper.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _restore(path: Path, slos: Iterable[SLO]) -> None:
    """Let each objective go on from the file; who can't, says so."""
    try:
        states, age = read_snapshot(path)
    except FileNotFoundError:
        return
    except (OSError, SnapshotError) as error:
        for slo in slos:
            _tell(slo, SnapshotIgnored, str(path), str(error))
        return
    for slo in slos:
        if slo.name in states:
            try:
                slo.restore(states[slo.name], ago=age)
            except (ValueError, IndexError, OverflowError) as error:  # another window, or slots that are not ours
                _tell(slo, SnapshotIgnored, str(path), str(error))
            else:
                _tell(slo, SnapshotRestored, age)


def _tell(slo: SLO, event: Callable[..., Event], *details: object) -> None:
    with slo._lock:
        slo._emit(event, slo._now(), *details)
    events.deliver()


def _state(data: Mapping[str, object]) -> TrackerState:
    rings = [_ring(one) for one in data["rings"]]  # type: ignore[attr-defined]
    return TrackerState(_number(data["window"]), _number(data["covered"]), rings)


def _ring(data: Mapping[str, object]) -> RingState:
    growth = []
    for good, bad in data["growth"]:  # type: ignore[attr-defined]
        if not (type(good) is type(bad) is int and 0 <= good < _MOST and 0 <= bad < _MOST):
            raise ValueError(f"a slot must have two counts, got {good!r:.50} and {bad!r:.50}")
        growth.append([good, bad])
    return RingState(_number(data["slot"]), _number(data["phase"]), growth)


def _number(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e12:  # type: ignore[operator]
        raise ValueError(f"must be a number of seconds, got {value!r:.50}")
    return float(value)  # type: ignore[arg-type]
