"""The transports of httpx, behind policies of each host.

client = httpx.AsyncClient(transport=AsyncSeawallTransport())
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import TypeAlias, TypeVar

import anyio

try:
    import httpx
except ImportError as error:
    raise ImportError("seawall.web.outgoing.httpx needs httpx: pip install 'seawall[httpx]'", name="httpx") from error

from seawall.core.decorate import Policy, decorate
from seawall.core.sleeping import on_asyncio
from seawall.web.guarding import Held
from seawall.web.outgoing import faults
from seawall.web.outgoing.call import OutgoingCall, hand_on
from seawall.web.outgoing.policies import HostPolicies, host_policies

faults.add(
    httpx.NetworkError,
    httpx.ConnectTimeout,
    httpx.ReadTimeout,
    httpx.WriteTimeout,  # not PoolTimeout: it is ours, and says nothing about the host
    httpx.RemoteProtocolError,
    httpx.ProxyError,
)
C = TypeVar("C")
R = TypeVar("R")
_PORTS = {"http": 80, "https": 443}


class AsyncSeawallTransport(httpx.AsyncBaseTransport):
    """A transport of `httpx.AsyncClient` whose requests run behind the policies of their hosts.

    A response holds its guards until its body is closed, which `client.get` and its like do themselves. What a policy
    refuses is raised as it is (`CircuitOpenError`, `BulkheadFullError`), and an attempt's own error as httpx's.
    Redirects are calls of their own.

    Args:
        transport: what sends; `httpx.AsyncHTTPTransport()` unless told.
        policies: `host_policies()` unless told.

    Examples:
        >>> client = httpx.AsyncClient(transport=AsyncSeawallTransport())
    """

    def __init__(
        self, transport: httpx.AsyncBaseTransport | None = None, *, policies: HostPolicies | None = None
    ) -> None:
        self.transport = transport or httpx.AsyncHTTPTransport()
        self.policies = policies = policies or host_policies()
        outer = policies.outermost()
        self._send = _behind(policies.timeout, self.transport.handle_async_request)
        self._once = outer(self._attempt)
        self._repeatedly = outer(_behind(policies.retry, _afresh(self._attempt)))
        self._safely = outer(_behind(policies.retry, _afresh(_behind(policies.hedge, self._attempt))))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, as often as its policies say."""
        call = _AsyncCall(request)
        run = self._safely if call.safe else self._repeatedly if call.repeatable else self._once
        try:
            response = await run(call)
            call.over = True
            await call.close_all(but=response)
        except BaseException as exc:
            call.over = True
            if not isinstance(exc, GeneratorExit):  # then nothing may be awaited, and what is dropped is cancelled
                await call.close_all()
            raise
        return response

    async def aclose(self) -> None:
        """Close what sends."""
        await self.transport.aclose()

    async def _attempt(self, call: _AsyncCall) -> httpx.Response:
        held = await self.policies.guards.enter(call)
        try:
            response = await self._send(call.attempt(hand=self.policies.hand_on))
            drained = _drains(call, response)
            if drained:
                await _drain(response)
        except BaseException as exc:
            try:
                if not isinstance(exc, (Exception, GeneratorExit)):
                    await _to_its_end(lambda: _close_orphans(self.transport))
            finally:
                held.fail(exc)
            raise
        if drained:
            held.leave(None, response)
        else:
            response.stream = _AsyncStream(response, held)
            call.responses.append(response)
        if call.over:  # a hedge's loser that answered all the same
            await call.close_all()
        return response


class SeawallTransport(httpx.BaseTransport):
    """`AsyncSeawallTransport` for `httpx.Client`. A thread can't be cancelled: timeouts are those of the sockets.

    They are shortened to what is left of an attempt's timeout and of the deadline, which therefore also bounds the
    pauses between two pieces of a body.

    Args:
        transport: what sends; `httpx.HTTPTransport()` unless told.
        policies: `host_policies()` unless told; without a hedge, which needs an event loop.

    Examples:
        >>> client = httpx.Client(transport=SeawallTransport())
    """

    def __init__(self, transport: httpx.BaseTransport | None = None, *, policies: HostPolicies | None = None) -> None:
        self.transport = transport or httpx.HTTPTransport()
        self.policies = policies = policies or host_policies()
        policies.refuse_hedge()
        outer = policies.outermost()
        self._once = outer(self._attempt)
        self._repeatedly = outer(_behind(policies.retry, self._again))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, as often as its policies say."""
        call = _Call(request)
        try:
            return (self._repeatedly if call.repeatable else self._once)(call)
        except BaseException:
            call.close()
            raise

    def close(self) -> None:
        """Close what sends."""
        self.transport.close()

    def _again(self, call: _Call) -> httpx.Response:
        call.close()  # the answer of the attempt before
        return self._attempt(call)

    def _attempt(self, call: _Call) -> httpx.Response:
        held = self.policies.guards.enter_sync(call)
        try:
            request = call.attempt(hand=self.policies.hand_on)
            request.extensions["timeout"] = self._shortened(request.extensions.get("timeout", {}))
            response = self.transport.handle_request(request)
            drained = _drains(call, response)
            if drained:
                _drain_sync(response)
        except BaseException as exc:
            held.fail(exc)
            raise
        if drained:
            held.leave(None, response)
        else:
            response.stream = _Stream(response, held)
            call.response = response
        return response

    def _shortened(self, timeouts: dict[str, float | None]) -> dict[str, float | None]:
        left = self.policies.seconds_left()
        if left == math.inf:
            return timeouts
        found = {name: timeouts.get(name) for name in ("connect", "read", "write", "pool")}
        return {name: left if seconds is None else min(seconds, left) for name, seconds in found.items()}


class _AsyncCall(OutgoingCall):
    """A request and the responses that it has got so far."""

    __slots__ = ("over", "request", "responses")

    def __init__(self, request: httpx.Request) -> None:
        replayable = isinstance(request.stream, httpx.ByteStream)
        super().__init__(_host(request.url), request.method, request.headers, replayable=replayable)
        self.request = request
        self.responses: list[httpx.Response] = []
        self.over = False  # somebody has its answer, or nobody waits for it

    def attempt(self, *, hand: bool) -> httpx.Request:
        """The request of one attempt; several may be under way."""
        return _copied(self.request, hand=hand)

    async def close_all(self, but: httpx.Response | None = None) -> None:
        """Close the responses that nobody will read."""
        others = [response for response in self.responses if response is not but]
        if others:
            await _to_its_end(lambda: self._close(others))

    async def _close(self, responses: list[httpx.Response]) -> None:
        for response in responses:
            self.responses.remove(response)
            await response.aclose()


_Send: TypeAlias = Callable[[_AsyncCall], Awaitable[httpx.Response]]


class _Call(OutgoingCall):
    """A request and the response of its last attempt."""

    __slots__ = ("request", "response")

    def __init__(self, request: httpx.Request) -> None:
        replayable = isinstance(request.stream, httpx.ByteStream)
        super().__init__(_host(request.url), request.method, request.headers, replayable=replayable)
        self.request = request
        self.response: httpx.Response | None = None

    def attempt(self, *, hand: bool) -> httpx.Request:
        """The request of one attempt."""
        return _copied(self.request, hand=hand)

    def close(self) -> None:
        """Close a response that nobody will read."""
        response, self.response = self.response, None
        if response is not None:
            response.close()


class _Body:
    """What the streams of both kinds share: the guards that a body holds until it is closed."""

    def __init__(self, response: httpx.Response, held: Held) -> None:
        self._response: httpx.Response | None = response
        self._stream = response.stream
        self._held = held
        self._error: BaseException | None = None

    def _leave(self) -> None:
        error, self._error = self._error, None
        response, self._response = self._response, None
        self._held.leave(error, response)
        del error


class _AsyncStream(_Body, httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._stream, httpx.AsyncByteStream)
        try:
            async for piece in self._stream:
                yield piece
        except GeneratorExit:
            raise  # the reader has enough
        except BaseException as exc:
            self._error = exc
            raise

    async def aclose(self) -> None:
        assert isinstance(self._stream, httpx.AsyncByteStream)
        try:
            await _to_its_end(self._stream.aclose)
        finally:
            self._leave()


class _Stream(_Body, httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        assert isinstance(self._stream, httpx.SyncByteStream)
        try:
            yield from self._stream
        except GeneratorExit:
            raise  # the reader has enough
        except BaseException as exc:
            self._error = exc
            raise

    def close(self) -> None:
        assert isinstance(self._stream, httpx.SyncByteStream)
        try:
            self._stream.close()
        finally:
            self._leave()


async def _close_orphans(transport: httpx.AsyncBaseTransport) -> None:
    """Close connections that a cancelled request made and never used.

    Cancelled between connecting and sending, httpcore 1.0 keeps them in its pool as new, busy for ever.
    """
    pool = getattr(transport, "_pool", None)
    taken = [getattr(request, "connection", None) for request in getattr(pool, "_requests", ())]
    for connection in list(getattr(pool, "connections", ())):
        if not any(connection is one for one in taken) and ", NEW," in connection.info():
            await connection.aclose()


async def _drain(response: httpx.Response) -> None:
    """Read a short answer that will likely be retried, so that neither its place nor its connection waits for that."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    try:
        body = b"".join([piece async for piece in response.stream])
    finally:
        await _to_its_end(response.stream.aclose)
    response.stream = httpx.ByteStream(body)


def _drain_sync(response: httpx.Response) -> None:
    assert isinstance(response.stream, httpx.SyncByteStream)
    try:
        body = b"".join(response.stream)
    finally:
        response.stream.close()
    response.stream = httpx.ByteStream(body)


def _drains(call: OutgoingCall, response: httpx.Response) -> bool:
    return call.repeatable and faults.drains(response.status_code, response.headers.get("content-length", ""))


def _behind(policy: Policy | None, send: Callable[[C], R]) -> Callable[[C], R]:
    return send if policy is None else decorate(send, (policy,))


def _afresh(send: _Send) -> Callable[[_AsyncCall], Coroutine[object, object, httpx.Response]]:
    async def again(call: _AsyncCall) -> httpx.Response:
        await call.close_all()  # the answers of the attempts before
        return await send(call)

    return again


async def _to_its_end(close: Callable[[], Coroutine[object, object, None]]) -> None:
    """Run `close` whoever cancels the caller meanwhile: half closed, a connection would be lost to its pool."""
    if not on_asyncio():
        with anyio.CancelScope(shield=True):
            await close()
        return
    task, cancelled = asyncio.create_task(close()), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as exc:
            cancelled = exc
    failed = task.exception()
    if cancelled is not None:  # above all; a failing close is its cause
        raise cancelled from failed
    task.result()


def _host(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.host}:{url.port or _PORTS.get(url.scheme, 0)}"


def _copied(request: httpx.Request, *, hand: bool) -> httpx.Request:
    copy = httpx.Request(
        request.method, request.url, headers=request.headers, stream=request.stream, extensions=request.extensions
    )
    if hand:
        hand_on(copy.headers)
    return copy
