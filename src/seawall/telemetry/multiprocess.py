"""Several processes as one: each keeps a file of its numbers, and whoever is scraped adds them all up.

For servers with workers, such as gunicorn. Each process writes its file every second and at its end. A lock on a
second file, which the kernel lets go of however a process ends, says whether it is alive. What a dead one counted
moves into one common file, so that counters never go back and files do not pile up; its gauges are gone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seawall.core import events
from seawall.core.watching import Histogram
from seawall.telemetry.ledger import Histograms, Ledger, Numbers, Snapshot, merged

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows, which has no forking servers either
    fcntl = None  # type: ignore[assignment]

EVERY = 1.0  # seconds between writes
_ENDED = "seawall-ended.json"
_ALL = "seawall.lock"


class Workers:
    """The numbers of this process in `folder`, and those of all processes there.

    Args:
        folder: an existing folder that only this service writes to, empty when the service starts.
        ledger: the numbers of this process.
    """

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        if fcntl is None:
            raise RuntimeError("numbers of several processes need a POSIX system; export one process at a time here")
        if not folder.is_dir():
            raise NotADirectoryError(f"multiprocess_dir must be an existing folder, got {str(folder)!r}")
        self._folder = folder
        self._ledger = ledger
        self._writing = threading.Lock()
        self._alone = threading.Lock()
        self._open = True
        self._begin()
        _here.add(self)

    def _begin(self) -> None:
        self._mine = f"seawall-{os.getpid()}-{secrets.token_hex(4)}"
        with self._locked():  # or somebody would find the file before its lock, and bury us alive
            self._alive = os.open(self._folder / f"{self._mine}.lock", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write_often, name="seawall-metrics", daemon=True)
        self._thread.start()
        self.write()

    def forking(self) -> None:
        """Before a fork: nobody is in the folder, or the child would have its lock as well, and keep it for good."""
        self._alone.acquire()

    def forked(self, *, child: bool) -> None:
        """After it: a child has numbers and a file of its own, and must not keep its parent's alive."""
        self._alone.release()
        if child and self._open:
            os.close(self._alive)
            self._writing = threading.Lock()
            self._ledger.disinherit()
            self._begin()

    def _write_often(self) -> None:
        stopping = self._stopping
        while not stopping.wait(EVERY):
            try:
                self.write()
            except Exception:
                events.logger.exception("the metrics of this process could not be written; will try again")

    def write(self) -> None:
        """Write this process's numbers."""
        with self._writing:
            _replace(self._folder / f"{self._mine}.json", encoded(self._ledger.snapshot()))

    def read(self) -> Snapshot:
        """The numbers of all processes."""
        self.write()
        with self._locked():
            self._bury()
            found = [(_read(self._folder / _ENDED), False)]
            found += [(_read(path), True) for path in sorted(self._folder.glob("seawall-*-*.json"))]
        return merged(found)

    def _bury(self) -> None:
        """Move what dead processes counted into the common file; with the folder locked."""
        dead = [lock for lock in self._folder.glob("seawall-*-*.lock") if not _held(lock)]
        if not dead:
            return
        grave = self._folder / _ENDED
        buried = set(_load(grave).get("buried", ()))  # whose own files may still be there, if we died half-way
        files = [lock.with_suffix(".json") for lock in dead]
        whole = merged([(_read(grave), False), *((_read(file), False) for file in files if file.stem not in buried)])
        _replace(grave, {**encoded(whole), "buried": [file.stem for file in files]})
        for file, lock in zip(files, dead, strict=True):
            file.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone in the folder."""
        with self._alone:
            descriptor = os.open(self._folder / _ALL, os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Write a last time and stop; from now on this process counts as ended."""
        if self._open:
            self._open = False
            self._stopping.set()
            self._thread.join()
            try:
                self.write()
            finally:
                os.close(self._alive)


_here: weakref.WeakSet[Workers] = weakref.WeakSet()  # of this process, closed ones too
_forking: list[Workers] = []  # strong, from before a fork until after it


def _before() -> None:
    for workers in list(_here):
        workers.forking()
        _forking.append(workers)


def _after(*, child: bool) -> None:
    while _forking:
        _forking.pop().forked(child=child)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before,
        after_in_parent=functools.partial(_after, child=False),
        after_in_child=functools.partial(_after, child=True),
    )


def _held(lock: Path) -> bool:
    """Whether the process of this lock is alive."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return True  # buried by somebody else
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _replace(path: Path, data: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data), encoding="utf-8")
    new.replace(path)


def _load(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def _read(path: Path) -> Snapshot:
    return decoded(_load(path))


def encoded(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as plain data, for JSON."""
    return {
        "counters": _rows(snapshot.counters),
        "gauges": _rows(snapshot.gauges),
        "histograms": [
            [metric, list(attributes), list(one.bounds), one.counts, one.total]
            for metric, rows in snapshot.histograms.items()
            for attributes, one in rows.items()
        ],
    }


def _rows(numbers: Numbers) -> list[Any]:
    return [[metric, list(attributes), value] for metric, rows in numbers.items() for attributes, value in rows.items()]


def decoded(data: dict[str, Any]) -> Snapshot:
    """The snapshot that was encoded."""
    histograms: Histograms = {}
    for metric, attributes, bounds, counts, total in data.get("histograms", ()):
        one = Histogram(tuple(bounds))
        one.counts, one.total = counts, total
        histograms.setdefault(metric, {})[tuple(map(tuple, attributes))] = one
    return Snapshot(_numbers(data.get("counters", ())), _numbers(data.get("gauges", ())), histograms)


def _numbers(rows: list[Any]) -> Numbers:
    numbers: Numbers = {}
    for metric, attributes, value in rows:
        numbers.setdefault(metric, {})[tuple(map(tuple, attributes))] = value
    return numbers
