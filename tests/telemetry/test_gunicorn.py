"""Under a real gunicorn any worker that is scraped tells the numbers of all of them."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("gunicorn")
ROOT = Path(__file__).parent.parent.parent


@contextmanager
def gunicorn(folder, *options):
    """Asks a gunicorn of two workers: the body of a path."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    port = listener.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "--workers=2", f"--bind=fd://{listener.fileno()}", *options]
    process = subprocess.Popen(
        [*command, "tests.telemetry.gunicorn_app:app"],
        cwd=ROOT,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
        pass_fds=[listener.fileno()],
        stderr=subprocess.DEVNULL,
    )
    listener.close()

    def ask(path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(20)


def served_by_both(ask):
    """How many calls it took until two workers had served some, and which."""
    calls, workers = 0, set()
    while len(workers) < 2:
        workers.add(int(ask("/")))
        calls += 1
        assert calls < 1000
    return calls, workers


def told(ask, metric):
    text = ask("/metrics")
    return sum(float(value) for value in re.findall(rf'^{metric}{{.*policy_name="shop".*}} (\S+)$', text, re.MULTILINE))


FINISHED = "seawall_bulkhead_calls_total"


@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["after the fork", "before the fork"])
def test_whichever_worker_is_scraped_tells_the_calls_of_all_and_keeps_those_of_one_that_was_killed(tmp_path, options):
    with gunicorn(tmp_path, *options) as ask:
        calls, workers = served_by_both(ask)
        until = time.monotonic() + 20
        while told(ask, FINISHED) < calls and time.monotonic() < until:
            time.sleep(0.05)  # real processes: the other one writes once a second
        assert {told(ask, FINISHED) for _ in range(6)} == {calls}
        if not options:  # else the process that forked them has places of its own
            assert told(ask, "seawall_bulkhead_limit") == 5 * 2
        os.kill(workers.pop(), signal.SIGKILL)
        more = 1
        while int(ask("/")) in workers:  # gunicorn starts another one
            more += 1
            assert more < 10_000
        until = time.monotonic() + 20
        while told(ask, FINISHED) < calls + more and time.monotonic() < until:
            time.sleep(0.05)
        assert told(ask, FINISHED) == calls + more
