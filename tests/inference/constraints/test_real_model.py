"""The bundled model under constraints: real text, real tokens; what is forced comes for free."""

import json

import jsonschema
import pytest

from seawall.inference import Choice, JsonSchema, Regex, Sampling
from seawall.inference.generate.speculation import Speculation

pytestmark = pytest.mark.model
EXACT = Speculation(drafters=())
PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["Germany", "France"]}},
            "required": ["city", "country"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["first_name", "age", "address", "tags"],
    "additionalProperties": False,
}


def answer(decoder, constraint, speculation, sampling=None, question="Describe Anna, 31, from Berlin."):
    settings = {} if sampling is None else {"sampling": sampling}
    prompt = decoder.encode_chat(question)
    with decoder.start(
        prompt, max_tokens=120, constraint=constraint, speculation=speculation, logprobs=1, **settings
    ) as sequence:
        steps = [step for step in sequence if step.token is not None]
    return "".join(step.text for step in steps), steps, sequence.speculation


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.9, seed=5)], ids=["greedy", "sampled"])
def test_a_record_validates_and_is_the_same_with_drafts(decoder, sampling):
    text, steps, _ = answer(decoder, JsonSchema(PERSON), EXACT, sampling)
    assert steps[-1].finish == "stop"
    jsonschema.validate(json.loads(text), PERSON)
    drafted, drafted_steps, statistics = answer(decoder, JsonSchema(PERSON), Speculation(length=8), sampling)
    assert drafted == text
    assert drafted_steps == steps
    assert statistics.drafters["forced"].accepted > 15
    assert statistics.rounds < 0.7 * len(steps)


def test_a_form_and_a_choice_are_kept_by_a_model_that_would_rather_chat(decoder):
    text, steps, _ = answer(decoder, Regex(r"\+49 \d{3} \d{4,8}"), False, question="What is your phone number?")
    assert steps[-1].finish == "stop"
    assert text.startswith("+49 ")
    mood = Choice(["positive", "negative"])
    said = {
        answer(decoder, mood, False, question=f"Is this review positive or negative? '{review}'")[0]
        for review in ("I love it, wonderful!", "Terrible. It broke at once.")
    }
    assert said <= {"positive", "negative"}


def test_the_models_own_tokenizer_spells_what_is_forced(decoder):
    matcher = JsonSchema(PERSON).matcher(decoder._words)
    assert decoder.decode(matcher.forced()).startswith('{"first_name')
    for token in decoder.encode(
        '{"first_name": "Anna", "age": 31, "address": {"city": "Berlin", "country": "Germany"}, "tags": []}'
    ):
        assert matcher.consume(token)
    assert set(matcher.allowed().nonzero()[0]) == decoder.end_tokens
