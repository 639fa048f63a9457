"""The adapter of requests, behind policies of each host.

session.mount("https://", SeawallAdapter())
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

try:
    import requests
    import urllib3
    from requests.adapters import HTTPAdapter
except ImportError as error:
    message = "seawall.web.outgoing.requests needs requests: pip install 'seawall[requests]'"
    raise ImportError(message, name="requests") from error

from seawall.core.decorate import decorate
from seawall.web.guarding import Held
from seawall.web.outgoing import faults
from seawall.web.outgoing.call import OutgoingCall, hand_on
from seawall.web.outgoing.policies import HostPolicies, host_policies

faults.add(requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_PORTS = {"http": 80, "https": 443}


class SeawallAdapter(HTTPAdapter):
    """An adapter of `requests.Session` whose requests run behind the policies of their hosts.

    A response is read inside its guards, so an answer that breaks off is a failure, and retried. One asked for with
    `stream=True` holds them until it is closed or read to its end. A thread can't be cancelled: timeouts are those of
    the sockets, shortened to what is left of an attempt's timeout and of the deadline. What a policy refuses is raised
    as it is (`CircuitOpenError`, `BulkheadFullError`), an attempt's own error as that of requests.

    Args:
        policies: `host_policies()` unless told; without a hedge, which needs an event loop.
        options: those of `requests.adapters.HTTPAdapter`. Its `max_retries` would retry inside an attempt: leave it 0.

    Examples:
        >>> session = requests.Session()
        >>> session.mount("https://", SeawallAdapter())
    """

    def __init__(self, *, policies: HostPolicies | None = None, **options: Any) -> None:
        self.policies = policies = policies or host_policies()
        policies.refuse_hedge()
        outer = policies.outermost()
        self._once = outer(self._attempt)
        self._repeatedly = self._once if policies.retry is None else outer(decorate(self._again, (policies.retry,)))
        super().__init__(**options)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Send a request, as often as its policies say."""
        call = _Call(request, stream, timeout, {"verify": verify, "cert": cert, "proxies": proxies})
        try:
            return (self._repeatedly if call.repeatable else self._once)(call)
        except BaseException:
            call.close()
            raise

    def _again(self, call: _Call) -> requests.Response:
        call.close()  # the answer of the attempt before
        return self._attempt(call)

    def _attempt(self, call: _Call) -> requests.Response:
        held = self.policies.guards.enter_sync(call)
        try:
            timeout = _shortened(call.timeout, self.policies.seconds_left())
            request = call.request.copy()
            if self.policies.hand_on:
                hand_on(request.headers)
            response = super().send(request, stream=True, timeout=timeout, **call.options)
            length = response.headers.get("content-length", "")
            read = not call.stream or (call.repeatable and faults.drains(response.status_code, length))
            if read:
                _read(response)
        except BaseException as exc:
            held.fail(exc)
            raise
        if read:
            held.leave(None, response)
        else:
            response.raw = _Raw(response, held)
            call.response = response
        return response


class _Call(OutgoingCall):
    """A request, how to send it, and the response of its last attempt."""

    __slots__ = ("options", "request", "response", "stream", "timeout")

    def __init__(
        self, request: requests.PreparedRequest, stream: bool, timeout: object, options: dict[str, Any]
    ) -> None:
        replayable = request.body is None or isinstance(request.body, (bytes, str))
        super().__init__(_host(request.url or ""), request.method or "", request.headers, replayable=replayable)
        self.request = request
        self.stream = stream
        self.timeout = timeout
        self.options = options
        self.response: requests.Response | None = None

    def close(self) -> None:
        """Close a response that nobody will read."""
        response, self.response = self.response, None
        if response is not None:
            response.close()


class _Raw:
    """A body that holds guards until it is closed, or read to its end; in all else urllib3's."""

    def __init__(self, response: requests.Response, held: Held) -> None:
        self._raw = response.raw
        self._response: requests.Response | None = response
        self._held = held

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._raw)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:
        """The pieces of the body."""
        try:
            yield from self._raw.stream(*args, **kwargs)
        except GeneratorExit:
            raise  # the reader has enough, and closes
        except BaseException as exc:
            self._leave(exc)
            raise
        self._leave()

    def close(self) -> None:
        """Nobody reads on."""
        try:
            self._raw.close()
        finally:
            self._leave()

    def release_conn(self) -> None:
        """Nobody reads on, and the connection is another's."""
        try:
            self._raw.release_conn()
        finally:
            self._leave()

    def _leave(self, exc: BaseException | None = None) -> None:
        response, self._response = self._response, None
        self._held.leave(_as_requests(exc), response)


def _as_requests(exc: BaseException | None) -> BaseException | None:
    """A broken body as requests will report it; urllib3's errors are no faults by name."""
    if exc is None or not isinstance(exc, urllib3.exceptions.HTTPError):
        return exc
    return requests.ConnectionError(exc)


def _read(response: requests.Response) -> None:
    try:
        _ = response.content
    except BaseException:
        response.close()
        raise


def _shortened(timeout: Any, left: float) -> Any:
    """`timeout` of requests (seconds, or connecting and reading), no longer than what is left."""
    if left == math.inf:
        return timeout
    connect, read = timeout if isinstance(timeout, tuple) else (timeout, timeout)
    return tuple(left if seconds is None else min(seconds, left) for seconds in (connect, read))


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or _PORTS.get(parts.scheme, 0)}"
