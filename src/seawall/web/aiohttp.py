"""aiohttp: one line puts an application behind policies, in the time its clients wait.

    setup(app, policies=[LoadShedder("front")], timeout=10.0)

A handler's own policies are decorators: `@reports` above `async def report(request)`; what it streams it sends itself,
so they hold to the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeAlias

try:
    from aiohttp import hdrs, web
except ImportError as error:
    raise ImportError("seawall.web.aiohttp needs aiohttp: pip install 'seawall[aiohttp]'", name="aiohttp") from error

from seawall.core.ambient import Priority, current_priority
from seawall.core.timers import Queue, Timers, running_timers
from seawall.web.answers import Reply
from seawall.web.health import Health
from seawall.web.intake import READERS
from seawall.web.options import Options
from seawall.web.settings import FailedResponseError, Settings

if TYPE_CHECKING:
    from typing import Any, Unpack

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOOK_EVERY = 0.02  # seconds between two looks at whether a client is still there
CLIENT_LEFT = 499  # nobody reads it; nginx's word for it in access logs


def setup(app: web.Application, **options: Unpack[Options]) -> None:
    """Put `app`, with its sub-applications, behind policies; see `seawall.web.SeawallMiddleware` for the settings.

    `priority` is given the request, and so is the key of a policy per key: as attribute `request` of its one argument.
    Policies hold until the handler is done, an answer that it streams included. A handler whose client has left is
    cancelled within `LOOK_EVERY` seconds, whatever the server's `handler_cancellation`. WebSockets are requests like
    others until they end: `exempt` their paths where that is not wanted. (Only the client says that it wants one, so
    that is no reason to let it pass.)

    Examples:
        >>> from seawall import LoadShedder
        >>> app = web.Application()
        >>> setup(app, policies=[LoadShedder("front")], timeout=10.0)
    """
    middleware = _Middleware(Settings(**options))
    app.middlewares.insert(0, web.middleware(middleware))
    app.on_response_prepare.append(_begun)


def health_routes(health: Health) -> list[web.RouteDef]:
    """`/livez` and `/readyz`, for `app.add_routes`.

    Examples:
        >>> app = web.Application()
        >>> _ = app.add_routes(health_routes(Health()))
    """

    async def probe(request: web.Request) -> web.Response:
        status, content = health.answer(request.path)
        return web.json_response(content, status=status, headers={hdrs.CACHE_CONTROL: "no-store"})

    return [web.get("/livez", probe), web.get("/readyz", probe)]


class _Middleware:
    """What `setup` puts in front of the handlers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._untimed = settings.guarded(_run)
        self._timed = settings.timed(_run)

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        settings = self._settings
        if request.path in settings.exempt:
            return await handler(request)
        found = [(name, value) for name in READERS for value in request.headers.getall(name, ())]
        level = None if settings.priority is None else current_priority.set(Priority(settings.priority(request)))
        exchange = _Exchange(settings, request, handler)
        seconds = settings.seconds(found)
        try:
            if seconds is None:
                response = await self._untimed(exchange)
            else:
                exchange.seconds = seconds
                response = await self._timed(exchange)
        except Exception as error:
            response = exchange.answer(error)
        except asyncio.CancelledError:
            if not exchange.forgiven() and not exchange.left:
                raise
            response = web.Response(status=CLIENT_LEFT)
        finally:
            exchange.forgiven()
            _current.set(exchange.around)
            if level is not None:
                current_priority.reset(level)
        if exchange.raised is not None:
            raise exchange.raised
        return response


async def _begun(request: web.Request, response: web.StreamResponse) -> None:
    """Signal of aiohttp: the answer begins to be sent."""
    exchange = _current.get()
    while exchange is not None:
        exchange.begun = True
        exchange = exchange.around


async def _run(exchange: _Exchange) -> web.StreamResponse:
    """One request, inside the policies."""
    exchange.watch()
    try:
        response = await exchange.handler(exchange.request)
    except web.HTTPException as answer:
        response = exchange.raised = answer
    except ConnectionError:
        if not exchange.client_has_left():  # it is some other connection's
            raise
        exchange.left = True
        raise asyncio.CancelledError("the client has left") from None
    finally:
        exchange.stop_watching()
    exchange.response = response
    if exchange.error is not None:
        raise exchange.error
    if response.status >= exchange.settings.failures_from:
        raise FailedResponseError(f"the handler answered {response.status}")
    return response


class _Exchange:
    """One request and its answer. Used in the task of the request, on one event loop."""

    __slots__ = (
        "_cancelled", "_cancelling", "_queue", "_task", "_timers", "around", "begun", "error", "handler", "left",
        "raised", "request", "response", "seconds", "settings",
    )  # fmt: skip

    def __init__(self, settings: Settings, request: web.Request, handler: Handler) -> None:
        self.settings = settings
        self.request = request
        self.handler = handler
        self.seconds = 0.0  # that its client waits, where somebody asked
        self.left = False  # the client, as the handler noticed
        self.begun = False  # the answer's head is sent
        self.error: Exception | None = None  # of a policy, that the application has answered
        self.response: web.StreamResponse | None = None  # of the handler
        self.raised: web.HTTPException | None = None  # the same, where it was raised
        self.around = _current.get()
        _current.set(self)
        self._cancelled = False
        self._cancelling = 0
        self._queue: Queue | None = None
        self._task: asyncio.Task[Any] | None = None
        self._timers: Timers | None = None

    def answer(self, error: Exception) -> web.StreamResponse:
        """What goes to the client in place of `error`, or `error` itself."""
        if isinstance(error, FailedResponseError) or error is self.error:
            if self.around is not None:
                self.around.error = self.error
            assert self.response is not None
            return self.response
        answer = None if self.begun else self.settings.answers.answer_to(error)
        if answer is None:
            raise error
        if self.around is not None:
            self.around.error = error
        return _response(self.settings.answers.reply(answer))

    def client_has_left(self) -> bool:
        """Whether nobody is there to be answered."""
        transport = self.request.transport
        return transport is None or transport.is_closing()

    def watch(self) -> None:
        """Look from time to time whether the client is still there."""
        self._timers = running_timers()
        if self._timers is not None:
            self._task = asyncio.current_task()
            self._queue = self._timers.add(self, LOOK_EVERY, self._timers.time())

    def expire(self) -> None:
        """Time to look."""
        assert self._timers is not None
        assert self._task is not None
        if not self.client_has_left():
            self._queue = self._timers.add(self, LOOK_EVERY, self._timers.time())
            return
        self._cancelled = True
        self._cancelling = self._task.cancelling()
        self._task.cancel("the client has left")

    def stop_watching(self) -> None:
        """The handler is done."""
        if self._queue is not None:
            self._queue.pop(self, None)

    def forgiven(self) -> bool:
        """Take our cancellation back; whether there was one, and nobody else's too."""
        if not self._cancelled or self._task is None:
            return False
        self._cancelled = False
        return self._task.uncancel() <= self._cancelling


_current: ContextVar[_Exchange | None] = ContextVar("seawall_aiohttp_exchange", default=None)


def _response(reply: Reply) -> web.Response:
    return web.Response(body=reply.body, status=reply.status, headers=reply.headers)
