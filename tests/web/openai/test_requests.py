"""What a request may say: each parameter checked by name, the body as hostile as it gets. No server, no model."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seawall.web.openai import requests
from seawall.web.openai.body import DEPTH, parsed
from seawall.web.openai.errors import RequestError
from seawall.web.openai.fields import Shape

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION = {"model": "m", "prompt": "Hello"}


PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def refused(read, *arguments):
    with pytest.raises(RequestError) as caught:
        read(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"\xff\xfe", "no UTF-8: invalid start byte at byte 0"),
        (b'{"a": NaN}', "NaN, which is no JSON"),
        (b'{"a": -Infinity}', "-Infinity, which is no JSON"),
        (b'{"a": 1e999}', "a number that is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number that is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "the name 'a' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the name 'b' twice"),
        (b'{"a": ' + b"[" * DEPTH + b"]" * DEPTH + b"}", "more than 64 deep"),
        (b"[" * 200_000, "more than 64 deep"),
    ],
)
def test_a_body_that_is_no_good_is_refused_with_the_reason(body, reason):
    error = refused(parsed, body)

    assert 400 == error.status
    assert "invalid_json" == error.code
    assert reason in str(error)


def test_a_body_may_nest_as_deep_as_a_schema_needs():
    body = b'{"a": ' + b"[" * (DEPTH - 1) + b"]" * (DEPTH - 1) + b"}"

    assert ["a"] == list(parsed(body))


@PATIENT
@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_being_refused(body):
    with contextlib.suppress(RequestError):
        assert isinstance(parsed(body), dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@PATIENT
@given(st.data())
@pytest.mark.parametrize(
    ("shape", "read", "good"),
    [
        (requests.CHAT, requests.chat, CHAT),
        (requests.COMPLETION, requests.completion, COMPLETION),
        (requests.EMBEDDING, requests.embedding, {"model": "m", "input": "Hello"}),
    ],
    ids=["chat", "completion", "embedding"],
)
def test_no_value_of_any_parameter_does_more_than_being_refused(shape, read, good, data):
    names = st.sampled_from([*shape.fields, *shape.unsupported])
    body = {**good, **data.draw(st.dictionaries(names, JSON, max_size=4))}
    try:
        asked = read(body)
    except RequestError as error:
        named = error.param
        assert named
    else:
        assert asked.model


@pytest.mark.parametrize(
    ("changed", "param", "code", "reason"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter", "did you mean temperature?"),
        ({"x" * 100: 1}, "x" * 64, "unknown_parameter", "unknown parameter: x"),
        ({"\ud800": 1}, "\\ud800", "unknown_parameter", "unknown parameter"),
        ({"model": None}, "model", "missing_required_parameter", "model is missing"),
        ({"model": 1}, "model", "invalid_value", "must be a string, got 1"),
        ({"messages": []}, "messages", "invalid_value", "1 to 1024 items, got 0"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "is missing"),
        ({"messages": [{"role": "cook", "content": ""}]}, "messages[0].role", "invalid_value", "one of 'system'"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "unsupported_value", "no tools"),
        ({"messages": ["Hello"]}, "messages[0]", "invalid_value", "an object, got a string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "invalid_value", "surrogate"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "unsupported_value",
            "image_url, which is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": "", "name": "Ann"}]},
            "messages[0].name",
            "unsupported_parameter",
            "",
        ),
        ({"temperature": 2.1}, "temperature", "invalid_value", "a number from 0 to 2, got 2.1"),
        ({"temperature": "1"}, "temperature", "invalid_value", "a number from 0 to 2, got a string"),
        ({"temperature": True}, "temperature", "invalid_value", "got true"),
        ({"top_p": 0}, "top_p", "invalid_value", "a number above 0 to 1, got 0"),
        ({"n": 0}, "n", "invalid_value", "a whole number from 1 to 128, got 0"),
        ({"n": 1.5}, "n", "invalid_value", "a whole number"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "from 1 to"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value", "give one of them"),
        ({"seed": 2**63}, "seed", "invalid_value", "a whole number"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value", "0 to 4 items, got 5"),
        ({"stop": ""}, "stop", "invalid_value", "must not be empty"),
        ({"stream": 1}, "stream", "invalid_value", "true or false, got 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "needs stream: true"),
        ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "unknown_parameter", ""),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "from 0 to 20"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "this server calls no tools"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "unsupported_parameter", "not supported"),
        ({"store": True}, "store", "unsupported_parameter", "not stored"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter", "writes text"),
        ({"priority": 9}, "priority", "unsupported_parameter", "the operator decides"),
        ({"response_format": {}}, "response_format.type", "missing_required_parameter", ""),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "one of 'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value", "needs it"),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value", "needs one of"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs.choice",
            "invalid_value",
            "one rule",
        ),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "unknown_parameter", ""),
    ],
)
def test_what_is_wrong_is_named_with_its_rule(changed, param, code, reason):
    error = refused(requests.chat, {**CHAT, **changed})

    assert (400, param, code) == (error.status, error.param, error.code)
    assert reason in str(error)
    assert "Hello" not in str(error)


def test_what_others_support_is_taken_where_it_changes_nothing():
    neutral = {name: known.neutral[0] if known.neutral else None for name, known in requests.CHAT.unsupported.items()}

    assert requests.chat(CHAT) == requests.chat({**CHAT, **neutral})


def test_null_is_as_good_as_left_out():
    nothing = dict.fromkeys(requests.CHAT.fields.keys() - {"model", "messages"})

    assert requests.chat(CHAT) == requests.chat({**CHAT, **nothing})


def test_an_answer_of_the_official_client_can_be_sent_back():
    said = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "tool_calls": None,
    }
    asked = requests.chat({**CHAT, "messages": [*CHAT["messages"], said, {"role": "user", "content": "More"}]})

    assert {"role": "assistant", "content": "Hi"} == asked.prompts[0][1]


def test_parts_of_text_are_one_text_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    asked = requests.chat({**CHAT, "messages": [{"role": "developer", "content": parts}]})

    assert [[{"role": "system", "content": "Be brief."}]] == asked.prompts


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], "b"], [[1], "b"]), ([1.0], [[1]])],
)
def test_a_prompt_is_text_or_tokens_or_several_of_them(prompt, prompts):
    assert prompts == requests.completion({**COMPLETION, "prompt": prompt}).prompts


@pytest.mark.parametrize("prompt", [[], 5, {}, [[]], [None], [1, "a"], [[-1]], [True]])
def test_a_prompt_of_anything_else_is_refused(prompt):
    assert refused(requests.completion, {**COMPLETION, "prompt": prompt}).param.startswith("prompt")


def test_vllms_way_to_switch_top_k_off_is_known():
    assert 0 == requests.chat({**CHAT, "top_k": -1}).top_k


def test_a_negative_seed_is_a_seed():
    assert requests.chat({**CHAT, "seed": -1}).seed == 2**64 - 1


def test_a_completion_without_a_limit_has_openais():
    assert 16 == requests.completion(COMPLETION).max_tokens
    assert requests.chat(CHAT).max_tokens is None


@pytest.mark.parametrize("shape", [requests.CHAT, requests.COMPLETION, requests.EMBEDDING])
def test_every_parameter_has_a_schema(shape: Shape):
    schema = shape.schema()

    assert {*shape.fields, *shape.unsupported} == schema["properties"].keys()
    assert not schema["additionalProperties"]
