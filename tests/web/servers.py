"""Real servers on a free port, each in a thread of this process, and clients that misbehave on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import django
import uvicorn
import waitress
from aiohttp import web
from django.conf import settings as django_settings


def listening():
    """A socket that accepts: who comes before the server is up waits."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    return listener


@contextmanager
def uvicorn_serves(app, *, lifespan="off", **config):
    """The port of a running uvicorn."""
    listener = listening()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan=lifespan, **config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


@contextmanager
def waitress_serves(app):
    """The port of a running waitress."""
    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=4)
    thread = threading.Thread(target=server.run, name="waitress")
    thread.start()
    try:
        yield server.effective_port
    finally:
        with contextlib.suppress(OSError):  # its thread may be quicker, and have closed already
            server.trigger.pull_trigger(server.close)  # in its own thread, which then has nothing to listen to
        thread.join(20)
        server.task_dispatcher.shutdown()


@contextmanager
def aiohttp_serves(app, **runner_options):
    """The port of aiohttp's own server."""
    listener = listening()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve():
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=5, **runner_options)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        await stop.wait()
        await runner.cleanup()

    def run():
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        listener.close()


def get(port, path="/", **headers):
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@contextmanager
def opened(port, path="/", **headers):
    """An answer whose body is not read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        yield connection.getresponse()
    finally:
        connection.close()


@contextmanager
def raw(port, *lines, body=b""):
    """A connection on which these lines of a request were sent, and nothing more."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("".join(f"{line}\r\n" for line in lines).encode("latin-1") + body)
        yield connection


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(*command, port):
    """A server in a process of its own, once it answers."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with subprocess.Popen(
        [sys.executable, *command], env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as server:
        try:
            until = time.monotonic() + 30
            while True:
                try:
                    get(port, "/livez")
                    break
                except (OSError, http.client.HTTPException):
                    assert server.poll() is None, server.stderr.read().decode()
                    assert time.monotonic() < until
                    time.sleep(0.02)
            yield server
        finally:
            server.terminate()
            server.communicate(timeout=20)


def configure_django():
    """Settings are set once in a process; tests override them."""
    if not django_settings.configured:
        django_settings.configure(ALLOWED_HOSTS=["*"], LOGGING_CONFIG=None)
        django.setup()


def empties(places):
    """All places of a bulkhead come back."""
    until = time.monotonic() + 10
    while places.snapshot().active:
        assert time.monotonic() < until
        time.sleep(0.001)
