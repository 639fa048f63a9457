"""An ASGI server of a few lines, so that a test decides what the client does, and when."""

from __future__ import annotations

import asyncio

import pytest


class Client:
    """One request to an ASGI application; `messages` holds what it answered."""

    def __init__(self, app, *, method="GET", headers=(), body=b""):
        self.app = app
        self.scope = {
            "type": "http",
            "method": method,
            "path": "/",
            "headers": [(name.encode(), value.encode()) for name, value in headers],
        }
        if body:
            self.scope["headers"].append((b"content-length", str(len(body)).encode()))
        self.inbox = asyncio.Queue()
        self.inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.messages = []
        self.task = None

    def leave(self):
        """Hang up."""
        self.inbox.put_nowait({"type": "http.disconnect"})

    async def receive(self):
        return await self.inbox.get()

    async def send(self, message):
        self.messages.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.leave()  # as servers do: after the answer there is nobody to listen to

    def begin(self):
        self.task = asyncio.get_running_loop().create_task(self.app(self.scope, self.receive, self.send))
        return self

    async def finish(self):
        await (self.task or self.begin().task)
        return self

    @property
    def status(self):
        return self.messages[0]["status"] if self.messages else None

    @property
    def headers(self):
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self):
        return b"".join(message["body"] for message in self.messages[1:])


@pytest.fixture
def client():
    return Client


class Impatient:
    """The `asyncio` of uvicorn, which looks every 0.1 s whether it shall end, and whether it has: here every 5 ms."""

    def __getattr__(self, name):
        return getattr(asyncio, name)

    async def sleep(self, seconds):
        await asyncio.sleep(seconds / 20)


@pytest.fixture(scope="session", autouse=True)
def servers_end_at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvicorn.server.asyncio", Impatient())
        yield
