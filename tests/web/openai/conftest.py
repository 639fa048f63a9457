"""The real model behind the router on a real server, and scripted engines for what it never does."""

from __future__ import annotations

import contextlib
import http.client
import json

import openai
import pytest

from seawall import Engine
from seawall.inference import models
from seawall.inference.embed.embedder import Embedder
from seawall.web.openai import OpenAIRouter
from tests.web.openai.scripted import WORDS, ScriptedEngine, served

MODEL = "smollm2-135m"
ENCODER = "all-minilm-l6-v2"


@pytest.fixture(scope="session")
def embedder():
    models.add(ENCODER)
    with Embedder.load(ENCODER) as embedder:
        yield embedder


@pytest.fixture(scope="session")
def real_engine():
    models.add(MODEL)
    return Engine.load(MODEL, speculation="auto")


@pytest.fixture(scope="session")
def real(real_engine, embedder):
    """The port of a server with the bundled models, which answers greedily unless told."""
    with served(OpenAIRouter(real_engine, embedder=embedder, temperature=0.0)) as port:
        yield port


def client_of(port, **settings):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", **{"api_key": "x", "max_retries": 0, **settings})


@pytest.fixture(scope="session")
def client(real):
    with client_of(real) as client:
        yield client


@pytest.fixture(scope="session")
def stage():
    """A server that most tests share, and its engine."""
    engine = ScriptedEngine()
    with served(OpenAIRouter(engine)) as port:
        yield engine, port


@pytest.fixture
def scripted(stage):
    engine, _ = stage
    engine.words = WORDS
    engine.asked.clear()
    return engine


@pytest.fixture
def serve(stage):
    """Starts a router over a scripted engine; gives the official client, whose `port` is the server's."""
    with contextlib.ExitStack() as stack:

        def start(engine, *, client=None, **settings):
            if engine is stage[0] and not settings:
                port = stage[1]
            else:
                port = stack.enter_context(served(OpenAIRouter(engine, **settings)))
            found = stack.enter_context(client_of(port, **(client or {})))
            found.port = port
            return found

        yield start


def post(port, path, body, *, method="POST", **headers):
    """Status, headers and body of a plain request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"content-type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
        connection.request(method, path, content, named)
        answer = connection.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()
