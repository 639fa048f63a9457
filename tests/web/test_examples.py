"""The applications in `examples/`, run as their docstrings say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.web.servers import free_port, get, running

EXAMPLES = Path(__file__).parents[2] / "examples"
APPS = ("web_aiohttp", "web_django", "web_fastapi", "web_flask", "web_litestar")


@pytest.mark.parametrize("name", APPS)
def test_an_example_serves_reports_streams_and_probes(name):
    port = free_port()
    with running(str(EXAMPLES / f"{name}.py"), str(port), port=port):
        status, _, body = get(port, "/report/7", grpc_timeout="5S")
        assert (status, json.loads(body)["rows"][0]) == (200, "row 0 of report 7")
        assert 0 < json.loads(body)["seconds_left"] <= 5
        status, headers, body = get(port, "/stream/7")
        assert (status, body.count(b"data: ")) == (200, 3)
        assert headers["content-type"].startswith("text/event-stream")
        assert json.loads(get(port, "/readyz")[2]) == {"status": "ready", "failed": []}
        assert get(port, "/report/7", x_request_deadline="5")[0] == 504


def test_an_example_calls_two_hosts_of_which_one_fails():
    said = subprocess.run(
        [sys.executable, str(EXAMPLES / "web_outgoing.py")], check=True, capture_output=True, text=True
    ).stdout
    assert re.fullmatch(r"after \d+ failures nobody asks .*\nthe other host answers 200: hello\n", said)
