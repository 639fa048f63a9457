"""What a scrape tells of requests that came through the router."""

from __future__ import annotations

import threading

import openai
import pytest
from prometheus_client import CollectorRegistry

from seawall.engine.metering import EngineSnapshot
from seawall.inference.errors import RuntimeFailure
from seawall.web.openai import OpenAIRouter
from tests.web.openai.conftest import client_of, post
from tests.web.openai.scripted import ScriptedEngine, eventually, served

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def scraped():
    """A router's engine, a client of it, and a function that reads one number."""
    engine = ScriptedEngine()
    router, registry = OpenAIRouter(engine), CollectorRegistry()
    registry.register(router.collector)

    def read(name, **labels):
        return registry.get_sample_value(f"vllm:{name}", {"model_name": engine.name, **labels})

    with served(router) as port, client_of(port) as client:
        client.port = port
        yield engine, client, read


def test_tokens_and_ends_are_counted(scraped):
    _, client, read = scraped
    client.chat.completions.create(**CHAT)
    list(client.chat.completions.create(**CHAT, stream=True))

    assert (10, 8) == (read("prompt_tokens_total"), read("generation_tokens_total"))
    assert (6, 2) == (read("spec_decode_num_draft_tokens_total"), read("spec_decode_num_accepted_tokens_total"))
    assert (2, 0) == tuple(read("request_success_total", finished_reason=reason) for reason in ("stop", "length"))
    assert 2 == read("time_to_first_token_seconds_count")
    assert 2 * 3 == read("inter_token_latency_seconds_count")
    eventually(lambda: read("e2e_request_latency_seconds_count") == 2)


def test_requests_wait_then_run_then_are_gone(scraped):
    engine, client, read = scraped
    begin, go_on = threading.Event(), threading.Event()
    engine.words = (begin, "The ", go_on, "end")
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(client.chat.completions.create(**CHAT, stream=True)))
    thread.start()
    eventually(lambda: engine.running)
    assert (1, 0) == (read("num_requests_waiting"), read("num_requests_running"))
    begin.set()
    eventually(lambda: read("time_to_first_token_seconds_count"))
    assert (0, 1) == (read("num_requests_waiting"), read("num_requests_running"))
    go_on.set()
    thread.join(60)

    assert seen
    eventually(lambda: (read("num_requests_waiting"), read("num_requests_running")) == (0, 0))


def test_failures_and_refusals_leave_nothing_running_and_are_no_successes(scraped):
    engine, client, read = scraped
    for words in [(RuntimeFailure("a step", "broken"),), ("The ", RuntimeFailure("a step", "broken"))]:
        engine.words = words
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**CHAT)
    assert 400 == post(client.port, "/v1/chat/completions", {**CHAT, "n": 99})[0]

    assert (0, 0) == (read("num_requests_waiting"), read("num_requests_running"))
    assert (0, 0) == (read("e2e_request_latency_seconds_count"), read("request_success_total", finished_reason="stop"))


def test_what_the_engine_knows_better_comes_from_its_snapshot():
    class Metered(ScriptedEngine):
        def snapshot(self):
            return EngineSnapshot(
                running=3, waiting=4, cache_used_bytes=50, cache_bytes=200, prefix_queries=9, prefix_hits=6
            )

    registry = CollectorRegistry()
    registry.register(OpenAIRouter({"m": Metered()}).collector)

    told = {name: registry.get_sample_value(f"vllm:{name}", {"model_name": "m"}) for name in _GAUGES}
    assert told == {"num_requests_running": 3, "num_requests_waiting": 4, "kv_cache_usage_perc": 0.25}
    assert 6 == registry.get_sample_value("vllm:prefix_cache_hits_total", {"model_name": "m"})


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("TEXT", "TEXT named_metrics.num_requests_running=1, named_metrics.num_requests_waiting=0"),
        ("json", 'JSON {"named_metrics": {"num_requests_running": 1, "num_requests_waiting": 0}}'),
        ("xml", None),
    ],
)
def test_a_gateway_that_asks_hears_in_a_header_how_busy_the_model_is(scraped, form, told):
    _, client, _ = scraped
    _, headers, _ = post(client.port, "/v1/chat/completions", CHAT, endpoint_load_metrics_format=form)

    assert told == headers.get("endpoint-load-metrics")


_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def test_a_second_collector_of_the_same_names_is_refused():
    registry = CollectorRegistry()
    registry.register(OpenAIRouter(ScriptedEngine()).collector)

    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(OpenAIRouter(ScriptedEngine()).collector)
