"""Bodies of requests that are larger than an application wants to read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import anyio

DISCARDED = 16  # times the limit: what is read and thrown away of a refused body, so that its client hears the answer
LINGER = 5.0  # seconds that this may take


class BodyTooLargeError(Exception):
    """A request's body is larger than `max_body`: its client's mistake, and no failure of the application."""

    def __init__(self, most: int) -> None:
        super().__init__(f"the body must have at most {most} bytes")
        self.most = most


def announced(headers: Iterable[tuple[bytes, bytes]]) -> float:
    """Bytes that a request's headers announce; 0 where they say nothing, or nonsense.

    Examples:
        >>> announced([(b"content-length", b"12")]), announced([(b"content-length", b"9" * 5000)])
        (12, inf)
    """
    told = next((value for name, value in headers if name == b"content-length"), b"0")
    if not told.isdigit():
        return 0
    return int(told) if len(told) < 19 else float("inf")


async def discard(receive: Callable[[], Awaitable[MutableMapping[str, Any]]], most: int) -> None:
    """Read up to `most` bytes of what is left of a body: a connection that is cut before takes the answer along."""
    more = True
    with anyio.move_on_after(LINGER):
        while more and most > 0:
            message = await receive()
            most -= len(message.get("body", b""))
            more = message.get("more_body", False)
