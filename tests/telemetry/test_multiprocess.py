"""Several real processes, one set of numbers."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from seawall import Bulkhead, Pipeline
from seawall.telemetry import install
from seawall.telemetry.multiprocess import Workers

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # of Python 3.12
    pytest.mark.usefixtures("fresh"),
]


class Child:
    """A forked process that does as it is told, one word at a time."""

    def __init__(self, does):
        down, self._tell = os.pipe()
        self._hear, up = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(down), os.close(up)
            return
        code = 1
        try:
            with os.fdopen(down) as orders:
                for order in orders:
                    does(order.strip())
                    os.write(up, b".")
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)

    def do(self, order):
        os.write(self._tell, f"{order}\n".encode())
        assert os.read(self._hear, 1) == b"."

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._tell), os.close(self._hear)


@pytest.fixture
def registry(tmp_path):
    registry = CollectorRegistry()
    uninstall = install(registry=registry, multiprocess_dir=tmp_path)
    yield registry
    uninstall()


@pytest.fixture
def places():
    return Bulkhead("p", max_concurrent=10)


def worker(registry, places):
    """What a worker does: `call` makes a call and has its file written; `hold` takes a place and keeps it."""
    held = []

    def does(order):
        if order == "call":
            Pipeline(places, name="work").call_sync(len, "")
        elif order == "hold":
            held.append(places.admit())
        elif order == "count":
            assert finished(registry) == 6
        generate_latest(registry)

    return does


def finished(registry):
    return registry.get_sample_value("seawall_bulkhead_calls_total", {"policy_name": "p", "outcome": "finished"})


def timed(registry):
    labels = {"pipeline_name": "work", "outcome": "success", "error_type": ""}
    return registry.get_sample_value("seawall_pipeline_duration_seconds_count", labels)


def gauge(registry, name):
    return registry.get_sample_value(f"seawall_bulkhead_{name}", {"policy_name": "p"})


def test_workers_add_up_and_what_the_parent_counted_before_the_fork_counts_once(registry, places):
    for _ in range(3):
        Pipeline(places, name="work").call_sync(len, "")
    children = [Child(worker(registry, places)) for _ in range(2)]
    try:
        children[0].do("call")
        children[1].do("call")
        children[1].do("call")
        children[1].do("hold")
        assert (finished(registry), timed(registry)) == (6, 6)
        assert (gauge(registry, "active"), gauge(registry, "limit")) == (1, 30)
        children[0].do("count")  # whoever is scraped tells the same
    finally:
        for child in children:
            child.kill()


def test_a_killed_workers_counts_stay_and_its_gauges_go_and_files_do_not_pile_up(registry, places, tmp_path):
    for _ in range(3):
        child = Child(worker(registry, places))
        child.do("call")
        child.do("hold")
        child.kill()
        assert gauge(registry, "active") == 0
    assert (finished(registry), timed(registry)) == (3, 3)
    assert len(list(tmp_path.glob("seawall-*-*.json"))) == 1  # our own
    assert finished(registry) == 3


def test_a_dead_parent_is_not_kept_alive_by_its_child(registry, places, tmp_path):
    told = tmp_path / "grandchild"

    def does(order):
        generate_latest(registry)
        here, there = os.pipe()
        if not os.fork():
            told.write_text(str(os.getpid()))
            os.write(there, b".")
            signal.pause()
            os._exit(0)
        os.read(here, 1)

    child = Child(does)
    child.do("fork")
    child.kill()
    try:
        generate_latest(registry)
        assert not list(tmp_path.glob(f"seawall-{child.pid}-*"))
    finally:
        os.kill(int(told.read_text()), signal.SIGKILL)


@pytest.mark.timeout(60)
def test_a_fork_while_somebody_reads_leaves_the_child_no_lock_of_the_folder(registry, places, monkeypatch):
    reading, forking = threading.Event(), threading.Event()
    bury, before = Workers._bury, Workers.forking

    def bury_as_a_fork_begins(self):
        reading.set()
        assert forking.wait(30)
        bury(self)

    def tell(self):
        forking.set()
        before(self)

    monkeypatch.setattr(Workers, "_bury", bury_as_a_fork_begins)
    monkeypatch.setattr(Workers, "forking", tell)
    scrape = threading.Thread(target=generate_latest, args=(registry,))
    scrape.start()
    assert reading.wait(30)
    child = Child(worker(registry, places))
    try:
        scrape.join()
        child.do("call")
        assert finished(registry) == 1
    finally:
        child.kill()


class SlowToTell(Bulkhead):
    def counters(self):
        self.asked.set()
        assert self.go_on.wait(30)
        return super().counters()


@pytest.mark.timeout(60)
def test_a_child_can_be_scraped_that_was_forked_in_the_middle_of_a_scrape():
    registry, slow = CollectorRegistry(), SlowToTell("p", max_concurrent=1)
    slow.asked, slow.go_on = threading.Event(), threading.Event()
    os.register_at_fork(before=slow.go_on.set)  # runs before those that were there
    uninstall = install(registry=registry)
    scrape = threading.Thread(target=generate_latest, args=(registry,))
    scrape.start()
    assert slow.asked.wait(30)
    child = Child(lambda order: generate_latest(registry))
    try:
        scrape.join()
        child.do("scrape")
    finally:
        child.kill()
        uninstall()


def test_a_death_in_the_middle_of_burying_counts_nothing_twice(registry, places, tmp_path, monkeypatch):
    child = Child(worker(registry, places))
    child.do("call")
    child.kill()
    (file,) = tmp_path.glob(f"seawall-{child.pid}-*.json")
    (lock,) = tmp_path.glob(f"seawall-{child.pid}-*.lock")
    kept = file.read_text()
    assert finished(registry) == 1
    file.write_text(kept)  # as if we had died before we deleted it
    lock.touch()
    assert finished(registry) == 1
    assert not file.exists()


def test_the_environment_variable_of_prometheus_client_does_as_well(monkeypatch, tmp_path, places):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    registry = CollectorRegistry()
    uninstall = install(registry=registry)
    with places.scope():
        pass
    assert finished(registry) == 1
    uninstall()
    (file,) = tmp_path.glob("seawall-*-*.json")
    assert json.loads(file.read_text())["counters"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        install(registry=CollectorRegistry(), multiprocess_dir=tmp_path / "nowhere")


def test_the_writer_ends_with_the_export_and_goes_on_when_the_disk_fails(tmp_path, fresh, caplog, monkeypatch):
    monkeypatch.setattr("seawall.telemetry.multiprocess.EVERY", 0.001)
    workers = Workers(tmp_path, fresh)
    failed = []

    def fail():
        failed.append(1)
        if len(failed) == 2:
            workers._stopping.set()
        raise OSError("disk full")

    monkeypatch.setattr(workers, "write", fail)
    workers._thread.join(10)
    monkeypatch.undo()
    assert len(failed) == 2
    assert "will try again" in caplog.text
    workers.close()
    assert not workers._thread.is_alive()
