"""Liveness and readiness, as orchestrators ask for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from seawall.core import checks
from seawall.policies.circuit_breaker import CircuitBreaker, State
from seawall.web.asgi import Receive, Scope, Send
from seawall.web.wsgi import Environ, StartResponse

_JSON = "application/json"
_SHUT = frozenset({State.OPEN, State.ISOLATED})


class Health:
    """Answers `/livez`, whether the process works, and `/readyz`, whether it should get requests now.

    Live is whoever can answer: an open breaker never fails liveness, for a restart would not mend what is broken
    elsewhere. Ready is a process that is not draining, whose `checks` all hold, and none of whose `critical` breakers
    is open. Both are ASGI and WSGI applications, to be mounted or routed to, and cost no lock and no thread.

    Args:
        checks: what must hold, by name: plain functions, quick ones, that return whether it does. One that raises
            does not hold.
        critical: breakers without which this process can do nothing useful.

    Examples:
        >>> breaker = CircuitBreaker("database")
        >>> health = Health(checks={"model": lambda: True}, critical=[breaker])
        >>> health.ready()
        (200, {'status': 'ready', 'failed': []})
        >>> breaker.force_open()
        >>> health.ready()
        (503, {'status': 'not ready', 'failed': ['breaker database']})
        >>> health.live()
        (200, {'status': 'live', 'failed': []})
    """

    def __init__(
        self, *, checks: Mapping[str, Callable[[], bool]] | None = None, critical: Iterable[CircuitBreaker] = ()
    ) -> None:
        self._checks = {name: _checked(name, check) for name, check in (checks or {}).items()}
        self._critical = tuple(critical)
        for breaker in self._critical:
            if not isinstance(breaker, CircuitBreaker):
                raise TypeError(f"critical must hold circuit breakers, got {breaker!r}")
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether this process has been told to stop."""
        return self._draining

    def drain(self) -> None:
        """Be ready no more: requests in flight go on, and whoever sends new ones stops once it has asked."""
        self._draining = True

    def live(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/livez`."""
        return 200, {"status": "live", "failed": []}

    def ready(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/readyz`."""
        failed = ["draining"] if self._draining else []
        failed += [name for name, check in self._checks.items() if not _holds(check)]
        failed += [f"breaker {breaker.name}" for breaker in self._critical if breaker.state in _SHUT]
        return (503, {"status": "not ready", "failed": failed}) if failed else (200, {"status": "ready", "failed": []})

    def answer(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and body for a path, by its last part."""
        known = {"livez": self.live, "readyz": self.ready}
        find = known.get(path.rstrip("/").rpartition("/")[2])
        return (404, {"status": "not found", "failed": []}) if find is None else find()

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            raise ValueError(f"health is asked for over HTTP, not {scope['type']}")
        status, content = self.answer(scope["path"])
        body = json.dumps(content).encode()
        headers = [(b"content-type", _JSON.encode()), (b"content-length", str(len(body)).encode())]
        headers.append((b"cache-control", b"no-store"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def wsgi(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI application."""
        status, content = self.answer(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", ""))
        body = json.dumps(content).encode()
        words = {200: "OK", 404: "Not Found", 503: "Service Unavailable"}[status]
        headers = [("content-type", _JSON), ("content-length", str(len(body))), ("cache-control", "no-store")]
        start_response(f"{status} {words}", headers)
        return [body]


def _checked(name: str, check: Callable[[], bool]) -> Callable[[], bool]:
    checks.name("check", name)
    return checks.function(f"the check {name!r}", check)


def _holds(check: Callable[[], bool]) -> bool:
    try:
        return bool(check())
    except Exception:
        return False
