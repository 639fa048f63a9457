"""What each endpoint takes: every parameter that is known, how it is checked, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from seawall.web.openai.errors import RequestError
from seawall.web.openai.fields import (
    REQUIRED,
    Anything,
    Choice,
    Field,
    Flag,
    Items,
    Number,
    OneOrMany,
    Schema,
    Shape,
    Text,
    Unsupported,
    Whole,
    refuse,
)

MOST_MESSAGES = 1024
MOST_INPUTS = 2048
_MOST_TOKEN = 2**31 - 1
_STOP = Text(1, 256)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Token ids, which may be many: they are looked at one by one only where something is wrong."""

    def read(self, value: object, at: str) -> list[int]:
        """The ids."""
        if isinstance(value, list) and value and all(type(one) is int and 0 <= one <= _MOST_TOKEN for one in value):
            return value
        return _IDS.read(value, at)

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return _IDS.schema()


_IDS = Items(Whole(0, _MOST_TOKEN), 1, 1 << 20)
_TOKENS = _Tokens()


@dataclass(frozen=True, slots=True)
class _Texts:
    """Text or texts, each also as a list of token ids."""

    most: int

    def read(self, value: object, at: str) -> list[str | list[int]]:
        """A list of what there is."""
        if isinstance(value, str):
            return [Text().read(value, at)]
        if not isinstance(value, list) or not value:
            refuse(at, "a string, a list of strings, or a list of token ids, and not empty", value)
        if isinstance(value[0], (int, float)):
            return [_TOKENS.read(value, at)]
        return Items(OneOrMany(Text(), _TOKENS), 1, self.most).read(value, at)

    def schema(self) -> Schema:
        """Its JSON Schema."""
        text = Text().schema()
        many = [Items(kind, 1, self.most).schema() for kind in (Text(), _TOKENS)]
        return {"anyOf": [text, _TOKENS.schema(), *many]}


@dataclass(frozen=True, slots=True)
class _Content:
    """The text of a message: a string, or parts of text."""

    def read(self, value: object, at: str) -> str:
        """The whole text."""
        if not isinstance(value, list):
            return Text().read(value, at)
        for index, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in ("image_url", "input_audio", "file", "refusal"):
                where = f"{at}[{index}]"
                raise RequestError(
                    f"{where} is of type {kind}, which is not supported: this model reads text",
                    param=where,
                    code="unsupported_value",
                )
        return "".join(part["text"] for part in Items(_PART, 1, MOST_MESSAGES).read(value, at))

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return {"anyOf": [Text().schema(), Items(_PART, 1, MOST_MESSAGES).schema()]}


@dataclass(frozen=True, slots=True)
class _Message:
    """A message, with `content` as one text and `role` as the model's templates know it."""

    def read(self, value: object, at: str) -> dict[str, str]:
        """The message."""
        if isinstance(value, dict) and value.get("role") in ("tool", "function"):
            raise RequestError(
                f"{at}.role is {value['role']!r}, which is not supported: this server calls no tools",
                param=f"{at}.role",
                code="unsupported_value",
            )
        found = _MESSAGE.read(value, at)
        role = "system" if found["role"] == "developer" else found["role"]
        return {"role": role, "content": found["content"]}

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return _MESSAGE.schema()


_NO_TOOLS = "this server calls no tools"
_NO_AUDIO = "this model writes text"
_PART = Shape({"type": Field(Choice(("text",)), REQUIRED), "text": Field(Text(), REQUIRED)})
_MESSAGE = Shape(
    {
        "role": Field(Choice(("system", "developer", "user", "assistant")), REQUIRED),
        "content": Field(_Content(), REQUIRED),
    },
    {
        "name": Unsupported("the model's template knows no names"),
        "refusal": Unsupported("the model does not know refusals"),
        "annotations": Unsupported("the model reads text only", ([],)),
        "audio": Unsupported("the model reads text only"),
        "function_call": Unsupported(_NO_TOOLS),
        "tool_calls": Unsupported(_NO_TOOLS, ([],)),
    },
)
_JSON_SCHEMA = Shape(
    {
        "name": Field(Text(1, 64), REQUIRED),
        "schema": Field(Anything(), REQUIRED),
        "strict": Field(Flag(), True),
        "description": Field(Text()),
    }
)
_FORMAT = Shape(
    {"type": Field(Choice(("text", "json_object", "json_schema")), REQUIRED), "json_schema": Field(_JSON_SCHEMA)}
)
_STRUCTURED = Shape(
    {
        "json": Field(Anything()),
        "regex": Field(Text(1)),
        "choice": Field(Items(Text(1), 1, 1024)),
        "grammar": Field(Text(1)),
    }
)
_STREAM_OPTIONS = Shape(
    {"include_usage": Field(Flag(), False)},
    {
        "include_obfuscation": Unsupported("chunks are not padded", (False,)),
        "continuous_usage_stats": Unsupported("usage comes with the last chunk", (False,)),
    },
)

_SAMPLING: Mapping[str, Field] = {
    "model": Field(Text(1, 256), REQUIRED),
    "frequency_penalty": Field(Number(-2, 2), 0.0),
    "max_tokens": Field(Whole(1, 2**31 - 1)),
    "n": Field(Whole(1, 128), 1),
    "presence_penalty": Field(Number(-2, 2), 0.0),
    "seed": Field(Whole(-(2**63), 2**63 - 1)),
    "stop": Field(OneOrMany(_STOP, Items(_STOP, 0, 4)), ()),
    "stream": Field(Flag(), False),
    "stream_options": Field(_STREAM_OPTIONS),
    "temperature": Field(Number(0, 2)),
    "top_p": Field(Number(0, 1, above=True), 1.0),
    "user": Field(Text(0, 1024)),
    # not OpenAI's; as vLLM has them
    "min_p": Field(Number(0, 1), 0.0),
    "repetition_penalty": Field(Number(0, 2, above=True), 1.0),
    "structured_outputs": Field(_STRUCTURED),
    "top_k": Field(Whole(-1, 2**31 - 1), 0),
}
_NEVER: Mapping[str, Unsupported] = {
    "logit_bias": Unsupported("the model chooses among all tokens; see structured_outputs", ({},)),
    # vLLM's
    "guided_choice": Unsupported("use structured_outputs.choice"),
    "guided_grammar": Unsupported("use structured_outputs.grammar"),
    "guided_json": Unsupported("use structured_outputs.json or response_format"),
    "guided_regex": Unsupported("use structured_outputs.regex"),
    "ignore_eos": Unsupported("an answer ends where the model ends it", (False,)),
    "min_tokens": Unsupported("an answer ends where the model ends it", (0,)),
    "priority": Unsupported("the operator decides whose requests go first", (0,)),
    "stop_token_ids": Unsupported("use stop", ([],)),
}

CHAT = Shape(
    {
        "messages": Field(Items(_Message(), 1, MOST_MESSAGES), REQUIRED),
        **_SAMPLING,
        "logprobs": Field(Flag(), False),
        "max_completion_tokens": Field(Whole(1, 2**31 - 1)),
        "response_format": Field(_FORMAT),
        "safety_identifier": Field(Text(0, 1024)),
        "top_logprobs": Field(Whole(0, 20)),
    },
    {
        **_NEVER,
        "audio": Unsupported(_NO_AUDIO),
        "function_call": Unsupported(_NO_TOOLS, ("none",)),
        "functions": Unsupported(_NO_TOOLS, ([],)),
        "metadata": Unsupported("answers are not stored", ({},)),
        "modalities": Unsupported(_NO_AUDIO, (["text"],)),
        "moderation": Unsupported("nothing is moderated"),
        "parallel_tool_calls": Unsupported(_NO_TOOLS, (True, False)),
        "prediction": Unsupported("the server drafts by itself, if it was told to"),
        "prompt_cache_key": Unsupported("prompts are recognised by what they begin with"),
        "prompt_cache_options": Unsupported("prompts are recognised by what they begin with"),
        "prompt_cache_retention": Unsupported("prompts stay cached while there is room", ("in_memory",)),
        "reasoning_effort": Unsupported("the model does not reason apart from its answer", ("none",)),
        "service_tier": Unsupported("there is one tier", ("auto", "default")),
        "store": Unsupported("answers are not stored", (False,)),
        "tool_choice": Unsupported(_NO_TOOLS, ("none", "auto")),
        "tools": Unsupported(_NO_TOOLS, ([],)),
        "verbosity": Unsupported("the model does not know it", ("medium",)),
        "web_search_options": Unsupported("nothing is searched"),
    },
)
COMPLETION = Shape(
    {
        "prompt": Field(_Texts(128), REQUIRED),
        **_SAMPLING,
        "logprobs": Field(Whole(0, 5)),
    },
    {
        **_NEVER,
        "best_of": Unsupported("use n", (1,)),
        "echo": Unsupported("the prompt is not repeated", (False,)),
        "suffix": Unsupported("the model does not insert", ("",)),
    },
)
EMBEDDING = Shape(
    {
        "input": Field(_Texts(MOST_INPUTS), REQUIRED),
        "model": Field(Text(1, 256), REQUIRED),
        "dimensions": Field(Whole(1, 2**20)),
        "encoding_format": Field(Choice(("float", "base64")), "float"),
        "user": Field(Text(0, 1024)),
    }
)


class Rule(NamedTuple):
    """What an answer has to be: `kind` is json, regex, choice or grammar; `param` asked for it."""

    kind: str
    value: Any
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a chat or a completion asks of an engine.

    Attributes:
        prompts: each is answered `n` times.
        max_tokens: None for the server's own choice.
        logprobs: alternatives to tell beside each token, or None to tell nothing.
        constraint: what every answer has to be.
        limited_by: the parameter that said `max_tokens`.
    """

    model: str
    chat: bool
    prompts: list[Any]
    max_tokens: int | None
    limited_by: str
    n: int
    temperature: float | None
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop: tuple[str, ...]
    presence: float
    frequency: float
    repetition: float
    logprobs: int | None
    constraint: Rule | None
    stream: bool
    include_usage: bool
    user: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """What a request asks of an embedder. `dimensions` None is all there are."""

    model: str
    inputs: list[str | list[int]]
    dimensions: int | None
    as_base64: bool
    user: str | None


def embedding(body: object) -> Embedding:
    """The request of embeddings."""
    found = EMBEDDING.read(body)
    return Embedding(
        model=found["model"],
        inputs=found["input"],
        dimensions=found["dimensions"],
        as_base64=found["encoding_format"] == "base64",
        user=found["user"],
    )


def chat(body: object) -> Generation:
    """The request of a chat."""
    found = CHAT.read(body)
    if found["top_logprobs"] is not None and not found["logprobs"]:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    most, old = found["max_completion_tokens"], found["max_tokens"]
    if most is not None and old is not None and most != old:
        raise RequestError("max_tokens is the old name of max_completion_tokens: give one of them", param="max_tokens")
    return _generation(
        found,
        chat=True,
        prompts=[found["messages"]],
        max_tokens=old if most is None else most,
        limited_by="max_tokens" if most is None else "max_completion_tokens",
        logprobs=(found["top_logprobs"] or 0) if found["logprobs"] else None,
        user=found["user"] if found["user"] is not None else found["safety_identifier"],
        constraint=_constraint(found["response_format"], found["structured_outputs"]),
    )


def completion(body: object) -> Generation:
    """The request of a completion."""
    found = COMPLETION.read(body)
    return _generation(
        found,
        chat=False,
        prompts=found["prompt"],
        max_tokens=16 if found["max_tokens"] is None else found["max_tokens"],  # as OpenAI has it
        limited_by="max_tokens",
        logprobs=found["logprobs"],
        user=found["user"],
        constraint=_constraint(None, found["structured_outputs"]),
    )


def _generation(found: Mapping[str, Any], **special: Any) -> Generation:
    if found["stream_options"] is not None and not found["stream"]:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    seed = found["seed"]
    return Generation(
        model=found["model"],
        n=found["n"],
        temperature=found["temperature"],
        top_k=max(0, found["top_k"]),
        top_p=found["top_p"],
        min_p=found["min_p"],
        seed=None if seed is None else seed % 2**64,
        stop=(found["stop"],) if isinstance(found["stop"], str) else tuple(found["stop"]),
        presence=found["presence_penalty"],
        frequency=found["frequency_penalty"],
        repetition=found["repetition_penalty"],
        stream=found["stream"],
        include_usage=bool(found["stream_options"] and found["stream_options"]["include_usage"]),
        **special,
    )


def _constraint(form: Mapping[str, Any] | None, structured: Mapping[str, Any] | None) -> Rule | None:
    """The one rule that `response_format` and `structured_outputs` give."""
    rules: list[Rule] = []
    if form is not None:
        schema, kind = form["json_schema"], form["type"]
        if (schema is not None) != (kind == "json_schema"):
            raise RequestError(
                'response_format.json_schema belongs to type "json_schema", and that type needs it',
                param="response_format.json_schema",
            )
        if kind == "json_object":
            rules.append(Rule("json", {"type": "object"}, "response_format"))
        elif schema is not None:
            rules.append(Rule("json", schema["schema"], "response_format.json_schema.schema"))
    for kind, value in (structured or {}).items():
        if value is not None:
            rules.append(Rule(kind, value, f"structured_outputs.{kind}"))
    if structured is not None and all(value is None for value in structured.values()):
        raise RequestError("structured_outputs needs one of json, regex, choice, grammar", param="structured_outputs")
    if len(rules) > 1:
        raise RequestError(
            f"an answer follows one rule, and there are {rules[0].param} and {rules[1].param}", param=rules[1].param
        )
    return rules[0] if rules else None
