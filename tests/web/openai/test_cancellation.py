"""A request that is cancelled, at whichever of its awaits, gives everything back."""

from __future__ import annotations

import asyncio
import json

import pytest

from seawall import Bulkhead
from seawall.engine import Piece, Usage
from seawall.web.openai import OpenAIRouter
from tests.web.openai.scripted import ScriptedEngine

PATHS = {
    "whole": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "model": "scripted"}),
    "stream": ("/v1/completions", {"prompt": ["a", "b"], "model": "scripted", "stream": True}),
    "embeddings": ("/v1/embeddings", {"input": ["a", "b"], "model": "vectors"}),
}


class Yielding(ScriptedEngine):
    """Lets others run before each word."""

    async def stream(self, prompt, **settings):
        self.running += 1
        try:
            for number in range(3):
                await asyncio.sleep(0)
                yield Piece("a ", number, "stop" if number == 2 else None, 0, None, Usage() if number == 2 else None)
        finally:
            self.running -= 1
            await asyncio.sleep(0)


class Vectors:
    name = "vectors"
    dimension = 2

    def __init__(self):
        self.running = 0

    def encode(self, text):
        return [1]

    async def embed(self, texts):
        import numpy as np

        self.running += 1
        try:
            await asyncio.sleep(0)
            return np.ones((len(texts), 2), np.float32)
        finally:
            self.running -= 1


async def asked(router, path, body, *, cancel_after):
    """Run a request for so many turns of the loop, then cancel it; whether it had ended by itself."""
    raw = json.dumps(body).encode()
    parts = [{"type": "http.request", "body": raw[:9], "more_body": True}, {"type": "http.request", "body": raw[9:]}]

    async def receive():
        await asyncio.sleep(0)
        if parts:
            return parts.pop(0)
        return await asyncio.Event().wait()

    async def send(message):
        await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", b"application/json")]}
    task = asyncio.get_running_loop().create_task(router(scope, receive, send))
    for _ in range(cancel_after):
        await asyncio.sleep(0)
    ended = task.done()
    task.cancel()
    await asyncio.wait([task])
    assert ended or task.cancelled()
    return ended


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.asyncio
async def test_nothing_stays_wherever_a_request_is_cancelled(kind):
    engine, vectors, places = Yielding(), Vectors(), Bulkhead("front", max_concurrent=1)
    router = OpenAIRouter(engine, embedder=vectors, policies=[places])
    served = router.collector._served["scripted"]
    turns = 0
    while not await asked(router, *PATHS[kind], cancel_after=turns):
        assert (0, 0, 0) == (engine.running, vectors.running, places.snapshot().active)
        assert (0, 0) == (served.waiting, served.running)
        turns += 1

    assert turns > 8
