"""The example in `examples/`, run as its docstring says."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.web.openai.conftest import post
from tests.web.openai.scripted import eventually

EXAMPLE = Path(__file__).parents[3] / "examples" / "openai_server.py"


def get(port, path):
    return post(port, path, b"", method="GET")


def ready(port):
    with contextlib.suppress(OSError, http.client.HTTPException):
        return get(port, "/health/readyz")[0] == 200
    return False


@pytest.mark.model
def test_the_example_serves_its_own_pages_the_model_its_probes_and_metrics():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-W", "error", EXAMPLE, str(port)], stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: ready(port) or process.poll() is not None)
        question = {"model": "smollm2-135m", "prompt": "The sea is", "max_tokens": 2}
        status, _, body = post(port, "/v1/completions", question)
        assert (200, 2) == (status, json.loads(body)["usage"]["completion_tokens"])
        assert b"hello" == get(port, "/")[2]
        assert b'vllm:generation_tokens_total{model_name="smollm2-135m"} 2.0' in get(port, "/metrics/")[2]
        statuses = {post(port, "/v1/completions", {})[0] for _ in range(20)}
        assert {400, 429} == statuses
    finally:
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=60)
    assert "" == complaints
