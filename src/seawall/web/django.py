"""Django: a middleware around every view, and a decorator for one, under ASGI and WSGI.

    MIDDLEWARE = ["seawall.web.django.SeawallMiddleware", ...]
    SEAWALL = {"policies": [LoadShedder("front")], "timeout": 10.0}

It belongs into Django rather than around it: Django runs a view in a task of its own, which nothing outside can cancel,
and turns what it raises into a 500 of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings as django_settings
from django.core.exceptions import BadRequest, PermissionDenied, SuspiciousOperation
from django.http import Http404, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from seawall.core.ambient import Priority, current_priority
from seawall.core.decorate import Policy
from seawall.core.pipeline import Pipeline
from seawall.web.caught import KEY, Exchange, answer_caught
from seawall.web.guarding import Held, HeldGuards
from seawall.web.intake import READERS
from seawall.web.request_deadline import RequestDeadline
from seawall.web.settings import FailedResponseError, Settings

GetResponse: TypeAlias = Callable[[HttpRequest], Any]
_CLIENTS_FAULT = (Http404, PermissionDenied, SuspiciousOperation, BadRequest)  # Django answers them with 4xx


class SeawallMiddleware:
    """Runs each view behind guards, which hold until its answer is sent, and answers for what they refuse.

    Its settings are those of `seawall.web.SeawallMiddleware`, in a dict `SEAWALL` of Django's settings; `priority` and
    the key of a policy per key are given the request. Under ASGI a view is cancelled when its time is over, and by
    Django itself when its client leaves; a plain view can't be, and only sees its deadline.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response
        self.settings = Settings(**getattr(django_settings, "SEAWALL", {}))
        self._guards = HeldGuards(self.settings.policies)
        self._asynchronous = iscoroutinefunction(get_response)
        run: Callable[[_Exchange], Any] = self._run if self._asynchronous else self._run_sync
        name = self.settings.name
        self._untimed = Pipeline(name=name)(run)
        self._timed = Pipeline(RequestDeadline(self.settings.deadline), name=name)(run)
        if self._asynchronous:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        """Serve one request."""
        return self._serve(request) if self._asynchronous else self._serve_sync(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Called by Django with what a view raised."""
        reply = answer_caught(request.META, exception, self.settings.answers)
        return None if reply is None else HttpResponse(reply.body, status=reply.status, headers=reply.headers)

    async def _serve(self, request: HttpRequest) -> HttpResponseBase:
        if request.path in self.settings.exempt:
            exempt: HttpResponseBase = await self.get_response(request)
            return exempt
        exchange = _Exchange(self.settings, request)
        try:
            response: HttpResponseBase = await (self._untimed if exchange.seconds is None else self._timed)(exchange)
            return response
        except Exception as error:
            return exchange.answer(error)
        finally:
            exchange.end()

    def _serve_sync(self, request: HttpRequest) -> HttpResponseBase:
        if request.path in self.settings.exempt:
            exempt: HttpResponseBase = self.get_response(request)
            return exempt
        exchange = _Exchange(self.settings, request)
        try:
            response: HttpResponseBase = (self._untimed if exchange.seconds is None else self._timed)(exchange)
            return response
        except Exception as error:
            return exchange.answer(error)
        finally:
            exchange.end()

    async def _run(self, exchange: _Exchange) -> HttpResponseBase:
        held = await self._guards.enter(exchange.request)
        try:
            response = await self.get_response(exchange.request)
        except BaseException as exc:
            held.fail(exc)
            raise
        return exchange.hold(held, response)

    def _run_sync(self, exchange: _Exchange) -> HttpResponseBase:
        held = self._guards.enter_sync(exchange.request)
        try:
            response = self.get_response(exchange.request)
        except BaseException as exc:
            held.fail(exc)
            raise
        return exchange.hold(held, response)


def guarded(*policies: Policy) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates one view, plain or `async`, with guards that hold until its answer is sent, its stream included.

    The key of a policy per key is given the request. Answers from 500 on are failures, and so are exceptions but those
    that Django answers with 4xx. Policies that run calls anew (retry, hedge, fallback) decorate the view directly.

    Examples:
        >>> from seawall import Bulkhead
        >>> @guarded(Bulkhead("reports", max_concurrent=2))
        ... def report(request): ...
    """
    guards = HeldGuards(policies)

    def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        async def guarded_view(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            held = await guards.enter(request)
            try:
                response: HttpResponseBase = await view(request, *args, **kwargs)
            except BaseException as exc:
                _leave(held, exc)
                raise
            return _hold(held, response, _failed(response, 500))

        @functools.wraps(view)
        def guarded_view_sync(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            held = guards.enter_sync(request)
            try:
                response: HttpResponseBase = view(request, *args, **kwargs)
            except BaseException as exc:
                _leave(held, exc)
                raise
            return _hold(held, response, _failed(response, 500))

        return guarded_view if iscoroutinefunction(view) else guarded_view_sync

    return decorate


class _Exchange:
    """One request and what becomes of it."""

    __slots__ = ("_around", "_level", "error", "request", "seconds", "settings")

    def __init__(self, settings: Settings, request: HttpRequest) -> None:
        self.settings = settings
        self.request = request
        self.error: Exception | None = None
        found = [(name, value) for name in READERS if (value := request.headers.get(name)) is not None]
        seconds = settings.seconds(found)
        self.seconds = seconds
        tell = settings.priority
        self._level = None if tell is None else current_priority.set(Priority(tell(request)))
        scope: Mapping[str, Any] = getattr(request, "scope", {})
        self._around: Exchange | None = request.META.get(KEY) or scope.get(KEY)
        request.META[KEY] = self

    def hold(self, held: Held, response: HttpResponseBase) -> HttpResponseBase:
        """The guards hold until `response` is sent."""
        if self.error is not None and self._around is not None:
            self._around.error = self.error
        return _hold(held, response, self.error or _failed(response, self.settings.failures_from))

    def answer(self, error: Exception) -> HttpResponse:
        """What a guard's refusal, or a deadline, is answered with."""
        answer = self.settings.answers.answer_to(error)
        if answer is None:
            raise error
        if self._around is not None:
            self._around.error = error
        reply = self.settings.answers.reply(answer)
        return HttpResponse(reply.body, status=reply.status, headers=reply.headers)

    def end(self) -> None:
        """The view is done, though its answer may still be sent."""
        self.request.META[KEY] = self._around  # or the two would be a cycle
        if self._level is not None:
            current_priority.reset(self._level)


def _hold(held: Held, response: HttpResponseBase, failure: Exception | None) -> HttpResponseBase:
    closers: list[Callable[[], object]] = response._resource_closers  # type: ignore[attr-defined]
    closers.append(lambda: held.leave(failure))  # called by `close`, as Django's own are
    return response


def _failed(response: HttpResponseBase, failures_from: int) -> Exception | None:
    if response.status_code < failures_from:
        return None
    return FailedResponseError(f"the view answered {response.status_code}")


def _leave(held: Held, exc: BaseException) -> None:
    if isinstance(exc, _CLIENTS_FAULT):
        held.leave()
    else:
        held.fail(exc)
