"""Several workers of real servers, one of which dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.web.servers import free_port, get, raw, running

HERE = str(Path(__file__).parent)
SERVERS = {
    "uvicorn": ("-m", "uvicorn", "--app-dir", HERE, "workers_app:app", "--workers", "2", "--port"),
    "gunicorn": ("-m", "gunicorn", "--chdir", HERE, "workers_app:wsgi", "--workers", "2", "--threads", "4", "--bind"),
}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn and SIGKILL are for POSIX")


def pids(port, least):
    """The workers that answer, once there are so many of them."""
    found = set()
    while len(found) < least:
        found.add(json.loads(get(port, "/pid")[2])["pid"])
    return found


@pytest.mark.parametrize("server", SERVERS)
def test_a_worker_that_is_killed_takes_its_requests_along_and_nothing_else(server):
    port = free_port()
    bind = f"127.0.0.1:{port}" if server == "gunicorn" else str(port)
    with running(*SERVERS[server], bind, port=port):
        before = pids(port, 2)
        with raw(port, "GET /slow HTTP/1.1", "host: x", "") as cut:
            said = b""
            while b"pid " not in said or not said.partition(b"pid ")[2].partition(b" ")[1]:
                said += cut.recv(4096)
            pid = int(said.partition(b"pid ")[2].split()[0])
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ConnectionResetError):
                while cut.recv(4096):  # to its end; it would hang if nobody cut it
                    pass
        survivors = pids(port, 2)
        assert pid not in survivors
        assert survivors & before
        # each worker has places of its own, none of which the dead one has kept
        assert {json.loads(get(port, "/pid")[2])["active"] for _ in range(8)} == {1}


@pytest.mark.parametrize("server", SERVERS)
def test_each_worker_answers_for_its_own_policies(server):
    port = free_port()
    bind = f"127.0.0.1:{port}" if server == "gunicorn" else str(port)
    with running(*SERVERS[server], bind, port=port):
        pids(port, 2)
        status, headers, body = get(port, "/full")
        assert (status, json.loads(body)["code"]) == (503, "overloaded")
        assert headers["content-type"] == "application/problem+json"
