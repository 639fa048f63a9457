"""What objectives counted survives the process, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import SLO, listen
from seawall.slo.snapshots import (
    SnapshotError,
    SnapshotIgnored,
    SnapshotRestored,
    persist,
    read_snapshot,
    write_snapshot,
)

WORKER = """
import sys
from seawall import SLO
from seawall.slo.snapshots import persist
slo = SLO("answers", target=0.9)
stop = persist(sys.argv[1], slo, every=0.05)
print(round(slo.error_budget, 6), flush=True)
for line in sys.stdin:
    for outcome in line.split():
        slo.admit().success() if outcome == "good" else slo.admit().failure(OSError())
    print(round(slo.error_budget, 6), flush=True)
"""


class Worker:
    """A process that keeps an objective in a file, and answers with what is left of its budget."""

    def __init__(self, path):
        command = [sys.executable, "-c", WORKER, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.path = path
        self.budget = float(self.process.stdout.readline())

    def count(self, outcomes):
        self.process.stdin.write(outcomes + "\n")
        self.process.stdin.flush()
        self.budget = float(self.process.stdout.readline())
        return self.budget

    def written(self, calls):
        """Wait until the file has so many calls."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if self.path.exists() and calls_in(self.path) == calls:
                return
            time.sleep(0.01)  # a real process: there is nothing to wait on
        pytest.fail("the process wrote nothing")

    def ended(self, how):
        if how is None:
            self.process.stdin.close()
        else:
            self.process.send_signal(how)
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()


def calls_in(path):
    states, _ = read_snapshot(path)
    return sum(good + bad for good, bad in states["answers"].rings[-1].growth)


@pytest.fixture
def heard():
    found = []
    stop = listen(found.append)
    yield found
    stop()


def counted(good, bad, **settings):
    slo = SLO("answers", **{"target": 0.9, **settings})
    for _ in range(good):
        slo.admit().success()
    for _ in range(bad):
        slo.admit().failure(OSError())
    return slo


def test_a_killed_process_is_remembered_by_the_next_one(tmp_path):
    path = tmp_path / "slo.json"
    first = Worker(path)
    assert first.budget == 1.0
    left = first.count("good " * 95 + "bad " * 5)
    first.written(100)
    first.ended(signal.SIGKILL)
    second = Worker(path)
    assert (second.budget, left) == (0.5, 0.5)
    second.count("bad " * 5)
    second.ended(None)  # of its own accord: it writes a last time
    assert calls_in(path) == 105
    assert sorted(one.name for one in tmp_path.iterdir()) == ["slo.json", "slo.json.lock"]


def test_restarts_that_overlap_add_up(tmp_path):
    path = tmp_path / "slo.json"
    old = Worker(path)
    old.count("good " * 10)
    old.written(10)
    new = Worker(path)
    assert new.count("bad bad") == -9.0  # by itself: the other one keeps the file
    old.count("good " * 8)
    old.ended(None)
    new.written(20)
    assert new.count("") == 0.0  # 2 of 20 bad, where 10 % are tolerated
    new.ended(None)


def test_the_file_is_replaced_in_one_go_and_nobody_else_may_read_it(tmp_path, monkeypatch):
    path = tmp_path / "slo.json"
    write_snapshot(path, [counted(3, 1)])
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "no space left")))
    with pytest.raises(OSError, match="no space"):
        write_snapshot(path, [counted(1, 1)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fails_is_logged_and_tried_again(tmp_path, monkeypatch, caplog):
    path, tries = tmp_path / "slo.json", []
    real = os.fsync

    def fails_once(descriptor):
        tries.append(descriptor)
        if len(tries) == 1:
            raise OSError(28, "no space left")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails_once)
    stop = persist(path, counted(1, 0), every=0.01)
    until = time.monotonic() + 20
    while len(tries) < 2 and time.monotonic() < until:
        time.sleep(0.005)  # a real thread writes
    stop()
    assert "will try again" in caplog.text
    assert calls_in(path) == 1


def whole():
    return {"format": "seawall-slo", "version": 1, "written": 0, "objectives": {}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is no snapshot"),
        ("\x00\xff", "is no snapshot"),
        ("[" * 100_000, "is no snapshot"),
        ("[1]", "its format is not 'seawall-slo'"),
        (json.dumps({**whole(), "version": 2}), "has version 2, and this seawall reads version 1"),
        (json.dumps({**whole(), "objectives": {"answers": {}}}), "is damaged: KeyError: 'rings'"),
        (json.dumps({**whole(), "written": "now"}), "is damaged: ValueError: must be a number of seconds, got 'now'"),
        (
            json.dumps(
                {**whole(), "objectives": {"answers": {"rings": [{"slot": 1, "phase": 0, "growth": [[-1, 2]]}]}}}
            ),
            "is damaged: ValueError: a slot must have two counts, got -1 and 2",
        ),
    ],
)
def test_a_damaged_file_is_ignored_told_and_overwritten(tmp_path, heard, text, problem):
    path = tmp_path / "slo.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SnapshotError, match=problem.replace("[", r"\[")):
        read_snapshot(path)
    slo = counted(1, 1)
    persist(path, slo)()
    (event,) = [one for one in heard if isinstance(one, SnapshotIgnored)]
    assert (event.policy, event.path, problem in event.problem) == ("answers", str(path), True)
    assert calls_in(path) == 2


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 5_000), byte=st.integers(0, 255))
def test_no_damaged_byte_breaks_the_start(tmp_path_factory, place, byte):
    path = tmp_path_factory.mktemp("damaged") / "slo.json"
    write_snapshot(path, [counted(50, 5)])
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    path.write_bytes(data)
    slo = counted(1, 0)
    persist(path, slo)()
    assert slo.error_budget <= 1.0


def test_each_objective_goes_on_by_itself(tmp_path, heard):
    path = tmp_path / "slo.json"
    write_snapshot(path, [counted(8, 2), SLO("other", target=0.5, window=60.0), SLO("gone", target=0.5)])
    answers, other = SLO("answers", target=0.9), SLO("other", target=0.5, window=120.0)
    persist(path, answers, other, SLO("new", target=0.5))()
    assert answers.error_budget == pytest.approx(-1.0)
    assert [(type(event), event.policy) for event in heard if "Snapshot" in type(event).__name__] == [
        (SnapshotRestored, "answers"),
        (SnapshotIgnored, "other"),
    ]
    assert "window of 120 s, and the state is of 60 s" in heard[-1].problem


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_file_to_its_parent(tmp_path):
    path = tmp_path / "slo.json"
    slo = counted(1, 0)
    stop = persist(path, slo)
    child = os.fork()
    if child == 0:
        slo.admit().success()
        stop()
        os._exit(path.exists())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop()
    assert calls_in(path) == 1


def test_it_ends_with_its_thread_and_its_lock(tmp_path):
    path = tmp_path / "slo.json"
    before, threads = len(list(Path("/dev/fd").iterdir())), threading.active_count()
    stop = persist(path, counted(1, 0))
    stop()
    stop()
    assert (len(list(Path("/dev/fd").iterdir())), threading.active_count()) == (before, threads)


@pytest.mark.parametrize(
    ("slos", "path", "settings", "error", "rule"),
    [
        ([], "slo.json", {}, ValueError, "slos must be one or more"),
        (["a", "a"], "slo.json", {}, ValueError, "each with a name of its own, got a, a"),
        (["a"], "no/slo.json", {}, NotADirectoryError, "in a folder that exists"),
        (["a"], "slo.json", {"every": 0}, ValueError, "every must be more than 0"),
    ],
)
def test_a_bad_setting_is_refused(tmp_path, slos, path, settings, error, rule):
    with pytest.raises(error, match=rule):
        persist(tmp_path / path, *(SLO(name, target=0.9) for name in slos), **settings)
