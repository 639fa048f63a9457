"""The WSGI middleware: what `seawall.web.asgi` does, for applications of threads.

    app.wsgi_app = SeawallWSGIMiddleware(app.wsgi_app, policies=[LoadShedder("front")], timeout=10.0)

A thread can't be cancelled: the deadline is seen by what the application calls, and stops none of its own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextvars import Context, copy_context
from typing import Any, TypeAlias

from seawall.core import ambient, gate
from seawall.core.ambient import Priority, current_priority
from seawall.core.decorate import Policy
from seawall.web.answers import Answers, Mapped, Reply, phrase
from seawall.web.caught import KEY, answers_for
from seawall.web.intake import READERS
from seawall.web.request_deadline import Seconds
from seawall.web.settings import PROBES, FailedResponseError, Settings

Environ: TypeAlias = dict[str, Any]
StartResponse: TypeAlias = Callable[..., Any]
App: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]
_DEADLINE_KEYS = {f"HTTP_{name.upper().replace('-', '_')}": name for name in READERS}


class SeawallWSGIMiddleware:
    """Runs each request behind guards, which hold until its answer is sent, and answers for what they refuse.

    Answers and arguments are those of `SeawallMiddleware`; `priority` is given the environ, and so is the key of a
    policy per key: as attribute `environ` of its one argument. The middleware asks for the first piece of a body
    before it returns, so that a refusal inside a lazy answer is answered too.

    Examples:
        >>> from seawall import LoadShedder
        >>> def app(environ, start_response): ...
        >>> guarded = SeawallWSGIMiddleware(app, policies=[LoadShedder("front")], timeout=10.0)
    """

    def __init__(
        self,
        app: App,
        *,
        policies: Iterable[Policy] = (),
        timeout: float | None = None,
        trust_deadlines: bool = True,
        priority: Callable[[Environ], Priority] | None = None,
        answers: Answers | Mapping[type[Exception], Mapped] | None = None,
        failures_from: int = 500,
        exempt: Iterable[str] = PROBES,
        name: str = "http.server",
    ) -> None:
        self.app = app
        self.settings = Settings(
            policies=policies,
            timeout=timeout,
            trust_deadlines=trust_deadlines,
            priority=priority,
            answers=answers,
            failures_from=failures_from,
            exempt=exempt,
            name=name,
        )
        self._guarded = self.settings.guarded(_run)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        if environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "") in self.settings.exempt:
            return self.app(environ, start_response)
        exchange = _Exchange(self.app, self.settings, environ, start_response)
        context = copy_context()  # an answer that streams is asked for piece by piece, and keeps its context
        try:
            first = context.run(self._begin, exchange)
        except FailedResponseError:
            return []
        except Exception as error:
            if exchange.answered(error):
                return []
            answers = answers_for(self.settings, exchange.around)
            answer = answers.answer_to(error)
            if answer is None:
                raise
            exchange.tell_around(error)
            return self._send(answers.reply(answer), start_response)
        return [] if first is None else _Body(first, exchange, context)

    def _begin(self, exchange: _Exchange) -> bytes | None:
        settings, environ = self.settings, exchange.environ
        if settings.priority is not None:
            current_priority.set(Priority(settings.priority(environ)))
        seconds = settings.seconds([(name, environ[key]) for key, name in _DEADLINE_KEYS.items() if key in environ])
        if seconds is not None:
            with gate.lock:
                expiry = Seconds(settings.deadline, seconds).enter(gate.now())
            ambient.deadline.set(expiry.until)
        exchange.pieces = self._guarded(exchange)
        return next(exchange.pieces, None)

    def _send(self, reply: Reply, start_response: StartResponse) -> Iterable[bytes]:
        start_response(f"{reply.status} {phrase(reply.status)}", list(reply.headers.items()), sys.exc_info())
        return [reply.body]


def _run(exchange: _Exchange) -> Generator[bytes, None, None]:
    """One request, inside the policies."""
    exchange.environ[KEY] = exchange
    try:
        pieces = exchange.app(exchange.environ, exchange.start_response)
        try:
            yield from pieces
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()
    finally:
        exchange.environ[KEY] = exchange.around  # or the two would be a cycle
    if exchange.error is not None:
        raise exchange.error
    if exchange.status >= exchange.settings.failures_from:
        raise FailedResponseError(f"the application answered {exchange.status}")


class _Exchange:
    """One request and its answer."""

    __slots__ = ("_start_response", "app", "around", "environ", "error", "pieces", "settings", "status")

    def __init__(self, app: App, settings: Settings, environ: Environ, start_response: StartResponse) -> None:
        self.app = app
        self.settings = settings
        self.environ = environ
        self.status = 0
        self.error: Exception | None = None  # of a policy, that the application caught and answered
        self.around = environ.get(KEY)  # this application may be mounted in one that has such a middleware too
        self._start_response = start_response
        self.pieces: Generator[bytes, None, None]

    def answered(self, error: Exception) -> bool:
        """Whether the application has answered for `error` itself."""
        if error is not self.error or not self.status:
            return False
        self.tell_around(error)
        return True

    def tell_around(self, error: Exception) -> None:
        """The answer to `error` passes the middleware around this one, whose policies hear of it too."""
        if self.around is not None:
            self.around.error = error

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """What the application says first."""
        self.status = int(status[:3])
        if exc_info is None:
            return self._start_response(status, headers)
        return self._start_response(status, headers, exc_info)


class _Body:
    """The rest of an answer, of which the first piece is known already."""

    __slots__ = ("_context", "_exchange", "_first", "_pieces")

    def __init__(self, first: bytes, exchange: _Exchange, context: Context) -> None:
        self._first: bytes | None = first
        self._exchange = exchange
        self._pieces = exchange.pieces
        self._context = context

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            return self._context.run(next, self._pieces)
        except FailedResponseError:
            raise StopIteration from None
        except Exception as error:
            if self._exchange.answered(error):
                raise StopIteration from None
            raise

    def close(self) -> None:
        """The server is done, or the client has left."""
        self._context.run(self._pieces.close)
