"""What goes out to a client: whole answers, and streams of server-sent events that end well or with an error."""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import anyio
import anyio.lowlevel

from seawall.web.asgi import Message, Scope, Send

_log = logging.getLogger("seawall.web")
_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx sends each event on at once
]


class Outlet:
    """The way to one client. Adds the request's id to the headers, and knows how far the answer has come.

    A client that takes longer than `patience` seconds for one message is given up: its `scope` is cancelled.
    """

    def __init__(self, scope: Scope, send: Send, *, patience: float, closing: bool) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        self.request_id = given if _SAFE_ID.fullmatch(given) else b"req_" + uuid.uuid4().hex.encode()
        self.status = 0
        self.streaming = False
        self.over = False
        self.scope = anyio.CancelScope()
        self.load: Callable[[], str | None] = _nothing  # asked when the answer begins
        self._send = send
        self._patience = patience
        self._closing = closing
        self._can_close = scope.get("http_version", "1.1") == "1.1"  # HTTP/2 knows no such header

    async def send(self, message: Message) -> None:
        """Pass one message on to the server."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.streaming = _STREAM[0] in message["headers"]
            extra = [(b"x-request-id", self.request_id)]
            if self._can_close and (self._closing or self.status == 413):  # what is left of a body is nobody's request
                extra.append((b"connection", b"close"))
            if (load := self.load()) is not None:
                extra.append((b"endpoint-load-metrics", load.encode()))
            message = {**message, "headers": [*message["headers"], *extra]}
        elif not message.get("more_body"):
            self.over = True
        with anyio.move_on_after(self._patience) as waiting:
            await self._send(message)
        if waiting.cancelled_caught:
            _log.info("request %s: its client did not accept its answer", self.request_id.decode())
            await self.give_up()

    async def give_up(self) -> None:
        """Cancel the request: there is nobody to answer to, and nothing failed."""
        self.scope.cancel()
        await anyio.lowlevel.checkpoint()

    async def fail(self, error: Mapping[str, Any]) -> None:
        """End a stream that has begun with an error, which clients raise."""
        await self.send({"type": "http.response.body", "body": event(error)})


def _nothing() -> None:
    return None


async def send_json(send: Send, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """A whole answer."""
    told = {
        "content-type": "application/json",
        "cache-control": "no-store",
        **(headers or {}),
        "content-length": str(len(body)),
    }
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class Events:
    """A stream of server-sent events, which begins with the first."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False

    async def tell(self, *contents: Mapping[str, Any]) -> None:
        """Send events together."""
        if not self._begun:
            self._begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM})
        if contents:
            body = b"".join(map(event, contents))
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def done(self) -> None:
        """The stream is whole."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


def to_json(content: Mapping[str, Any]) -> bytes:
    """Without spaces, and in ASCII: half a surrogate pair in it harms nobody."""
    return json.dumps(content, separators=(",", ":")).encode()
