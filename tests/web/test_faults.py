"""Clients that are slow, leave, or lie, against real servers: places come back, and nobody else notices."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import contextmanager

import pytest
from aiohttp import web
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from seawall import Bulkhead, CircuitBreaker
from seawall.web import SeawallMiddleware, SeawallWSGIMiddleware
from seawall.web import aiohttp as seawall_aiohttp
from tests.web.servers import aiohttp_serves, empties, get, raw, uvicorn_serves, waitress_serves

PIECE = b"x" * 65_536


class Scene:
    """An application that echoes what it is sent, or streams without end; one policy of each kind in front."""

    def __init__(self, timeout=20.0):
        self.front = CircuitBreaker("front")
        self.hall = Bulkhead("hall", max_concurrent=4)
        self.entered = threading.Semaphore(0)
        self.options = {"policies": [self.front, self.hall], "timeout": timeout}

    async def endless(self):
        while True:
            yield PIECE
            await asyncio.sleep(0)


@contextmanager
def uvicorn(scene):
    async def echo(request):
        scene.entered.release()
        return PlainTextResponse(str(len(await request.body())))

    async def endless(request):
        scene.entered.release()
        return StreamingResponse(scene.endless())

    app = Starlette(routes=[Route("/echo", echo, methods=["GET", "POST"]), Route("/endless", endless)])
    app.add_middleware(SeawallMiddleware, **scene.options)
    with uvicorn_serves(app) as port:
        yield port


@contextmanager
def aiohttp(scene):
    async def echo(request):
        scene.entered.release()
        return web.Response(text=str(len(await request.read())))

    async def endless(request):
        scene.entered.release()
        response = web.StreamResponse()
        await response.prepare(request)
        async for piece in scene.endless():
            await response.write(piece)

    app = web.Application(client_max_size=10**9)
    app.add_routes([web.get("/echo", echo), web.post("/echo", echo), web.get("/endless", endless)])
    seawall_aiohttp.setup(app, **scene.options)
    with aiohttp_serves(app) as port:
        yield port


@contextmanager
def waitress(scene):
    def app(environ, start_response):
        start_response("200 OK", [("content-type", "text/plain")])
        scene.entered.release()
        if environ["PATH_INFO"] == "/endless":
            while True:
                yield PIECE
        yield str(len(environ["wsgi.input"].read())).encode()

    with waitress_serves(SeawallWSGIMiddleware(app, **scene.options)) as port:
        yield port


@pytest.fixture(params=[uvicorn, aiohttp, waitress], ids=lambda serve: serve.__name__)
def serve(request):
    return request.param


@pytest.fixture(params=[uvicorn, aiohttp], ids=lambda serve: serve.__name__)
def serve_async(request):
    return request.param


def undisturbed(scene, port):
    """The next client is served, no place is missing, and nobody holds it against the application."""
    empties(scene.hall)
    assert get(port, "/echo")[0] == 200
    assert scene.front.snapshot().failures == 0


@pytest.mark.parametrize(
    "sent",
    [
        ["GET /ec"],
        ["GET /echo HTTP/1.1", "host: x"],
        ["POST /echo HTTP/1.1", "host: x", "content-length: 100000", ""],
        ["POST /echo HTTP/1.1", "host: x", "content-length: 100000", "", "half"],
        ["POST /echo HTTP/1.1", "host: x", "transfer-encoding: chunked", "", "5", "hel"],
    ],
    ids=["in its first line", "in its head", "before its body", "in its body", "in a piece of its body"],
)
def test_a_client_that_leaves(serve, sent):
    scene = Scene()
    with serve(scene) as port:
        with raw(port, *sent):
            if len(sent) > 2 and serve is not waitress:  # which reads a whole request before it calls anybody
                assert scene.entered.acquire(timeout=10)
        undisturbed(scene, port)


def test_a_client_that_leaves_in_the_middle_of_an_answer(serve):
    scene = Scene()
    with serve(scene) as port:
        with raw(port, "GET /endless HTTP/1.1", "host: x", "") as connection:
            assert connection.recv(1000)
            assert scene.hall.snapshot().active == 1
        undisturbed(scene, port)


def test_a_client_that_sends_letter_by_letter_is_served_and_holds_no_place_meanwhile(serve):
    scene = Scene()
    with serve(scene) as port:
        with raw(port) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for letter in b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n":
                connection.sendall(bytes([letter]))
            assert scene.hall.snapshot().active == 0
            connection.sendall(b"\r\nabc")
            assert b"200" in connection.recv(4096)
        undisturbed(scene, port)


def test_a_client_that_reads_nothing_is_cut_off_when_its_time_is_over(serve_async):
    scene = Scene(timeout=0.3)
    with serve_async(scene) as port:
        with raw(port, "GET /endless HTTP/1.1", "host: x", ""):
            assert scene.entered.acquire(timeout=10)
            empties(scene.hall)
        undisturbed(scene, port)


def test_an_upload_that_is_refused_is_answered_before_it_is_sent(serve_async):
    scene = Scene()
    with serve_async(scene) as port:
        with (
            scene.hall.costing(4).scope(),
            raw(port, "POST /echo HTTP/1.1", "host: x", "content-length: 1000000000", "", body=PIECE) as connection,
        ):
            assert b"503" in connection.recv(4096)
        assert not scene.entered.acquire(blocking=False)
        undisturbed(scene, port)


@pytest.mark.parametrize("headers", [["grpc-timeout: " + "9" * 100_000 + "S"], ["grpc-timeout: 5S"] * 5000])
def test_headers_beyond_measure_cost_nobody_anything(serve, headers):
    scene = Scene()
    with serve(scene) as port:
        with raw(port, "GET /echo HTTP/1.1", "host: x", *headers, "") as connection:
            status = connection.recv(12)  # of the server's choice, or nothing
            assert status == b"" or status.split()[1][:1] in {b"2", b"4", b"5"}
        undisturbed(scene, port)
