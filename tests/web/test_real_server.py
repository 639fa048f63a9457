"""The middleware on real servers: uvicorn with Starlette, and the WSGI server of the standard library."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from seawall import Bulkhead, CircuitBreaker
from seawall.web import SeawallMiddleware, SeawallWSGIMiddleware
from tests.web.servers import get, uvicorn_serves


def starlette(endpoint, **settings):
    app = Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])
    app.add_middleware(SeawallMiddleware, **settings)
    return app


def test_uvicorn_sends_a_refusal_as_a_well_formed_answer():
    full = Bulkhead("front", max_concurrent=1)

    async def endpoint(request):
        return PlainTextResponse("ok")

    with uvicorn_serves(starlette(endpoint, policies=[full])) as port:
        with full.scope():
            status, headers, body = get(port)
        assert get(port)[::2] == (200, b"ok")
    assert status == 503
    assert headers["content-type"] == "application/problem+json"
    assert int(headers["retry-after"]) >= 1
    assert json.loads(body)["violated-policies"] == ["front"]


def test_uvicorn_cancels_a_handler_in_its_clients_time():
    cancelled = threading.Event()

    async def endpoint(request):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with uvicorn_serves(starlette(endpoint, timeout=30.0)) as port:
        status, _, body = get(port, x_envoy_expected_rq_timeout_ms="50")
    assert status == 504
    assert json.loads(body)["code"] == "deadline_exceeded"
    assert cancelled.is_set()


@pytest.mark.parametrize("request_line", ["GET", "POST"])
def test_a_real_client_that_hangs_up_frees_its_place(request_line):
    entered, left = threading.Event(), threading.Event()
    places = Bulkhead("places", max_concurrent=1)
    front = CircuitBreaker("front")

    async def endpoint(request):
        await request.body()
        entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            left.set()

    with uvicorn_serves(starlette(endpoint, policies=[front, places])) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        body = b"hello" if request_line == "POST" else b""
        head = f"{request_line} / HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert entered.wait(10)
        assert places.snapshot().active == 1
        connection.close()
        assert left.wait(10)
    assert places.snapshot().active == 0
    assert front.snapshot().failures == 0


def test_a_stream_arrives_piece_by_piece():
    go_on = threading.Event()

    async def endpoint(request):
        async def pieces():
            yield b"first"
            while not go_on.is_set():  # noqa: ASYNC110 - the client is another thread
                await asyncio.sleep(0.001)
            yield b"second"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    with uvicorn_serves(starlette(endpoint, timeout=10.0)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert answer.read(5) == b"first"
        go_on.set()
        assert answer.read() == b"second"
        connection.close()


def test_a_wsgi_server_sends_a_refusal_too():
    full = Bulkhead("front", max_concurrent=1)

    def app(environ, start_response):
        start_response("200 OK", [("content-type", "text/plain")])
        return [b"ok"]

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_):
            pass

    guarded = SeawallWSGIMiddleware(app, policies=[full])
    with make_server("127.0.0.1", 0, guarded, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with full.scope():
                assert get(server.server_port)[0] == 503
            assert get(server.server_port)[::2] == (200, b"ok")
        finally:
            server.shutdown()
            thread.join(10)
