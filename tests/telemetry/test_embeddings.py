"""Texts that become vectors are told by OpenTelemetry's conventions too, and what they say never is."""

from __future__ import annotations

import asyncio

import pytest
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry

from seawall.inference import Embedder
from seawall.inference.errors import TextTooLongError
from seawall.telemetry import embeddings, gen_ai, install
from tests.inference import tiny_bert

TEXTS = ["why sea salty?", "rock"]  # seven tokens and three


@pytest.fixture(autouse=True)
def no_answers(monkeypatch):
    monkeypatch.setattr(gen_ai.answers, "_histograms", {})


@pytest.fixture
def embedder(tmp_path):
    folder = tiny_bert.write(tmp_path / "tiny")
    with Embedder.load(folder, cache_dir=tmp_path / "cache", threads=1, watch=embeddings) as loaded:
        yield loaded


def told_by(span):
    return {key.removeprefix("gen_ai."): value for key, value in span.attributes.items()}


def test_a_call_is_a_span_with_its_tokens_below_that_of_its_caller(provider, embedder):
    uninstall = install(tracer_provider=provider, prompts=True)
    with provider.get_tracer("app").start_as_current_span("search"):
        embedder.embed_sync(TEXTS)
        asyncio.run(embedder.embed(TEXTS))
    uninstall()
    embedder.embed_sync(TEXTS)
    *calls, search = provider.finished()
    assert [one.parent for one in calls] == 2 * [search.context]
    for one in calls:
        assert (one.name, one.kind) == (f"embeddings {embedder.name}", SpanKind.INTERNAL)
        assert one.instrumentation_scope.name == gen_ai.SCOPE
        assert told_by(one) == {
            "operation.name": "embeddings",
            "provider.name": "onnxruntime",
            "request.model": embedder.name,
            "embeddings.dimension.count": embedder.dimension,
            "usage.input_tokens": 10,
        }


def test_a_call_that_fails_is_an_error_and_one_that_is_cancelled_is_none(spans, embedder):
    with pytest.raises(TextTooLongError):
        embedder.embed_sync(["rock " * 1000])

    async def leave():
        await embedder.embed(["rock " * 1000])  # tokenized in a thread

    async def main():
        task = asyncio.create_task(leave())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())
    failed, left = spans()
    assert (failed.status.status_code, failed.attributes["error.type"]) == (StatusCode.ERROR, "TextTooLongError")
    assert left.status.status_code is StatusCode.UNSET
    assert "error.type" not in left.attributes


def test_prometheus_has_how_long_they_took_and_their_tokens(embedder, fresh):
    registry = CollectorRegistry()
    uninstall = install(registry=registry)
    embedder.embed_sync(TEXTS)
    labels = {
        "gen_ai_operation_name": "embeddings",
        "gen_ai_provider_name": "onnxruntime",
        "gen_ai_request_model": embedder.name,
    }
    count = registry.get_sample_value("gen_ai_server_request_duration_seconds_count", labels)
    tokens = registry.get_sample_value("gen_ai_client_token_usage_sum", {**labels, "gen_ai_token_type": "input"})
    uninstall()
    assert (count, tokens) == (1, 10)


def test_a_tracer_that_raises_harms_no_call(provider, embedder, monkeypatch, caplog):
    uninstall = install(tracer_provider=provider)
    monkeypatch.setattr(gen_ai.answers, "tracer", object())
    assert embedder.embed_sync(TEXTS).shape == (2, embedder.dimension)
    uninstall()
    assert "the call goes on" in caplog.text
