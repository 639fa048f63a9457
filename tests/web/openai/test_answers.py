"""What the official client makes of every error, refusal and end that a router can answer with."""

from __future__ import annotations

import json
import logging
import random
import threading

import openai
import pytest

from seawall import Bulkhead, CallTimeoutError, CircuitOpenError, DeadlinePassedError, RateLimitedError, time_left
from seawall.core.ambient import Priority, current_priority
from seawall.core.places import BulkheadFullError
from seawall.engine import DeadlineUnmeetableError, EngineClosedError
from seawall.inference.errors import (
    BatchQueueFullError,
    EmptyPromptError,
    InvalidSettingError,
    PromptTooLongError,
    RunDeadlineError,
    RuntimeDeviceError,
    RuntimeExhaustedError,
    RuntimeFailure,
)
from seawall.web.openai.errors import OpenAIAnswers
from tests.web.openai.conftest import post
from tests.web.openai.scripted import WORDS, ScriptedEngine, events

QUESTION = [{"role": "user", "content": "my secret question"}]


def ask(client, **settings):
    return client.chat.completions.create(**{"model": "scripted", "messages": QUESTION, **settings})


ERRORS = [
    (BulkheadFullError("engine", retry_after=3.0), openai.InternalServerError, 503, "server_overloaded", "overloaded"),
    (CircuitOpenError("engine", retry_after=9.0), openai.InternalServerError, 503, "server_overloaded", "circuit_open"),
    (RateLimitedError("engine"), openai.RateLimitError, 429, "rate_limit_exceeded", "rate_limit_exceeded"),
    (CallTimeoutError("engine", 1.0), openai.InternalServerError, 504, "timeout", "deadline_exceeded"),
    (DeadlinePassedError("engine"), openai.InternalServerError, 504, "timeout", "deadline_exceeded"),
    (DeadlineUnmeetableError("engine"), openai.InternalServerError, 504, "timeout", "deadline_exceeded"),
    (DeadlineUnmeetableError("engine", 2.0), openai.InternalServerError, 503, "server_overloaded", "overloaded"),
    (RunDeadlineError(1.0), openai.InternalServerError, 504, "timeout", "deadline_exceeded"),
    (BatchQueueFullError("m", 9, 9, 2.0), openai.InternalServerError, 503, "server_overloaded", "overloaded"),
    (EngineClosedError("it is closed"), openai.InternalServerError, 503, "server_overloaded", "unavailable"),
    (RuntimeDeviceError("a step", "gone"), openai.InternalServerError, 503, "server_overloaded", "unavailable"),
    (RuntimeExhaustedError("a step", "full"), openai.InternalServerError, 503, "server_overloaded", "exhausted"),
    (RuntimeFailure("a step", "broken"), openai.InternalServerError, 500, "server_error", "model_error"),
    (ZeroDivisionError("a bug"), openai.InternalServerError, 500, "server_error", "internal_error"),
    (EmptyPromptError(), openai.BadRequestError, 400, "invalid_request_error", "invalid_value"),
    (PromptTooLongError(99, 63), openai.BadRequestError, 400, "invalid_request_error", "context_length_exceeded"),
    (InvalidSettingError("n is 9"), openai.BadRequestError, 400, "invalid_request_error", "invalid_value"),
]


EVERY_ERROR = pytest.mark.parametrize(
    ("error", "kind", "status", "type_", "code"), ERRORS, ids=[f"{type(one[0]).__name__}-{one[2]}" for one in ERRORS]
)


@EVERY_ERROR
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_error_before_the_answer_has_its_status_and_code(
    serve, scripted, error, kind, status, type_, code, stream
):
    scripted.words = (error,)
    with pytest.raises(kind) as caught:
        ask(serve(scripted), stream=stream)

    assert (status, type_, code) == (caught.value.status_code, caught.value.type, caught.value.code)
    assert caught.value.request_id.startswith("req_")
    assert "application/json" == caught.value.response.headers["content-type"]


@EVERY_ERROR
def test_every_error_in_mid_stream_is_raised_after_the_text_so_far(serve, scripted, error, kind, status, type_, code):
    scripted.words = ("The ", "sea ", error)
    said = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in ask(serve(scripted), stream=True):
            said.append(chunk.choices[0].delta.content)

    assert ["", "The ", "sea "] == said
    assert code == caught.value.code
    assert not isinstance(caught.value, openai.APIConnectionError)


def test_a_stream_that_failed_does_not_say_it_is_done(serve, scripted):
    scripted.words = ("The ", RuntimeFailure("a step", "broken"))
    body = {"model": "scripted", "messages": QUESTION, "stream": True}
    status, headers, raw = post(serve(scripted).port, "/v1/chat/completions", body)

    assert 200 == status
    assert "text/event-stream; charset=utf-8" == headers["content-type"]
    assert ("no-store", "no") == (headers["cache-control"], headers["x-accel-buffering"])
    *_, last = events(raw)
    assert "model_error" == json.loads(last)["error"]["code"]


def test_a_deadline_that_is_too_short_even_for_an_idle_engine_is_not_tried_again(serve, scripted):
    scripted.words = (DeadlineUnmeetableError("engine"),)
    client = serve(scripted, client={"max_retries": 2})
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client)

    assert "false" == caught.value.response.headers["x-should-retry"]
    assert 1 == len(scripted.asked)


@pytest.mark.parametrize("error", [BulkheadFullError("engine", retry_after=3.0), BatchQueueFullError("m", 9, 9, 3.0)])
def test_a_refusal_says_when_to_come_back(serve, scripted, error):
    scripted.words = (error,)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(serve(scripted))

    assert 3 <= int(caught.value.response.headers["retry-after"]) <= 4


@pytest.mark.parametrize(("wait", "least", "most"), [(0.004, 500, 625), (0.5, 500, 625), (0.8, 800, 1000)])
def test_who_is_refused_a_place_that_is_free_in_no_time_does_not_spend_its_retries_at_once(wait, least, most):
    answers = OpenAIAnswers(rng=random.Random(0))
    refusal = answers.answer_to(BulkheadFullError("engine", retry_after=wait))
    waits = {int(answers.headers(refusal)["retry-after-ms"]) for _ in range(100)}

    assert least <= min(waits) < max(waits) <= most


def test_the_client_tries_again_where_it_may_and_gets_its_answer(serve):
    class Moody(ScriptedEngine):
        def stream(self, prompt, **settings):
            self.words = (BulkheadFullError("engine", retry_after=0.01),) if len(self.asked) < 1 else WORDS
            return super().stream(prompt, **settings)

    client = serve(Moody(), client={"max_retries": 2})
    answer = client.chat.completions.with_raw_response.create(model="scripted", messages=QUESTION)

    assert 1 == answer.retries_taken
    assert "The sea is salty." == answer.parse().choices[0].message.content


def test_a_client_that_waits_no_more_is_not_asked_to_try_again(serve, scripted):
    client = serve(scripted, client={"max_retries": 2})
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, extra_headers={"x-request-deadline": "1"})

    assert (504, "deadline_exceeded") == (caught.value.status_code, caught.value.code)
    assert "false" == caught.value.response.headers["x-should-retry"]
    assert [] == scripted.asked


def test_a_deadline_ends_an_answer_before_it_is_whole(serve, scripted):
    scripted.words = ("The ", threading.Event())
    with pytest.raises(openai.InternalServerError) as caught:
        ask(serve(scripted), extra_headers={"x-envoy-expected-rq-timeout-ms": "100"})

    assert (504, "deadline_exceeded") == (caught.value.status_code, caught.value.code)
    assert scripted.stopped.wait(60)


def test_a_deadline_ends_a_stream_that_has_begun(serve, scripted):
    scripted.words = ("The ", threading.Event())
    said = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in ask(serve(scripted), stream=True, extra_headers={"x-envoy-expected-rq-timeout-ms": "200"}):
            said.append(chunk.choices[0].delta.content)

    assert ["", "The "] == said
    assert "deadline_exceeded" == caught.value.code
    assert scripted.stopped.wait(60)


def test_policies_of_the_router_refuse_before_the_engine_is_asked(serve, scripted):
    places = Bulkhead("front", max_concurrent=1)
    client = serve(scripted, policies=[places])
    with places.scope(), pytest.raises(openai.InternalServerError) as caught:
        ask(client)

    assert (503, "overloaded") == (caught.value.status_code, caught.value.code)
    assert [] == scripted.asked
    assert client.models.list().data  # what costs nothing is answered all the same


def test_a_clients_mistake_is_no_failure_to_the_policies(serve, scripted):
    from seawall import CircuitBreaker

    breaker = CircuitBreaker("front", failure_rate=0.01, minimum_calls=1)
    client = serve(scripted, policies=[breaker])
    for mistake in ({"temperature": 3}, {"model": "other"}):
        with pytest.raises(openai.APIStatusError):
            ask(client, **mistake)
    scripted.words = (PromptTooLongError(99, 63),)
    with pytest.raises(openai.BadRequestError):
        ask(client)

    assert 0 == breaker.snapshot().failures


def test_an_unknown_model_is_not_found(serve, scripted):
    client = serve(scripted)
    with pytest.raises(openai.NotFoundError, match="there is scripted") as caught:
        ask(client, model="gpt-9")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError, match="there is none"):
        client.embeddings.create(model="scripted", input="a")

    assert ("model_not_found", "model") == (caught.value.code, caught.value.param)


def test_a_key_is_needed_where_there_are_keys(serve, scripted):
    client = serve(scripted, api_keys={"right": "ann"}, client={"api_key": "wrong"})
    with pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    status, headers, _ = post(client.port, "/v1/models", b"", method="GET")

    assert "invalid_api_key" == caught.value.code
    assert (401, "Bearer") == (status, headers["www-authenticate"])
    with client.with_options(api_key="right") as known:
        assert known.models.list().data


def test_a_tenant_is_the_owner_of_the_key(serve, scripted):
    ask(serve(scripted, api_keys={"right": "ann"}, client={"api_key": "right"}), user="somebody")

    assert "ann" == scripted.asked[0][1]["tenant"]


def test_keys_without_names_are_tenants_of_their_own_and_never_the_key(serve, scripted):
    ask(serve(scripted, api_keys=["right"], client={"api_key": "right"}))

    assert scripted.asked[0][1]["tenant"] not in ("", "right")


def test_an_application_may_tell_the_tenant_itself(serve, scripted):
    ask(serve(scripted, tenant=lambda scope, user: f"{scope['client'][0]} {user}"), user="bob")

    assert "127.0.0.1 bob" == scripted.asked[0][1]["tenant"]


def test_the_application_tells_the_priority_and_the_client_its_deadline(serve):
    class Asking(ScriptedEngine):
        async def stream(self, prompt, **settings):
            told.append((current_priority.get(), time_left()))
            async for piece in super().stream(prompt, **settings):
                yield piece

    told = []
    client = serve(Asking(), priority=lambda scope: Priority.HIGH, timeout=60.0)
    ask(client, extra_headers={"grpc-timeout": "20S"})
    ask(client, extra_headers={"grpc-timeout": "9999S"})

    assert [Priority.HIGH, Priority.HIGH] == [priority for priority, _ in told]
    assert [True, True] == [most - 15 < left <= most for most, (_, left) in zip((20, 60), told, strict=True)]


def test_settings_reach_the_engine(serve, scripted):
    ask(
        serve(scripted),
        temperature=0.5,
        top_p=0.9,
        seed=4,
        stop="x",
        n=2,
        max_completion_tokens=7,
        frequency_penalty=0.25,
        presence_penalty=0.5,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5},
    )

    prompt, settings = scripted.asked[0]
    penalties = settings.pop("penalties")
    assert QUESTION == prompt
    assert (1.5, 0.5, 0.25) == (penalties.repetition, penalties.presence, penalties.frequency)
    assert settings == {
        "chat": True,
        "constraint": None,
        "logprobs": None,
        "max_tokens": 7,
        "min_p": 0.1,
        "n": 2,
        "seed": 4,
        "stop": ("x",),
        "temperature": 0.5,
        "tenant": "",
        "top_k": 5,
        "top_p": 0.9,
    }


def test_a_request_that_names_no_limit_may_fill_the_context_or_the_servers_limit(serve, scripted):
    ask(serve(scripted))
    ask(serve(scripted, max_tokens=20))

    assert [64, 20] == [settings["max_tokens"] for _, settings in scripted.asked]


@pytest.mark.parametrize(
    ("settings", "param"), [({"max_completion_tokens": 21}, "max_completion_tokens"), ({"n": 9}, "n")]
)
def test_a_request_for_more_than_the_server_gives_is_refused(serve, scripted, settings, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(serve(scripted, max_tokens=20), **settings)

    assert param == caught.value.param
    assert [] == scripted.asked


def test_usage_counts_the_prompt_once_and_tells_drafts_and_cached_tokens(serve, scripted):
    usage = ask(serve(scripted), n=2).usage

    assert (5, 8, 13) == (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    assert 2 == usage.prompt_tokens_details.cached_tokens
    details = usage.completion_tokens_details
    assert (2, 4) == (details.accepted_prediction_tokens, details.rejected_prediction_tokens)


def test_a_safe_request_id_comes_back_and_an_unsafe_one_does_not(serve, scripted):
    port = serve(scripted).port
    _, echoed, _ = post(port, "/v1/models", b"", method="GET", x_request_id="trace-1.a:b_c")
    _, made, _ = post(port, "/v1/models", b"", method="GET", x_request_id="<script>")

    assert "trace-1.a:b_c" == echoed["x-request-id"]
    assert made["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/responses", 404, "unknown_url"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there_is_answered_in_the_same_shape(serve, scripted, method, path, status, code):
    found, headers, body = post(serve(scripted).port, path, b"{}", method=method)

    assert (status, code) == (found, json.loads(body)["error"]["code"])
    assert ("allow" in headers) == (status == 405)


def test_nothing_of_a_request_or_its_answer_is_logged(serve, scripted, caplog):
    caplog.set_level(logging.DEBUG, logger="seawall")
    client = serve(scripted)
    ask(client, stop="my secret stop")
    scripted.words = ("a secret answer ", RuntimeFailure("a step", "broken"))
    with pytest.raises(openai.InternalServerError):
        ask(client)

    logged = [record for record in caplog.records if record.name.startswith("seawall")]
    assert ["RuntimeFailure" in record.getMessage() for record in logged] == [True]
    assert "secret" not in "".join(map(logging.Formatter().format, logged))


def test_two_engines_are_told_apart_by_the_model_asked_for(serve):
    client = serve({"a": ScriptedEngine("x", ("from a",)), "b": ScriptedEngine("x", ("from b",))})

    assert "from b" == ask(client, model="b").choices[0].message.content
    assert ["a", "b"] == [one.id for one in client.models.list().data]
