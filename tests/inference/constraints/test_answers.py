"""A constrained answer keeps its rule, whoever drafts and however tokens are drawn."""

import json
import re

import jsonschema
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.inference import Choice, Grammar, Greedy, JsonSchema, Regex, Sampling
from seawall.inference.generate.speculation import NGram, Speculation
from tests.inference.constraints.spelling import ADDRESS, Guessing, answer

names = st.text('abcdefgh_ é"\\{', min_size=1, max_size=6)
low, more = st.integers(-999, 99), st.integers(0, 999)
flat = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, low, more),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 8)),
    st.builds(lambda n: {"type": "string", "minLength": n, "maxLength": n + 3}, st.integers(0, 4)),
    st.just({"type": "string", "pattern": "^[a-f]{2}-[0-9]{1,3}$"}),
    st.just({"type": "string", "format": "date"}),
    st.builds(lambda found: {"enum": found}, st.lists(names | st.integers(-5, 5), min_size=1, max_size=4, unique=True)),
    st.builds(lambda value: {"const": value}, names | st.floats(-1, 1).map(lambda x: round(x, 2))),
)  # fmt: skip


def records(inner):
    def build(properties, required):
        return {
            "type": "object", "properties": properties, "additionalProperties": False,
            "required": [name for index, name in enumerate(properties) if required >> index & 1],
        }  # fmt: skip

    return st.builds(build, st.dictionaries(names, inner, min_size=1, max_size=3), st.integers(0, 7))


def lists(inner):
    return st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip


def either(inner):
    return st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)


schemas = st.recursive(flat, lambda inner: records(inner) | lists(inner) | either(inner), max_leaves=4)
samplings = st.sampled_from([
    Greedy(), Sampling(seed=1), Sampling(temperature=1.5, top_p=0.9, seed=2), Sampling(top_k=4, seed=3),
])  # fmt: skip
drafts = st.sampled_from([
    Speculation(), Speculation(length=5), Speculation(drafters=(Guessing(),), length=3),
    Speculation(drafters=(NGram(), Guessing()), length=16),
])  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(schema=schemas, sampling=samplings, speculation=drafts)
def test_every_answer_under_a_schema_validates_and_drafts_change_nothing(speller, schema, sampling, speculation):
    constraint = JsonSchema(schema)
    text, finish, tokens = answer(speller, constraint, sampling=sampling)
    assert finish == "stop"
    jsonschema.validate(json.loads(text), schema)
    assert (text, finish, tokens) == answer(speller, constraint, speculation, sampling=sampling)


PATTERNS = [
    r"\d{3}-\d{4}", r"(yes|no)( and (yes|no)){0,3}", r"[^a-z]{5}", r"[A-F0-9]{8}", r"(?i)abc", r"a/b\\c?", r"",
    r"\p{L}{1,4}!",
    r"(\+|-)?[0-9]{1,3}(\.[0-9]{2})?", "[\n\t]{3}x", r"[éü😀]{2,4}",
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(pattern=st.sampled_from(PATTERNS), sampling=samplings, speculation=drafts)
def test_every_answer_under_a_pattern_matches_it_whole_and_drafts_change_nothing(
    speller, pattern, sampling, speculation
):
    text, finish, tokens = answer(speller, Regex(pattern), sampling=sampling)
    assert finish == "stop"
    assert re.fullmatch(pattern.replace(r"\p{L}", r"[^\W\d_]"), text)
    assert (text, finish, tokens) == answer(speller, Regex(pattern), speculation, sampling=sampling)


@settings(max_examples=25, deadline=None)
@given(options=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_choice_is_one_of_its_options_whatever_letters_they_have(speller, options, seed):
    text, finish, _ = answer(speller, Choice(options), sampling=Sampling(seed=seed))
    assert finish == "stop"
    assert text in options


def test_a_grammar_may_nest_as_deep_as_it_likes(speller):
    pairs = Grammar('start: "(" start ")" | "[" start "]" | "x"')
    found = {answer(speller, pairs, sampling=Sampling(seed=seed))[0] for seed in range(20)}
    assert len(found) > 3
    for text in found:
        left, right = text.split("x")
        assert right == left[::-1].translate(str.maketrans("([", ")]"))


def test_the_rejection_rule_keeps_the_constraint_too(speller):
    drawn = Speculation(drafters=(Guessing(), NGram()), length=4, rule="drawn")
    for seed in range(8):
        text, finish, _ = answer(speller, JsonSchema(ADDRESS), drawn, sampling=Sampling(seed=seed))
        jsonschema.validate(json.loads(text), ADDRESS)
        assert finish == "stop"


def test_a_lossy_threshold_accepts_nothing_that_is_forbidden(speller):
    lossy = Speculation(drafters=(Guessing(),), length=8, accept_above=1e-9)
    for sampling in (Greedy(), Sampling(seed=1)):
        text, _, _ = answer(speller, JsonSchema(ADDRESS), lossy, sampling=sampling)
        jsonschema.validate(json.loads(text), ADDRESS)


def test_what_the_schema_forces_is_drafted_and_accepted(speller):
    name = "a_rather_long_name"
    schema = {"type": "object", "properties": {name: {"type": "boolean"}}, "required": [name]}
    constraint = JsonSchema(schema | {"additionalProperties": False})
    with speller.start([5], max_tokens=99, constraint=constraint, speculation=Speculation(length=16)) as sequence:
        text = "".join(step.text for step in sequence)
    statistics = sequence.speculation.drafters["forced"]
    assert json.loads(text)
    assert statistics.accepted == statistics.drafted > 10
    assert sequence.speculation.rounds < len(sequence.tokens) / 2


def test_a_constraint_that_the_answer_keeps_anyway_changes_no_token(speller):
    for sampling in (Greedy(), Sampling(seed=4)):
        free = answer(speller, None, tokens=30, sampling=sampling)[2]
        wanted = speller.decode(free)
        if "�" not in wanted:
            assert answer(speller, Regex("(?s:.*)"), tokens=30, sampling=sampling)[2] == free
