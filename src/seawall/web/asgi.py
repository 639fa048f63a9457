"""The ASGI middleware: policies around each request, and the answers that their errors deserve.

    app.add_middleware(SeawallMiddleware, policies=[LoadShedder("front")], timeout=10.0)

Pure ASGI: it buffers nothing, starts no task for a request that is quick, and context variables reach the
application. WebSockets and the lifespan pass untouched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, NoReturn, TypeAlias

from seawall.core import checks
from seawall.core.ambient import Priority, current_priority
from seawall.core.decorate import Policy
from seawall.core.timers import Queue, Timers, running_timers
from seawall.web.answers import Answers, Mapped, Reply
from seawall.web.bodies import DISCARDED, BodyTooLargeError, announced, discard
from seawall.web.caught import KEY, answers_for
from seawall.web.intake import READERS
from seawall.web.settings import PROBES, FailedResponseError, Settings

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

WATCH_AFTER = 0.02  # seconds: requests that are quicker never pay for a task that waits for their client to leave
_DEADLINE_HEADERS = {name.encode() for name in READERS}
_BODY_HEADERS = (b"content-length", b"transfer-encoding")


class SeawallMiddleware:
    """Runs each HTTP request behind guards, in the time its client waits, and answers for what they refuse.

    A refusal is a 429 or 503 with `Retry-After`, a timeout is a 504, each with a problem document (RFC 9457); so are
    those of policies on the application's own functions that nobody caught. Once an answer has begun it can't be
    taken back: then the error goes on to the server, which cuts the connection. When the client leaves, the
    application is cancelled, unless it listens for that itself (or, on trio, at all); such a call is neither a
    success nor a failure.

    Args:
        app: the ASGI application.
        policies: guards around every request, outermost first; an answer from `failures_from` on is a failure.
        timeout: seconds a request may take; a client that says it waits less gets less (see `seawall.web.intake`).
            None for what the client says only.
        trust_deadlines: whether to look at the deadline headers of clients. They can only shorten.
        priority: tells the priority of a request by its scope; with None all are NORMAL. What a client says of itself
            is no good reason to serve it first.
        answers: other answers than the usual: a status, or a function, by class of exception; or an `Answers`.
        failures_from: the lowest status that is a failure of the application.
        max_body: bytes of a request's body; a larger one is a 413, before the policies where its length is announced,
            and no failure. None for what the application itself accepts.
        exempt: paths that pass untouched, so that a full application still answers its probes.
        name: labels the spans of requests and the deadline's metrics.

    Examples:
        >>> from seawall import LoadShedder
        >>> async def app(scope, receive, send): ...
        >>> guarded = SeawallMiddleware(app, policies=[LoadShedder("front")], timeout=10.0)
    """

    def __init__(
        self,
        app: App,
        *,
        policies: Iterable[Policy] = (),
        timeout: float | None = None,
        trust_deadlines: bool = True,
        priority: Callable[[Scope], Priority] | None = None,
        answers: Answers | Mapping[type[Exception], Mapped] | None = None,
        failures_from: int = 500,
        max_body: int | None = None,
        exempt: Iterable[str] = PROBES,
        name: str = "http.server",
    ) -> None:
        self.app = app
        self.max_body = None if max_body is None else checks.count("max_body", max_body, least=0)
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
        self._untimed = self.settings.guarded(_run)
        self._timed = self.settings.timed(_run)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of the server."""
        if scope["type"] != "http" or scope["path"] in self.settings.exempt:
            await self.app(scope, receive, send)
            return
        tell = self.settings.priority
        level = None if tell is None else current_priority.set(Priority(tell(scope)))
        exchange = _Exchange(self, scope, receive, send)
        around = scope.get(KEY)  # this application may be mounted in one that has such a middleware too
        scope[KEY] = exchange
        seconds = self._seconds(scope)
        try:
            if self.max_body is not None and announced(scope["headers"]) > self.max_body:
                raise BodyTooLargeError(self.max_body)
            if seconds is None:
                await self._untimed(exchange)
            else:
                exchange.seconds = seconds
                await self._timed(exchange)
            if exchange.too_large is not None and not exchange.status:
                raise exchange.too_large
        except FailedResponseError:
            pass  # the client has its answer
        except Exception as error:
            if error is not exchange.error or not exchange.status:  # else the application has answered for it
                answers = answers_for(self.settings, around)
                answer = None if exchange.status else answers.answer_to(error)
                if answer is None:
                    raise
                reply = answers.reply(answer)
                if isinstance(error, BodyTooLargeError):
                    await exchange.close(reply, error.most)
                await self._send(reply, send)
            if around is not None and not isinstance(error, BodyTooLargeError):
                around.error = error
        except asyncio.CancelledError:
            if exchange.upset is not None:
                raise exchange.upset from None
            if not exchange.forgiven():
                raise
        finally:
            exchange.forgiven()
            exchange.end()
            scope[KEY] = around
            if level is not None:
                current_priority.reset(level)

    def _seconds(self, scope: Scope) -> float | None:
        found = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name in _DEADLINE_HEADERS
        ]
        return self.settings.seconds(found)

    async def _send(self, reply: Reply, send: Send) -> None:
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": pairs})
        await send({"type": "http.response.body", "body": reply.body})


async def _run(exchange: _Exchange) -> None:
    """One request, inside the policies."""
    try:
        exchange.watch_later()
        await exchange.app(exchange.scope, exchange.receive, exchange.send)
    except Exception as error:
        if exchange.too_large is not None and not exchange.status:
            return  # its client gets a 413, and the application did nothing wrong
        if not exchange.left:
            raise
        exchange.upset = error  # which goes on to the server; to the policies it is a call that was given up
        raise asyncio.CancelledError("the client has left") from None
    finally:
        watcher = exchange.stop_watching()
        if watcher is not None:
            await asyncio.wait([watcher])
    if exchange.too_large is not None:
        return
    if exchange.error is not None:
        raise exchange.error
    if exchange.status >= exchange.settings.failures_from and not exchange.left:
        raise FailedResponseError(f"the application answered {exchange.status}")


class _Exchange:
    """One request and its answer, as they pass by. Used in the task of the request, on one event loop."""

    __slots__ = (
        "_cancelled", "_cancelling", "_due", "_ended", "_gone", "_listening", "_most", "_over", "_queue", "_receive",
        "_send", "_size", "_stash", "_task", "_timers", "_watcher", "_whole", "app", "error", "left", "scope",
        "seconds", "settings", "status", "too_large", "upset",
    )  # fmt: skip

    def __init__(self, middleware: SeawallMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self.app = middleware.app
        self.settings = middleware.settings
        self.scope = scope
        self.error: Exception | None = None  # of a policy, that the application caught and answered
        self.seconds = 0.0  # that its client waits, where somebody asked
        self.status = 0  # of the answer, once it has begun
        self.left = False  # the application has been told that its client is gone
        self.upset: Exception | None = None  # what it raised then
        self.too_large: BodyTooLargeError | None = None  # more came than the application was to read
        self._most = middleware.max_body
        self._size = 0  # of the body so far
        self._receive = receive
        self._send = send
        self._over = False  # the answer is complete
        self._ended = False  # nobody waits for the application any more
        self._whole = False  # the request's body has been read
        self._listening = 0  # the application waits for a message
        self._stash: list[Message] = []  # a message that the watcher read for it
        self._due = False  # slow enough to watch for its client
        self._gone: asyncio.Future[None] | None = None  # while watched: the client left
        self._cancelled = False
        self._cancelling = 0
        self._queue: Queue | None = None
        self._task: asyncio.Task[Any] | None = None
        self._timers: Timers | None = None
        self._watcher: asyncio.Task[None] | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """What the application says to its client."""
        if self._ended or (self.too_large is not None and not self.status):
            return _nothing()  # of a task that it left behind, or to what is refused: the client hears another answer
        kind = message["type"]
        if kind == "http.response.start":
            self.status = message["status"]
        elif kind == "http.response.body" and not message.get("more_body"):
            self._over = True  # what it does from now on, it does for itself
        return self._send(message)

    async def receive(self) -> Message:
        """What the client says to the application."""
        if self._stash:
            return self._stash.pop()
        if self._ended:
            return {"type": "http.disconnect"}
        self._listening += 1
        try:
            if self._gone is not None:
                await asyncio.wait([self._gone])
                message: Message = {"type": "http.disconnect"}
            else:
                message = await self._receive()
        except BodyTooLargeError as error:  # of the middleware around this one
            self._refuse(error)
        finally:
            self._listening -= 1
        if message["type"] == "http.disconnect":
            self.left = not self._over  # after the answer servers say so too
        if message["type"] == "http.request":
            if not message.get("more_body"):
                self._whole = True
                if self._due:
                    self._watch()
            if self._most is not None:
                self._measure(self._most, message)
        return message

    def _measure(self, most: int, message: Message) -> None:
        self._size += len(message.get("body", b""))
        if self._size > most:
            self._refuse(BodyTooLargeError(most))

    def _refuse(self, error: BodyTooLargeError) -> NoReturn:
        self.left = True  # nobody waits for what the application says
        self.too_large = error
        raise error

    async def close(self, reply: Reply, most: int) -> None:
        """Be ready to send `reply` and to hear no more, from a client that may listen only once it has said all."""
        if not self._whole:
            await discard(self._receive, DISCARDED * most)
        if self.scope.get("http_version", "1.1") == "1.1":  # or servers go on to read; HTTP/2 has no such header
            reply.headers["connection"] = "close"

    def watch_later(self) -> None:
        """Watch for the client from `WATCH_AFTER` on. Only asyncio has a task that another one can cancel."""
        timers = self._timers = running_timers()
        if timers is not None:
            self._task = asyncio.current_task()
            self._whole = not any(name in _BODY_HEADERS for name, _ in self.scope["headers"])
            self._queue = timers.add(self, WATCH_AFTER, timers.time())

    def expire(self) -> None:
        """The request takes its time."""
        self._due = True
        self._watch()

    def _watch(self) -> None:
        if self._whole and not self._listening and not self._over and self._watcher is None and self._timers:
            self._gone = self._timers.loop.create_future()
            self._watcher = self._timers.loop.create_task(self._wait_for_disconnect(self._gone))

    async def _wait_for_disconnect(self, gone: asyncio.Future[None]) -> None:
        try:
            message = await self._receive()
            while message["type"] != "http.disconnect":
                self._stash.append(message)  # empty: the body had been read, or there was to be none
                message = await self._receive()
        finally:
            gone.set_result(None)  # also where the server fails to say: an application that listens must not hang
        if not (self._listening or self._over) and self._task is not None:
            self._cancelled = True
            self._cancelling = self._task.cancelling()
            self._task.cancel("the client has left")

    def stop_watching(self) -> asyncio.Task[None] | None:
        """The application is done; returns a task to wait for."""
        self._over = True
        if self._queue is not None:
            self._queue.pop(self, None)
        watcher = self._watcher
        if watcher is None or watcher.done():
            return None
        watcher.cancel()
        return watcher

    def end(self) -> None:
        """The request is over, however it ended."""
        self._ended = True

    def forgiven(self) -> bool:
        """Take our cancellation back; whether there was one, and nobody else's too."""
        if not self._cancelled or self._task is None:
            return False
        self._cancelled = False
        return self._task.uncancel() <= self._cancelling


async def _nothing() -> None: ...
