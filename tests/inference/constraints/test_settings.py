"""What cannot be followed is refused at once, and what is hostile costs a bounded amount."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from seawall.inference import Choice, Grammar, JsonSchema, Regex, Sampling
from seawall.inference.errors import ConstraintError, InvalidSettingError, MissingExtraError
from seawall.inference.generate import grammars
from tests.inference.constraints.spelling import ADDRESS, answer, words


def deep(levels):
    return '{"type":"array","items":' * levels + "{}" + "}" * levels


BAD = [
    (lambda: JsonSchema({"type": "foo"}), "Invalid type: foo"),
    (lambda: JsonSchema("{"), "no JSON"),
    (lambda: JsonSchema([1]), "no JSON object"),
    (lambda: JsonSchema({"enum": [object()]}), "must consist of JSON values"),
    (lambda: JsonSchema({"enum": {1, 2}}), "must consist of JSON values"),
    (lambda: JsonSchema({"type": "array", "uniqueItems": True}), 'Unimplemented keys: \\["uniqueItems"\\]'),
    (lambda: JsonSchema({"$ref": "http://example.org/a"}), "does not fetch"),
    (lambda: JsonSchema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    (lambda: JsonSchema({"$ref": "#/nowhere"}), "cannot be followed"),
    (lambda: JsonSchema({"type": "string", "pattern": "(a"}), "regex parse error"),
    (lambda: JsonSchema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "nsatisfiable"),
    (lambda: JsonSchema({}, separators=(";", ":")), 'separators must be such as \\(", ", ": "\\), or None, got'),
    (lambda: JsonSchema({}, separators=5), "or None, got 5"),
    (lambda: JsonSchema('{"const": "\ud800"}'), "lone surrogate"),
    (lambda: Regex("a\ud800"), "pattern 'a.ud800' has a lone surrogate"),
    (lambda: Grammar('start: "\udfff"'), "lone surrogate"),
    (lambda: JsonSchema(deep(1000)), "recursion limit"),
    (lambda: JsonSchema({"enum": ["x" * 200_000]}), "at most 131,072 are taken: say it shorter"),
    (lambda: JsonSchema({"allOf": [{"anyOf": [{"required": [i + j]} for j in "abcde"]} for i in "12345678"]}), "large"),
    (lambda: Regex("(a"), "unclosed group"),
    (lambda: Regex(r"(a)\1"), "backreferences are not supported"),
    (lambda: Regex("(?=a)b"), "look-around"),
    (lambda: Regex(b"a"), "must be the text of an expression, got bytes"),
    (lambda: Choice([]), "options must be a list of texts"),
    (lambda: Choice("yes"), "options must be a list of texts"),
    (lambda: Choice(5), "options must be a list of texts, none of them empty, got 5"),
    (lambda: Choice(["a", ""]), "none of them empty"),
    (lambda: Choice(["a", 1]), "options must be a list of texts"),
    (lambda: Grammar("start: foo"), 'unknown name: "foo"'),
    (lambda: Grammar(3), "must be the text of a grammar"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD, ids=itertools.count())
def test_what_cannot_be_followed_is_refused_at_once(make, message):
    with pytest.raises(ConstraintError, match=message) as caught:
        make()
    assert isinstance(caught.value, InvalidSettingError)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


INTEGER = {"type": "integer"}
UNDERSTOOD = [
    *({"type": "string", "format": name} for name in (
        "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")),
    {"oneOf": [INTEGER, {"type": "string"}]}, {"allOf": [{"type": "string"}, {"maxLength": 3}]}, {"anyOf": [INTEGER]},
    {"type": "object", "patternProperties": {"^a": INTEGER}}, {"type": "array", "prefixItems": [INTEGER]},
    {"type": "object", "minProperties": 1}, {"type": "object", "maxProperties": 1}, {"type": "array", "minItems": 1},
    {**INTEGER, "multipleOf": 5}, {**INTEGER, "exclusiveMinimum": 5}, {"$defs": {"a": INTEGER}, "$ref": "#/$defs/a"},
    {"title": "x", "description": "y", "default": 1, "examples": [1]}, {"type": ["string", "null"]},
]  # fmt: skip
NOT_UNDERSTOOD = [
    {"not": INTEGER}, {"if": INTEGER, "then": {}}, {"contains": INTEGER}, {"dependentRequired": {"a": ["b"]}},
    {"propertyNames": {"pattern": "a"}}, {"unevaluatedProperties": False}, {"oneOf": [INTEGER, {"type": "number"}]},
]  # fmt: skip


@pytest.mark.parametrize("schema", UNDERSTOOD, ids=itertools.count())
def test_what_the_page_says_is_understood_is(schema):
    assert JsonSchema(schema)


@pytest.mark.parametrize("schema", NOT_UNDERSTOOD, ids=itertools.count())
def test_what_is_not_understood_is_refused_and_not_ignored(schema):
    with pytest.raises(ConstraintError, match=r"cannot be followed: .*(Unimplemented|not supported)"):
        JsonSchema(schema)


LOOP = {"$ref": "#/$defs/a"}
HOSTILE = [
    JsonSchema({"type": "string", "maxLength": 10**9}),
    JsonSchema({"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    JsonSchema({"$ref": "#"}),
    JsonSchema({"$defs": {"a": {"anyOf": [LOOP, {"type": "array", "items": LOOP}]}}, **LOOP}),
    Regex("(a*)*b"), Regex("((a{1000}){1000}){1000}"), Regex(".*a.{500}"), Regex("(a|aa|aaa)*c"),
    Regex(r"(\p{L}|\d|[\s\S]){0,5000}x"),
    Grammar('start: start start | "a" | "b" start'), Grammar('start: "a" start "a" | "b" start "b" | start start | ""'),
]  # fmt: skip


@pytest.mark.parametrize("constraint", HOSTILE, ids=itertools.count())
def test_a_hostile_constraint_costs_a_bounded_answer_or_a_typed_error(speller, constraint):
    try:
        _, finish, tokens = answer(speller, constraint, tokens=20, sampling=Sampling(temperature=2, seed=1))
        assert finish in ("stop", "length")
        assert len(tokens) <= 20
    except ConstraintError:
        pass
    assert speller.active_sequences == 0


CHAINS = {  # as long as a constraint may be: on a usual stack each of them ended the process
    "rules": """Grammar("start: a0\\n" + "".join(f"a{i}: a{i + 1}\\n" for i in range(8_000)) + 'a8000: "x"')""",
    "references": """JsonSchema({
        "$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(3_800)} | {"3800": {"const": 1}},
        "$ref": "#/$defs/0",
    })""",
    "alternatives": """JsonSchema('{"$defs": {' + ",".join(
        f'"{i}": ' + '{"anyOf":[' * 55 + f'{{"$ref": "#/$defs/{i + 1}"}}' + "]}" * 55 for i in range(180)
    ) + ',"180": {"const": 1}}, "$ref": "#/$defs/0"}')""",
}


@pytest.mark.parametrize("made", CHAINS.values(), ids=CHAINS)
def test_a_chain_of_references_does_not_end_the_process(made):
    check = f"""
from seawall.inference import Grammar, JsonSchema
from seawall.inference.generate.constraints import Course
from tests.inference.constraints.spelling import words
course = Course(({made}).matcher(words("x", "1")), frozenset([0]))
assert course.allowed().sum() == 1
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_constraint_that_nothing_can_keep_ends_its_answer_with_an_error_and_gives_the_cache_back(speller):
    with pytest.raises(ConstraintError):
        answer(speller, Regex(r"[^\s\S]"))
    assert speller.active_sequences == 0


def test_a_model_without_an_end_token_takes_no_constraint():
    with pytest.raises(ConstraintError, match="has no end token"):
        Regex("a").matcher(replace(words("a"), ends=frozenset()))


def test_without_llguidance_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, grammars.__name__)
    monkeypatch.delattr(sys.modules["seawall.inference.generate"], "grammars")
    with pytest.raises(MissingExtraError, match=r"seawall\[structured\]"):
        Regex("a")


def test_settings_are_compared_and_shown_by_what_they_say():
    assert JsonSchema(ADDRESS) == JsonSchema(json.dumps(ADDRESS))
    assert hash(JsonSchema(ADDRESS)) == hash(JsonSchema(json.dumps(ADDRESS)))
    assert JsonSchema(ADDRESS) != JsonSchema(ADDRESS, separators=None)
    assert Choice(["a", "b"]) == Choice(("a", "b"))
    assert Regex("a") != Regex("b")
    assert repr(Regex("a+")) == "Regex(pattern='a+')"


@pytest.mark.parametrize(
    ("separators", "text"),
    [((", ", ": "), '{"a": 1, "b": 2}'), ((",", ":"), '{"a":1,"b":2}'), ((",\n  ", ": "), '{"a": 1,\n  "b": 2}')],
)
def test_separators_are_those_of_json_dumps(speller, separators, text):
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"]}
    constraint = JsonSchema(schema | {"additionalProperties": False}, separators=separators)
    assert answer(speller, constraint)[0] == text


def test_without_separators_whitespace_may_stand_where_json_allows_it():
    vocabulary = words(*'{}"a:1 ', "\n")
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    matcher = JsonSchema(schema, separators=None).matcher(vocabulary)
    assert all(matcher.consume(token) for token in vocabulary.encode('{ "a"\n :  1 }'))
