"""schemathesis asks everything that the OpenAPI document allows, and much that it does not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from seawall.web.openai import OpenAIRouter
from tests.web.openai.conftest import post
from tests.web.openai.scripted import ScriptedEngine, served


class ScriptedEmbedder:
    """Every text is one vector."""

    name = "vectors"
    dimension = 4

    def encode(self, text):
        return [1, 2]

    async def embed(self, texts):
        return np.full((len(texts), self.dimension), 0.5, np.float32)


@pytest.fixture(scope="session")
def port():
    with served(OpenAIRouter(ScriptedEngine(), embedder=ScriptedEmbedder(), api_keys=["right"])) as port:
        yield port


# That what is allowed is also accepted is not checked: no schema says that top_logprobs needs logprobs, or how many
# answers n and the number of prompts make together.
KEY = {"Authorization": "Bearer right"}
OPERATIONS = [
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/embeddings", "POST"),
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "wrong"])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_nothing_that_can_be_asked_breaks_the_server_or_its_document(port, path, method, mode):
    if (path, mode) == ("/v1/models", GenerationMode.NEGATIVE):
        pytest.skip("there is nothing to get wrong")
    api = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", headers=KEY)

    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    def ask(case):
        case.call_and_validate(headers=KEY, excluded_checks=[positive_data_acceptance])

    ask()


def test_the_document_is_at_both_places_for_those_with_a_key(port):
    paths = ("/openapi.json", "/v1/openapi.json")
    documents = [json.loads(post(port, path, b"", method="GET", **KEY)[2]) for path in paths]

    assert 401 == post(port, paths[0], b"", method="GET")[0]
    assert documents[0] == documents[1]
    assert ["vectors"] == _models_of(documents[0], "/v1/embeddings")
    assert ["scripted"] == _models_of(documents[0], "/v1/completions")
    assert [{"key": []}] == documents[0]["security"]


def _models_of(document, path):
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return body["properties"]["model"]["enum"]


def test_a_router_without_keys_or_embedders_says_so():
    with served(OpenAIRouter(ScriptedEngine())) as port:
        document = json.loads(post(port, "/openapi.json", b"", method="GET")[2])

    assert "security" not in document
    assert "/v1/embeddings" not in document["paths"]
