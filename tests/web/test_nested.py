"""The ASGI middleware around frameworks that answer errors themselves, and around middlewares of its kind."""

from __future__ import annotations

import asyncio
import json

import pytest

from seawall import Bulkhead, BulkheadFullError, CircuitBreaker
from seawall.web import SeawallMiddleware
from seawall.web.caught import answer_caught

pytestmark = [pytest.mark.asyncio, pytest.mark.virtual_time]


async def answering(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def raising(error):
    async def app(scope, receive, send):
        raise error

    return app


@pytest.mark.parametrize("nested", [False, True])
async def test_an_error_that_a_framework_answers_itself_is_a_refusal_to_the_policies_around(client, nested):
    front = CircuitBreaker("front")

    async def framework(scope, receive, send):
        reply = answer_caught(scope, BulkheadFullError("reports"))
        await send({"type": "http.response.start", "status": reply.status, "headers": []})
        await send({"type": "http.response.body", "body": reply.body})

    app = SeawallMiddleware(framework, name="inner") if nested else framework
    done = await client(SeawallMiddleware(app, policies=[front])).finish()
    assert done.status == 503
    assert json.loads(done.body)["violated-policies"] == ["reports"]
    assert front.snapshot().failures == 0


async def test_an_error_that_was_caught_but_never_answered_is_answered(client):
    async def framework(scope, receive, send):
        answer_caught(scope, BulkheadFullError("reports"))

    assert (await client(SeawallMiddleware(framework)).finish()).status == 503


async def test_what_an_inner_middleware_answers_is_a_refusal_to_the_policies_around(client):
    front, full = CircuitBreaker("front"), Bulkhead("inner", max_concurrent=1)
    inner = SeawallMiddleware(answering, policies=[full])
    with full.scope():
        done = await client(SeawallMiddleware(inner, policies=[front])).finish()
    assert done.status == 503
    assert front.snapshot().failures == 0


async def test_a_middleware_without_answers_of_its_own_gives_those_of_the_one_around(client):
    inner = SeawallMiddleware(raising(BulkheadFullError("b")))
    assert (await client(SeawallMiddleware(inner, answers={BulkheadFullError: 502})).finish()).status == 502
    own = SeawallMiddleware(raising(BulkheadFullError("b")), answers={BulkheadFullError: 429})
    assert (await client(SeawallMiddleware(own, answers={BulkheadFullError: 502})).finish()).status == 429


async def test_an_error_of_the_applications_own_passes_two_middlewares_as_it_is(client):
    with pytest.raises(ZeroDivisionError):
        await client(SeawallMiddleware(SeawallMiddleware(raising(ZeroDivisionError())))).finish()


async def test_what_a_task_that_was_left_behind_says_goes_nowhere(client):
    heard, left_behind = [], []

    async def view(receive, send):
        await receive()
        heard.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def app(scope, receive, send):
        left_behind.append(asyncio.create_task(view(receive, send)))
        await asyncio.wait(left_behind)  # which cancels nothing, as Django does

    done = await client(SeawallMiddleware(app, timeout=1.0)).finish()
    await left_behind[0]
    assert heard == [{"type": "http.disconnect"}]
    assert [message.get("status") for message in done.messages] == [504, None]


async def test_what_an_application_raises_because_its_client_left_is_no_failure_of_it(client):
    front = CircuitBreaker("front")

    class ClientGone(Exception): ...

    async def app(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        raise ClientGone

    left = client(SeawallMiddleware(app, policies=[front])).begin()
    await asyncio.sleep(0)
    left.leave()
    with pytest.raises(ClientGone):
        await left.finish()
    assert front.snapshot().failures == 0


async def test_exempt_paths_meet_no_policy(client):
    full = Bulkhead("front", max_concurrent=1)
    with full.scope():
        assert (await client(SeawallMiddleware(answering, policies=[full], exempt=["/"])).finish()).status == 200
    with pytest.raises(TypeError, match="paths"):
        SeawallMiddleware(answering, exempt="/livez")
