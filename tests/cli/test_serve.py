"""`seawall serve` as an operator runs it: a process, a port, signals."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest

from seawall.cli import main
from seawall.cli.serve import listen
from seawall.inference import models
from seawall.inference.models.cache import locked

MODEL = "smollm2-135m"
STORY = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0.0}


@contextlib.contextmanager
def started(*arguments, **environment):
    """A server that has just been started."""
    command = [sys.executable, "-W", "error", "-m", "seawall", "serve", MODEL, *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def serving(*arguments, **environment):
    """A running server, and where it listens."""
    with started("--port", "0", *arguments, **environment) as process:
        line = process.stdout.readline()
        found = re.fullmatch(r"seawall: (.+) on http://127\.0\.0\.1:(\d+)/v1\n", line)
        assert found, process.stderr.read()
        yield process, int(found[2])


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def client_of(port, key="x"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


def _names(metrics):
    return set(re.findall(r"^([\w:]+)", metrics, re.MULTILINE))


@pytest.mark.model
def test_it_serves_those_with_a_key_and_on_sigterm_ends_what_is_in_flight():
    with (
        serving("--drain-delay", "0.5", "--api-key-env", "KEYS", KEYS="one, two") as (process, port),
        client_of(port, "two") as client,
    ):
        assert (200, "ready") == (get(port, "/readyz")[0], json.loads(get(port, "/readyz")[1])["status"])
        assert {"seawall_engine_calls_total", "vllm:num_requests_running"} <= _names(get(port, "/metrics")[1])
        with client_of(port, "three") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()

        stream = client.chat.completions.create(**STORY, max_tokens=150, stream=True)
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        while (ready := get(port, "/readyz"))[0] == 200:
            pass
        assert (503, ["draining"]) == (ready[0], json.loads(ready[1])["failed"])
        assert 200 == get(port, "/livez")[0]
        late = client.chat.completions.with_raw_response.create(**STORY, max_tokens=1)  # still served, and told to go
        assert "close" == late.headers["connection"]
        chunks += stream

        assert "length" == chunks[-1].choices[0].finish_reason
        assert (0, "") == (process.wait(60), process.stderr.read())
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


@pytest.mark.model
def test_answers_that_take_longer_than_the_patience_end_with_an_error_that_says_so():
    with serving("--drain-timeout", "0.1") as (process, port), client_of(port) as client:
        stream = client.chat.completions.create(**STORY, max_tokens=2000, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the model cannot answer now"):
            list(stream)

        assert 0 == process.wait(60)
        [line] = process.stderr.read().splitlines()
        assert "EngineClosedError" in line


@pytest.mark.model
def test_told_to_stop_while_another_process_converts_the_model_it_waits_no_longer(tmp_path):
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "source").symlink_to(models.locate(MODEL).parent)
    target = tmp_path / MODEL / models.prepare(MODEL).folder.name
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with locked(target), started("--port", str(port), SEAWALL_CACHE=str(tmp_path)) as process:
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                ready = get(port, "/readyz")
                break
        assert (503, ["model"]) == (ready[0], json.loads(ready[1])["failed"])
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(60)


def test_no_piece_waits_until_the_one_before_it_is_acknowledged():
    async def accepted(listener):
        """What asyncio makes of a connection to `listener`."""
        made = asyncio.get_running_loop().create_future()
        async with await asyncio.start_server(lambda _, writer: made.set_result(writer), sock=listener):
            with socket.create_connection(listener.getsockname()):
                writer = await made
            option = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
        return option

    assert asyncio.run(accepted(listen("127.0.0.1", 0)))


@pytest.mark.model
def test_a_killed_server_is_an_error_to_its_clients_and_never_a_hang():
    with serving() as (process, port), client_of(port) as client:
        stream = client.chat.completions.create(**STORY, max_tokens=2000, stream=True)
        next(stream)
        process.kill()
        with pytest.raises(Exception, match=r"peer closed connection|Connection error|reset"):
            list(stream)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["no-such-model"], "unknown model 'no-such-model'"),
        ([MODEL, "--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        ([MODEL, "--api-key-env", "NOT_SET"], "$NOT_SET must hold API keys"),
        ([MODEL, "--host", "192.0.2.1"], "must be an address of this machine and a port that is free (0 for any)"),
        ([MODEL, "--kv", "fp7"], "kv must be one of"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(arguments, reason):
    command = [sys.executable, "-m", "seawall", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert (1, "") == (done.returncode, done.stdout)
    [line] = done.stderr.splitlines()
    assert reason in line


@pytest.mark.parametrize("option", ["context", "threads", "rows", "max-tokens", "timeout"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "many"])
def test_a_number_that_makes_no_sense_is_refused_at_once(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["serve", MODEL, f"--{option}={value}"])
    assert f"--{option}: must be a" in (said := capsys.readouterr().err)
    assert f"number above 0, got {value!r}" in said


@pytest.mark.parametrize("option", ["max-queued", "temperature", "drain-delay", "drain-timeout"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "many"])
def test_a_number_that_may_be_nothing_may_not_be_less(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["serve", MODEL, f"--{option}={value}"])
    assert f"number of 0 or more, got {value!r}" in capsys.readouterr().err
