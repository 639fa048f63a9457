"""What is one framework's own: its errors, its exceptions that are answers, its ways around a route."""

from __future__ import annotations

import asyncio
import http.client
import json

import pytest
from aiohttp import ClientSession, WSServerHandshakeError, web
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpResponse
from django.test import RequestFactory
from fastapi import Depends, FastAPI, HTTPException
from flask import Flask
from litestar import Litestar, Request, Response
from litestar import get as litestar_get

from seawall import (
    Bulkhead,
    CircuitBreaker,
    CircuitOpenError,
    Deadline,
    KeyedRateLimiter,
    Priority,
    Rejected,
    Retry,
    State,
    Timeout,
    retry,
    time_left,
)
from seawall.core.ambient import current_priority
from seawall.web import Health, SeawallMiddleware
from seawall.web import aiohttp as seawall_aiohttp
from seawall.web import flask as seawall_flask
from seawall.web import litestar as seawall_litestar
from seawall.web.django import guarded as django_guarded
from seawall.web.fastapi import guarded
from tests.web.servers import aiohttp_serves, configure_django, get, opened, uvicorn_serves

# FastAPI


def fastapi_with(breaker, **kwargs):
    app = FastAPI()
    app.add_middleware(SeawallMiddleware, **kwargs)

    @app.get("/{status}", dependencies=[Depends(guarded(breaker))])
    async def answer(status: int):
        raise HTTPException(status)

    return app


def test_fastapi_errors_of_clients_are_no_failures_of_a_route_and_its_own_are():
    breaker = CircuitBreaker("route", minimum_calls=2)
    with uvicorn_serves(fastapi_with(breaker)) as port:
        assert [get(port, path)[0] for path in ("/404", "/word")] == [404, 422]
        assert breaker.snapshot().successes == 2
        assert [get(port, "/503")[0] for _ in range(2)] == [503, 503]
        assert breaker.state is State.OPEN
        status, headers, body = get(port, "/404")
        assert (status, json.loads(body)["code"]) == (503, "circuit_open")
        assert int(headers["retry-after"]) >= 30


def test_fastapi_a_policy_per_key_of_a_route_is_given_the_request():
    limiter = KeyedRateLimiter("per user", rate=1, per=1000, burst=1, key=lambda request: request.headers.get("x-user"))
    app = FastAPI()
    app.add_middleware(SeawallMiddleware)

    @app.get("/", dependencies=[Depends(guarded(limiter))])
    async def page():
        return "ok"

    with uvicorn_serves(app) as port:
        assert [get(port, "/", x_user=user)[0] for user in "aab"] == [200, 429, 200]


def test_fastapi_a_policy_that_runs_calls_anew_is_a_decorator_below_the_route():
    app, calls = FastAPI(), []

    @app.get("/{number}")
    @retry(on=ConnectionError, wait=0)
    async def flaky(number: int):
        calls.append(number)
        if len(calls) < 3:
            raise ConnectionError
        return number + 1

    with uvicorn_serves(app) as port:
        assert get(port, "/41")[2] == b"42"
    assert calls == [41, 41, 41]
    with pytest.raises(TypeError, match="put it on the function"):
        guarded(Retry("r", on=OSError))


@pytest.mark.parametrize("policy", [Timeout("route", 0.05), Deadline("route", 0.05)], ids=["timeout", "deadline"])
def test_fastapi_a_route_has_a_time_of_its_own_which_ends_with_it(policy):
    app, left = FastAPI(), []
    app.add_middleware(SeawallMiddleware, timeout=20.0)

    @app.get("/{seconds}", dependencies=[Depends(guarded(policy))])
    async def slow(seconds: float):
        left.append(time_left())
        await asyncio.sleep(seconds)
        return "ok"

    with uvicorn_serves(app) as port:
        assert get(port, "/0")[0] == 200
        status, _, body = get(port, "/60")
        assert (status, json.loads(body)["code"]) == (504, "deadline_exceeded")
        assert get(port, "/0")[0] == 200
    assert all((seconds < 1) is isinstance(policy, Deadline) for seconds in left)


# Litestar


def test_litestar_an_applications_own_handler_goes_first():
    @litestar_get("/")
    async def page() -> str:
        raise CircuitOpenError("payments", 3.0)

    def own(request: Request, error: Rejected) -> Response:
        return Response("mine", status_code=418)

    plugins = [seawall_litestar.SeawallPlugin()]
    app = Litestar([page], plugins=plugins, exception_handlers={CircuitOpenError: own}, logging_config=None)
    with uvicorn_serves(app) as port:
        assert get(port, "/")[0] == 418


def test_litestar_answers_of_ones_own_reach_routes_that_have_policies_of_their_own():
    class Busy(Exception): ...

    @litestar_get("/", middleware=[seawall_litestar.route(Bulkhead("route", max_concurrent=1))])
    async def page() -> str:
        raise Busy

    app = Litestar([page], plugins=[seawall_litestar.SeawallPlugin(answers={Busy: 503})], logging_config=None)
    with uvicorn_serves(app) as port:
        assert get(port, "/")[0] == 503


# Flask


def test_flask_answers_of_ones_own_and_priorities():
    class Busy(Exception): ...

    app, seen = Flask("shop"), []

    @app.get("/busy")
    def busy():
        seen.append(current_priority.get())
        raise Busy

    by_path = lambda environ: Priority.HIGH if environ["PATH_INFO"] == "/busy" else Priority.LOW
    seawall_flask.setup(app, answers={Busy: 503}, priority=by_path)
    answer = app.test_client().get("/busy")
    assert (answer.status_code, answer.json["code"], seen) == (503, "error", [Priority.HIGH])


# Django


@pytest.mark.parametrize("error", [Http404, PermissionDenied])
def test_django_errors_of_clients_are_no_failures_of_a_view_and_its_own_are(error):
    configure_django()
    breaker = CircuitBreaker("view", minimum_calls=100)
    outcomes = [error(), ValueError(), HttpResponse(status=500), HttpResponse()]

    @django_guarded(breaker)
    def view(request):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    request = RequestFactory().get("/")
    for expected in (error, ValueError):
        with pytest.raises(expected):
            view(request)
    for _ in range(2):
        view(request).close()
    found = breaker.snapshot()
    assert (found.successes, found.failures) == (2, 2)


def test_django_an_answer_that_is_never_closed_gives_its_place_back_when_it_is_dropped():
    configure_django()
    places = Bulkhead("view", max_concurrent=1)

    @django_guarded(places)
    def view(request):
        return HttpResponse("ok")

    answer = view(RequestFactory().get("/"))
    assert places.snapshot().active == 1
    del answer
    assert places.snapshot().active == 0


# aiohttp


def aiohttp_with(*routes, **options):
    app = web.Application()
    app.add_routes([web.get(path, handler) for path, handler in routes])
    seawall_aiohttp.setup(app, **options)
    return app


def test_aiohttp_an_exception_that_is_an_answer_counts_by_its_status():
    front = CircuitBreaker("front", minimum_calls=100)

    async def unavailable(request):
        raise web.HTTPServiceUnavailable(headers={"x-own": "yes"})

    async def gone(request):
        raise web.HTTPGone

    app = aiohttp_with(("/unavailable", unavailable), ("/gone", gone), policies=[front])
    with aiohttp_serves(app) as port:
        status, headers, _ = get(port, "/unavailable")
        assert (status, headers["x-own"]) == (503, "yes")
        assert get(port, "/gone")[0] == 410
    assert (front.snapshot().failures, front.snapshot().successes) == (1, 1)


def test_aiohttp_an_answer_that_has_begun_is_cut_and_not_answered_again():
    full = Bulkhead("inner", max_concurrent=1)

    async def late(request):
        response = web.StreamResponse()
        response.content_length = 100
        await response.prepare(request)
        await response.write(b"begun")
        async with full.scope(), full.scope():
            pass

    with aiohttp_serves(aiohttp_with(("/", late))) as port, opened(port, "/") as answer:
        assert answer.status == 200
        with pytest.raises(http.client.IncompleteRead) as cut:
            answer.read()
        assert cut.value.partial == b"begun"


def test_aiohttp_web_sockets_pass_where_their_path_is_exempt_and_only_there():
    full = Bulkhead("front", max_concurrent=1)

    async def echo(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(await socket.receive_str())
        return socket

    async def talk(port, path):
        async with ClientSession() as session, session.ws_connect(f"http://127.0.0.1:{port}{path}") as socket:
            await socket.send_str("hello")
            return await socket.receive_str()

    app = aiohttp_with(("/", echo), ("/socket", echo), policies=[full], exempt=["/socket"])
    with aiohttp_serves(app) as port, full.scope():
        assert asyncio.run(talk(port, "/socket")) == "hello"
        with pytest.raises(WSServerHandshakeError) as refused:
            asyncio.run(talk(port, "/"))
        assert refused.value.status == 503


def test_aiohttp_health_and_priorities():
    health, seen = Health(), []

    async def page(request):
        seen.append(current_priority.get())
        return web.Response()

    app = aiohttp_with(("/", page), priority=lambda request: Priority.LOW)
    app.add_routes(seawall_aiohttp.health_routes(health))
    with aiohttp_serves(app) as port:
        assert get(port, "/")[0] == get(port, "/readyz")[0] == 200
        health.drain()
        assert json.loads(get(port, "/readyz")[2])["failed"] == ["draining"]
        assert get(port, "/livez")[0] == 200
    assert seen == [Priority.LOW]


def test_aiohttp_a_server_that_cancels_handlers_itself_changes_nothing():
    front, entered = CircuitBreaker("front"), []

    async def slow(request):
        entered.append(True)
        await asyncio.sleep(60)

    async def leave(port):
        async with ClientSession() as session:
            call = asyncio.create_task(session.get(f"http://127.0.0.1:{port}/"))
            while not entered:  # noqa: ASYNC110 - the server is another thread
                await asyncio.sleep(0.001)
            call.cancel()

    with aiohttp_serves(aiohttp_with(("/", slow), policies=[front]), handler_cancellation=True) as port:
        asyncio.run(leave(port))
    assert (front.snapshot().failures, front.snapshot().neither) == (0, 1)
