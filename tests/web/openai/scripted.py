"""An engine that says what a test tells it to, and remembers what it was asked; and a server to put it behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

import uvicorn

from seawall.engine import ModelInfo, Piece, Usage

WORDS = ("The ", "sea ", "is ", "salty.")


class ScriptedEngine:
    """Streams `words`; raises an exception where one stands among them, and waits where an event does."""

    def __init__(self, name="scripted", words=WORDS, context=64):
        self.name = name
        self.words = words
        self.context = context
        self.asked = []
        self.running = 0
        self.stopped = threading.Event()

    def info(self):
        return ModelInfo(self.name, "int8", "fp32", self.context, 1000)

    async def stream(self, prompt, **settings):
        self.asked.append((prompt, settings))
        self.running += 1
        self.stopped.clear()
        try:
            for index in range(settings["n"]):
                said = 0
                for number, word in enumerate(self.words):
                    if isinstance(word, Exception):
                        raise word
                    if isinstance(word, threading.Event):
                        while not word.is_set():  # noqa: ASYNC110 - the test is another thread
                            await asyncio.sleep(0.001)
                        continue
                    said += 1
                    last = number == len(self.words) - 1
                    usage = Usage(5, 2, said, 3, 1) if last else None
                    yield Piece(word, number, "stop" if last else None, index, None, usage)
        finally:
            self.running -= 1
            self.stopped.set()

    async def drain(self, timeout=None):  # noqa: ASYNC109 - as engines have it
        return True


@contextlib.contextmanager
def served(app, **settings):
    """The port of a running uvicorn."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    config = {"log_level": "critical", "lifespan": "on", "timeout_graceful_shutdown": 5, **settings}
    server = uvicorn.Server(uvicorn.Config(app, **config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.005)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def eventually(holds):
    """Wait for another thread, as long as it takes."""
    deadline = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


def events(raw):
    """The data of server-sent events."""
    return [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line]
