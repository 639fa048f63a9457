"""Metrics for Prometheus, as an application of its own to mount at `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import anyio.to_thread

from seawall.web.asgi import Receive, Scope, Send
from seawall.web.wsgi import Environ, StartResponse

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_WORDS = {200: "200 OK", 405: "405 Method Not Allowed"}
_Answer = tuple[int, list[tuple[str, str]], bytes]


class Metrics:
    """Tells what a registry holds to whoever asks with GET. Mount it where only Prometheus gets: it tells everything.

    Both an ASGI and a WSGI application. On an event loop the numbers are read in a thread, so requests do not wait for
    a scrape. OpenMetrics, which has exemplars, where the scraper accepts it.

    Args:
        registry: as given to `seawall.telemetry.install`, with whatever else the application registered.

    Raises:
        ImportError: it needs the extra `prometheus`.

    Examples:
        >>> from prometheus_client import CollectorRegistry
        >>> from seawall.telemetry import install
        >>> registry = CollectorRegistry()
        >>> uninstall = install(registry=registry)
        >>> application = Metrics(registry).asgi
        >>> uninstall()
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        from seawall.telemetry.prometheus import exposition

        if not callable(getattr(registry, "collect", None)):
            raise TypeError(f"registry must be a CollectorRegistry, got {registry!r}")
        self._registry = registry
        self._exposition = exposition

    def _answer(self, method: str, accept: str) -> _Answer:
        if method not in ("GET", "HEAD"):
            return 405, [("allow", "GET, HEAD"), ("content-length", "0")], b""
        body, kind = self._exposition(self._registry, accept)
        headers = [("content-type", kind), ("content-length", str(len(body))), ("cache-control", "no-store")]
        return 200, headers, b"" if method == "HEAD" else body

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            raise ValueError(f"metrics are asked for over HTTP, not {scope['type']}")
        accept = next((value for name, value in scope["headers"] if name == b"accept"), b"").decode("latin-1")
        status, headers, body = await anyio.to_thread.run_sync(self._answer, scope["method"], accept)
        told = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": told})
        await send({"type": "http.response.body", "body": body})

    def wsgi(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI application."""
        status, headers, body = self._answer(environ["REQUEST_METHOD"], environ.get("HTTP_ACCEPT", ""))
        start_response(_WORDS[status], headers)
        return [body]
