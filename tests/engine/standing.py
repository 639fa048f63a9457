"""Models that only pretend, for what stands in for one; and a cancellation at any await."""

from __future__ import annotations

import asyncio
import threading


class Model:
    """Answers with its own name, and complains when it is asked after its end."""

    def __init__(self, name="a", *, error=None, hold=False):
        self.name, self.error = name, error
        self.closed = 0
        self.asked = 0
        self.warm = 0
        self.released = threading.Event()
        if not hold:
            self.released.set()

    def warm_up(self):
        self.warm += 1

    def run_sync(self, inputs, *, deadline=None):
        self.asked += 1
        assert not self.closed, f"model {self.name} was asked after it was closed"
        assert self.released.wait(30)
        if self.error is not None:
            raise self.error
        return {"y": self.name, **inputs}

    async def run(self, inputs, *, deadline=None):
        await asyncio.sleep(0)
        if not self.released.is_set():
            await asyncio.to_thread(self.released.wait, 30)
        return self.run_sync(inputs)

    async def stream(self, prompt):
        for letter in prompt:
            assert not self.closed, f"model {self.name} was closed in the middle of a stream"
            yield self.name + letter

    def close(self):
        self.closed += 1


async def awaiting(awaitable):
    return await awaitable


async def until(condition):
    while not condition():  # noqa: ASYNC110 - another thread makes it true
        await asyncio.sleep(0)
