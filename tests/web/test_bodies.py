"""Bodies larger than an application wants: refused as 413, and nobody else's problem."""

from __future__ import annotations

import asyncio
import http.client
import json
from typing import Annotated

import pytest
from fastapi import Body, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from seawall import Bulkhead, CircuitBreaker
from seawall.web import BodyTooLargeError, SeawallMiddleware
from seawall.web.bodies import LINGER
from seawall.web.caught import answer_caught
from tests.web.servers import empties, raw, uvicorn_serves

MOST = 1000


@pytest.mark.parametrize("most", [-1, 1.5, "1 MiB", True])
def test_a_limit_that_is_none_is_refused_where_it_is_given(most):
    with pytest.raises((TypeError, ValueError), match="max_body must be"):
        SeawallMiddleware(Starlette(), max_body=most)


def reading(seen):
    async def app(scope, receive, send):
        seen.append("asked")
        while (await receive()).get("more_body"):
            seen.append("read")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    return app


def pieces(client, app, *sizes, ends=True):
    """A request whose body comes in pieces, without a word about its length."""
    request = client(app, method="POST", headers=[("transfer-encoding", "chunked")])
    request.inbox = asyncio.Queue()
    for number, size in enumerate(sizes):
        more = number < len(sizes) - 1 or not ends
        request.inbox.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": more})
    return request


@pytest.mark.asyncio
@pytest.mark.virtual_time
class TestMessageByMessage:
    async def test_an_announced_one_is_refused_before_any_work(self, client):
        seen, front = [], CircuitBreaker("front")
        app = SeawallMiddleware(reading(seen), policies=[front], max_body=MOST)
        done = await client(app, method="POST", body=b"x" * (MOST + 1)).finish()
        assert (413, []) == (done.status, seen)
        assert "application/problem+json" == done.headers["content-type"]
        assert "false" == done.headers["x-should-retry"]
        assert "the body must have at most 1000 bytes" == json.loads(done.body)["detail"]
        assert (0, 0) == (front.snapshot().successes, front.snapshot().failures)

    async def test_one_of_just_the_limit_is_served(self, client):
        app = SeawallMiddleware(reading([]), max_body=MOST)
        assert 200 == (await client(app, method="POST", body=b"x" * MOST).finish()).status
        assert 200 == (await pieces(client, app, 400, 600).finish()).status

    async def test_one_of_unknown_length_is_read_up_to_the_limit_and_is_no_failure(self, client):
        seen, front = [], CircuitBreaker("front")
        app = SeawallMiddleware(reading(seen), policies=[front], max_body=MOST)
        done = await pieces(client, app, 400, 400, 400, 400).finish()
        assert (413, ["asked", "read", "read"]) == (done.status, seen)
        assert done.inbox.qsize() == 1  # the rest is thrown away; what remains says that the client is gone
        assert front.snapshot().failures == 0

    async def test_an_application_that_swallows_it_is_not_heard(self, client):
        async def app(scope, receive, send):
            try:
                while (await receive())["more_body"]:
                    pass
            except Exception:
                await send({"type": "http.response.start", "status": 400, "headers": []})
                await send({"type": "http.response.body", "body": b"bad"})

        assert 413 == (await pieces(client, SeawallMiddleware(app, max_body=MOST), 2000).finish()).status

    async def test_a_framework_that_answers_it_itself_is_not_heard_and_nothing_failed(self, client):
        front = CircuitBreaker("front")

        async def framework(scope, receive, send):
            try:
                await receive()
            except BodyTooLargeError as error:
                reply = answer_caught(scope, error)
                await send({"type": "http.response.start", "status": reply.status, "headers": []})
                await send({"type": "http.response.body", "body": b"mine"})

        request = pieces(client, SeawallMiddleware(framework, policies=[front], max_body=MOST), 2000)
        assert "body_too_large" == json.loads((await request.finish()).body)["code"]
        assert (413, 0) == (request.status, front.snapshot().failures)

    async def test_after_the_answer_began_the_connection_is_cut_and_nothing_failed(self, client):
        front = CircuitBreaker("front")

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await receive()

        request = pieces(client, SeawallMiddleware(app, policies=[front], max_body=MOST), 2000)
        with pytest.raises(BodyTooLargeError):
            await request.finish()
        assert (200, 0) == (request.status, front.snapshot().failures)

    async def test_a_rest_that_does_not_come_is_not_waited_for(self, client):
        loop = asyncio.get_running_loop()
        began = loop.time()
        done = await pieces(client, SeawallMiddleware(reading([]), max_body=MOST), 2000, ends=False).finish()
        assert (413, LINGER) == (done.status, loop.time() - began)

    async def test_a_client_that_leaves_is_not_waited_for_either(self, client):
        request = pieces(client, SeawallMiddleware(reading([]), max_body=MOST), 2000, ends=False)
        request.leave()
        began = asyncio.get_running_loop().time()
        await request.finish()
        assert began == asyncio.get_running_loop().time()

    @pytest.mark.parametrize("turns", range(6))
    async def test_a_cancellation_stays_one(self, client, turns):
        hall = Bulkhead("hall", max_concurrent=1)
        app = SeawallMiddleware(reading([]), policies=[hall], max_body=MOST)
        request = pieces(client, app, 600, 600, ends=False).begin()
        for _ in range(turns):
            await asyncio.sleep(0)
        request.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request.task
        assert 0 == hall.snapshot().active

    @pytest.mark.parametrize(("inner", "outer"), [(MOST, None), (None, MOST), (MOST, MOST)])
    async def test_middlewares_around_each_other_hear_of_no_failure(self, client, inner, outer):
        front, back = CircuitBreaker("front"), CircuitBreaker("back")
        app = SeawallMiddleware(reading([]), policies=[back], max_body=inner)
        app = SeawallMiddleware(app, policies=[front], max_body=outer)
        done = await pieces(client, app, 400, 2000, 10).finish()
        assert (413, 0, 0) == (done.status, front.snapshot().failures, back.snapshot().failures)

    async def test_an_application_may_answer_in_its_own_way(self, client):
        app = SeawallMiddleware(reading([]), max_body=MOST, answers={BodyTooLargeError: 422})
        assert 422 == (await pieces(client, app, 2000).finish()).status


def starlette_app():
    async def size(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    return Starlette(routes=[Route("/size", size, methods=["POST"])])


def fastapi_app():
    app = FastAPI()

    @app.post("/size")
    async def size(found: Annotated[bytes, Body()]) -> str:
        return str(len(found))

    return app


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
@pytest.mark.parametrize("size", [MOST + 1, 4_000_000, 100_000_000])
@pytest.mark.parametrize("make", [starlette_app, fastapi_app])
def test_a_real_client_hears_its_413_though_it_says_everything_first(make, size, chunked):
    hall = Bulkhead("hall", max_concurrent=1)
    most = max(MOST, size // 10)  # within what is read and thrown away
    app = make()
    app.add_middleware(SeawallMiddleware, policies=[hall], max_body=most)
    piece = b"x" * 65_536
    with uvicorn_serves(app) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = (piece[: min(len(piece), size - at)] for at in range(0, size, len(piece)))
        headers = {} if chunked else {"content-length": str(size)}
        connection.request("POST", "/size", body, headers, encode_chunked=chunked)
        answer = connection.getresponse()
        assert (413, "body_too_large") == (answer.status, json.loads(answer.read())["code"])
        connection.close()
        empties(hall)


def test_a_body_that_never_ends_is_read_only_so_far():
    app = starlette_app()
    app.add_middleware(SeawallMiddleware, max_body=MOST)
    with (
        uvicorn_serves(app) as port,
        raw(port, "POST /size HTTP/1.1", "host: x", f"content-length: {10**12}", "") as connection,
        pytest.raises(ConnectionError),
    ):
        for _ in range(10_000):
            connection.sendall(b"x" * 65_536)
