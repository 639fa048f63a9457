"""Under a server that forks its workers after it has loaded the application: gunicorn with --preload."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("gunicorn")
ROOT = Path(__file__).parents[2]


@contextmanager
def gunicorn(how, tmp_path):
    """A real one; gives a function that asks it, over a socket of its own."""
    path = tmp_path / "s"
    log = (tmp_path / "log").open("w+")
    command = [
        "-m",
        "gunicorn",
        "--preload",
        "--workers",
        "1",
        "--bind",
        f"unix:{path}",
        "tests.inference.served_app:app",
    ]
    server = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "HOW": how, "PYTHONPATH": f"{ROOT}/src"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        yield lambda: asked(path, server)
    finally:
        server.send_signal(signal.SIGTERM)
        assert 0 == server.wait(30)
        log.seek(0)
        text = log.read()
        log.close()
        assert "Traceback" not in text, text


def asked(path, server):
    import http.client
    import socket

    end = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(str(path))
            connection.request("GET", "/")
            return connection.getresponse().read().decode()
        except OSError:  # it has not begun to listen
            assert server.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        finally:
            connection.close()


def test_a_model_that_was_loaded_before_the_fork_is_refused_at_once_and_no_request_hangs(tmp_path):
    with gunicorn("early", tmp_path) as ask:
        assert "load it in each worker process" in ask()
        assert "load it in each worker process" in ask()


def test_one_that_is_loaded_in_the_worker_serves(tmp_path):
    with gunicorn("late", tmp_path) as ask:
        assert 2 * ["(1, 64)"] == [ask(), ask()]


def test_one_that_is_supervised_is_loaded_anew_in_the_worker(tmp_path):
    with gunicorn("supervised", tmp_path) as ask:
        seen = [ask()]
        while seen[-1] != "(1, 64)":
            seen.append(ask())
    assert "load it in each worker process" in seen[0]
    assert {"CircuitOpenError"} >= set(seen[1:-1])
