"""Answers of models by OpenTelemetry's conventions, and their texts only where asked for."""

from __future__ import annotations

import asyncio
import json
import tomllib
from contextlib import aclosing
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry

from seawall import Pipeline, use_clock
from seawall.core import answering
from seawall.core.answering import Asked
from seawall.inference.errors import RuntimeFailure
from seawall.telemetry import gen_ai, install
from seawall.testing import VirtualClock

SECRET = "my secret question"


class Model:
    """Tells of its answers as an engine does, and needs a second for its first token and a tenth for each other one."""

    def __init__(self, clock, words=("one ", "two ", "three"), fails=False):
        self.clock, self.words, self.fails = clock, words, fails
        self.inside = []

    async def steps(self, prompt):
        with answering.watched(Asked("tiny", prompt, max_tokens=9)) as answer:
            answer.read(7)
            for index, word in enumerate(self.words):
                await asyncio.to_thread(self.step, 0.1 if index else 1.0)
                answer.piece(word, None if word != self.words[-1] else "stop")
                yield word

    def step(self, seconds):
        self.inside.append(trace.get_current_span().get_span_context())
        if self.fails:
            raise RuntimeFailure("decoding", "broken")
        self.clock.advance(seconds)


def ask(model, prompt=SECRET, leave_after=None):
    async def main():
        seen = 0
        async with aclosing(Pipeline(name="tiny.generate")(model.steps)(prompt)) as pieces:
            async for _ in pieces:
                seen += 1
                if seen == leave_after:
                    return

    with use_clock(model.clock):
        asyncio.run(main())


@pytest.fixture
def model():
    return Model(VirtualClock())


@pytest.fixture(autouse=True)
def no_answers(monkeypatch):
    monkeypatch.setattr(gen_ai.answers, "_histograms", {})


def test_names_units_and_buckets_are_those_of_the_pinned_conventions():
    table = tomllib.loads((Path(__file__).parent / "gen_ai_conventions.toml").read_text())
    assert table.pop("version") == gen_ai.VERSION
    assert {name: (one.unit, list(one.bounds)) for name, one in gen_ai.METRICS.items()} == {
        name: (one["unit"], one["bounds"]) for name, one in table.items()
    }


def test_an_answer_is_a_span_below_that_of_its_call_with_what_was_asked_and_used(spans, model):
    ask(model)
    answer, call = spans()
    assert (answer.name, call.name) == ("chat tiny", "tiny.generate")
    assert answer.parent == call.context
    assert answer.kind is SpanKind.INTERNAL
    assert answer.instrumentation_scope.name == "seawall.gen_ai"
    assert answer.instrumentation_scope.schema_url == "https://opentelemetry.io/schemas/1.41.1"
    assert dict(answer.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "onnxruntime",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.time_to_first_chunk": 1.0,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert model.inside == 3 * [call.context]  # the context reached the thread of the decoder


def test_texts_are_recorded_only_where_asked_for(provider, model):
    uninstall = install(tracer_provider=provider)
    ask(model)
    uninstall()
    told = "".join(str(dict(span.attributes)) for span in provider.finished())
    assert SECRET not in told
    assert "two" not in told
    uninstall = install(tracer_provider=provider, prompts=True)
    ask(model, [{"role": "user", "content": SECRET}])
    uninstall()
    attributes = provider.finished()[-2].attributes
    asked, answered = json.loads(attributes["gen_ai.input.messages"]), json.loads(attributes["gen_ai.output.messages"])
    assert asked == [{"role": "user", "parts": [{"type": "text", "content": SECRET}]}]
    assert answered[0]["parts"][0]["content"] == "one two three"


def test_a_text_that_is_completed_verbatim_is_no_chat_and_its_samples_grow_at_once(provider, fresh):
    registry, clock = CollectorRegistry(), VirtualClock()
    uninstall = install(tracer_provider=provider, registry=registry, prompts=True)
    with use_clock(clock), answering.watched(Asked("tiny", [1, 2, 3], 9, chat=False, samples=2)) as answer:
        answer.read(3)
        for turn in range(4):  # a second for the first tokens of both samples, then two tenths for each two
            clock.advance(1.0 if turn == 0 else 0.2)
            answer.piece("a", "stop" if turn == 3 else None)
            answer.piece("b", "length" if turn == 3 else None, 1)
    (span,) = provider.finished()
    labels = {
        "gen_ai_operation_name": "text_completion",
        "gen_ai_provider_name": "onnxruntime",
        "gen_ai_request_model": "tiny",
    }
    seconds = registry.get_sample_value("gen_ai_server_time_per_output_token_seconds_sum", labels)
    uninstall()
    assert seconds == pytest.approx(0.2)
    assert span.name == "text_completion tiny"
    assert span.attributes["gen_ai.request.choice.count"] == 2
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop", "length")
    assert span.attributes["gen_ai.input.messages"] == "[]"  # tokens have no text
    told = json.loads(span.attributes["gen_ai.output.messages"])
    assert [(one["parts"][0]["content"], one["finish_reason"]) for one in told] == [
        ("aaaa", "stop"),
        ("bbbb", "length"),
    ]


def test_a_failed_answer_is_an_error_and_one_that_was_left_is_none(spans, model):
    ask(model, leave_after=1)
    model.fails = True
    with pytest.raises(RuntimeFailure):
        ask(model)
    left, failed = (span for span in spans() if span.name.startswith("chat"))
    assert left.status.status_code is StatusCode.UNSET
    assert left.attributes["gen_ai.usage.output_tokens"] == 1
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes["error.type"] == "RuntimeFailure"


def test_durations_and_tokens_are_the_same_in_prometheus_and_opentelemetry(model, fresh):
    reader, registry = InMemoryMetricReader(), CollectorRegistry()
    uninstall = install(meter_provider=MeterProvider([reader]), registry=registry)
    ask(model)
    model.fails = True
    with pytest.raises(RuntimeFailure):
        ask(model)
    theirs = {
        (metric.name, point.attributes.get("gen_ai.token.type"), point.attributes.get("error.type")): point
        for resource in reader.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
        if scope.scope.name == "seawall.gen_ai"
    }

    def ours(name, **more):
        labels = {
            "gen_ai_operation_name": "chat",
            "gen_ai_provider_name": "onnxruntime",
            "gen_ai_request_model": "tiny",
        }
        return registry.get_sample_value(name, labels | more)

    assert ours("gen_ai_server_request_duration_seconds_sum", error_type="") == pytest.approx(1.2)
    assert ours("gen_ai_server_request_duration_seconds_count", error_type="RuntimeFailure") == 1
    assert ours("gen_ai_server_time_to_first_token_seconds_sum") == pytest.approx(1.0)
    assert ours("gen_ai_server_time_per_output_token_seconds_sum") == pytest.approx(0.1)
    assert ours("gen_ai_client_token_usage_sum", gen_ai_token_type="output") == 3
    assert ours("gen_ai_client_token_usage_sum", gen_ai_token_type="input") == 14
    uninstall()
    assert theirs["gen_ai.server.request.duration", None, None].sum == pytest.approx(1.2)
    assert theirs["gen_ai.server.request.duration", None, "RuntimeFailure"].count == 1
    assert theirs["gen_ai.client.token.usage", "output", None].sum == 3
    assert theirs["gen_ai.server.time_to_first_token", None, None].count == 1
