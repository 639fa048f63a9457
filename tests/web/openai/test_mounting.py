"""The router inside other applications, with and without a lifespan, and on its own."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from seawall import BulkheadFullError, CircuitBreaker
from seawall.engine import Deployment, EngineClosedError
from seawall.inference.errors import RuntimeFailure
from seawall.web import SeawallMiddleware
from seawall.web.openai import Limits, OpenAIRouter
from tests.web.openai.conftest import client_of, post
from tests.web.openai.scripted import ScriptedEngine, served

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}


class Opened(ScriptedEngine):
    """Answers between its opening and its closing only."""

    opened = False
    closings = 0

    async def __aenter__(self):
        self.opened = True
        return self

    async def __aexit__(self, *_):
        self.opened = False
        self.closings += 1

    def info(self):
        if not self.opened:
            raise EngineClosedError("it is not open")
        return super().info()


@pytest.mark.parametrize("prefix", ["/", "/v1", "/llm", "/a/b/v1"])
@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
def test_it_is_mounted_under_any_prefix(prefix, path):
    async def home(request):
        return PlainTextResponse("home")

    app = Starlette(routes=[Route("/home", home), Mount(prefix, OpenAIRouter(ScriptedEngine()))])
    with served(app) as port:
        status, _, body = post(port, f"{prefix.rstrip('/')}{path}", CHAT)
        assert (200, b"home") == (status, post(port, "/home", b"", method="GET")[2])
    assert "The sea is salty." == json.loads(body)["choices"][0]["message"]["content"]


def fastapi_app(router, prefix):
    fastapi = pytest.importorskip("fastapi")
    app = fastapi.FastAPI(lifespan=router.lifespan)
    app.mount(prefix, router)
    return app


def litestar_app(router, prefix):
    litestar = pytest.importorskip("litestar")
    return litestar.Litestar(
        [litestar.asgi(prefix, is_mount=True, copy_scope=True)(router)], lifespan=[router.lifespan]
    )


@pytest.mark.parametrize("prefix", ["/v1", "/llm"])
@pytest.mark.parametrize("make", [fastapi_app, litestar_app])
def test_it_is_mounted_in_frameworks_with_its_lifespan(make, prefix):
    engine = Opened()
    with served(make(OpenAIRouter(engine), prefix)) as port:
        assert 200 == post(port, f"{prefix}/chat/completions", CHAT)[0]
        assert 404 == post(port, f"{prefix}/nothing", CHAT)[0]

    assert (False, 1) == (engine.opened, engine.closings)


def test_it_streams_through_another_middleware():
    app = Starlette(routes=[Mount("/", OpenAIRouter(ScriptedEngine()))])
    app.add_middleware(SeawallMiddleware, timeout=10.0)
    with served(app) as port, client_of(port) as client:
        chunks = list(client.chat.completions.create(**CHAT, stream=True))

    assert "The sea is salty." == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("words", "failures"),
    [
        ((BulkheadFullError("engine"),), 0),
        (("The ", BulkheadFullError("engine")), 0),
        ((RuntimeFailure("a step", "broken"),), 1),
        (("The ", RuntimeFailure("a step", "broken")), 1),
    ],
    ids=["refused", "refused midway", "failed", "failed midway"],
)
def test_the_policies_around_it_hear_what_happened_and_not_only_a_status(words, failures, stream):
    front = CircuitBreaker("front")
    app = SeawallMiddleware(OpenAIRouter(ScriptedEngine(words=words)), policies=[front])
    with served(app) as port:
        post(port, "/v1/chat/completions", {**CHAT, "stream": stream})

    assert (0, failures) == (front.snapshot().successes, front.snapshot().failures)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"model": "another"}], ids=str)
def test_a_clients_mistake_is_no_failure_to_the_policies_around_it(wrong):
    front = CircuitBreaker("front")
    with served(SeawallMiddleware(OpenAIRouter(ScriptedEngine()), policies=[front])) as port:
        assert post(port, "/v1/chat/completions", {**CHAT, **wrong})[0] in (400, 404)

    assert 0 == front.snapshot().failures


def test_mounted_without_a_lifespan_it_says_that_nothing_is_open():
    with served(Starlette(routes=[Mount("/", OpenAIRouter(Opened()))])) as port:
        status, _, body = post(port, "/v1/chat/completions", CHAT)

    assert (503, "unavailable") == (status, json.loads(body)["error"]["code"])


def test_its_lifespan_is_that_of_the_application_it_is_mounted_in():
    engine = Opened()
    router = OpenAIRouter(engine)
    with served(Starlette(routes=[Mount("/", router)], lifespan=router.lifespan)) as port:
        assert 200 == post(port, "/v1/chat/completions", CHAT)[0]

    assert (False, 1) == (engine.opened, engine.closings)


def test_alone_it_opens_and_closes_its_engines_itself():
    engine = Opened()
    with served(OpenAIRouter({"scripted": engine, "again": engine})) as port:
        assert 200 == post(port, "/v1/chat/completions", CHAT)[0]

    assert (False, 1) == (engine.opened, engine.closings)


def test_what_stands_in_for_an_engine_is_served_as_one():
    class Owned(ScriptedEngine):
        closed = False

        def close(self):
            self.closed = True

    engine = Owned()
    with served(OpenAIRouter(Deployment("scripted", engine))) as port, client_of(port) as client:
        assert "The sea is salty." == client.chat.completions.create(**CHAT).choices[0].message.content

    assert engine.closed


def test_an_engine_that_does_not_open_stops_the_server_from_starting():
    class Broken(Opened):
        async def __aenter__(self):
            raise OSError("no model")

    sent = []

    async def main():
        messages = iter([{"type": "lifespan.startup"}])

        async def receive():
            return next(messages)

        async def send(message):
            sent.append(message)

        await OpenAIRouter(Broken())({"type": "lifespan"}, receive, send)

    with pytest.raises(OSError, match="no model"):
        asyncio.run(main())
    assert [{"type": "lifespan.startup.failed", "message": "no model"}] == sent


@pytest.mark.asyncio
async def test_a_websocket_is_closed_at_once():
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message["type"])

    await OpenAIRouter(ScriptedEngine())({"type": "websocket", "path": "/v1", "headers": []}, receive, send)

    assert ["websocket.close"] == sent


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({}, ValueError, "give an engine, an embedder, or both"),
        ({"engine": ScriptedEngine("a"), "embedder": ScriptedEngine("a")}, ValueError, "both have 'a'"),
        ({"engine": {"": ScriptedEngine()}}, ValueError, "name"),
        ({"engine": ScriptedEngine(), "api_keys": "secret"}, TypeError, "put it into a list"),
        ({"engine": ScriptedEngine(), "api_keys": []}, ValueError, "at least one key"),
        ({"engine": ScriptedEngine(), "api_keys": [""]}, ValueError, "none of them empty"),
        ({"engine": ScriptedEngine(), "temperature": -1}, ValueError, "temperature"),
        ({"engine": ScriptedEngine(), "max_tokens": 0}, ValueError, "max_tokens"),
        ({"engine": ScriptedEngine(), "timeout": 0}, ValueError, "timeout"),
    ],
)
def test_settings_are_checked_where_they_are_given(settings, error, reason):
    with pytest.raises(error, match=reason):
        OpenAIRouter(**settings)


@pytest.mark.parametrize("name", ["body", "choices", "body_seconds", "write_seconds"])
def test_limits_are_checked_too(name):
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})
