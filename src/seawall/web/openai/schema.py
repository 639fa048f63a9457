"""The OpenAPI document, made of the same shapes that check requests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from seawall.web.openai.fields import Shape
from seawall.web.openai.requests import CHAT, COMPLETION, EMBEDDING

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _object(required: dict[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_ERROR = _object(
    {
        "error": _object(
            {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            }
        )
    }
)
_USAGE = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_FINISH: Schema = {"type": ["string", "null"], "enum": ["stop", "length", None]}
_COMMON = {"id": _TEXT, "object": _TEXT, "created": _COUNT, "model": _TEXT}
_CHOICE = {"index": _COUNT, "finish_reason": _FINISH, "logprobs": {"type": ["object", "null"]}}
_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})
_SCHEMAS = {
    "Error": _ERROR,
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": _list(_MODEL)}),
    "ChatCompletion": _object(
        {
            **_COMMON,
            "choices": _list(_object({**_CHOICE, "message": _object({"role": _TEXT, "content": _TEXT})})),
            "usage": _USAGE,
        }
    ),
    "Completion": _object({**_COMMON, "choices": _list(_object({**_CHOICE, "text": _TEXT})), "usage": _USAGE}),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": _COUNT,
                        "embedding": {"anyOf": [_TEXT, _list({"type": "number"})]},
                    }
                )
            ),
        }
    ),
}
_FAILURES = {
    "400": "A parameter is wrong, unknown or not supported; `param` names it.",
    "401": "The API key is missing or unknown.",
    "404": "There is no such model.",
    "408": "The request's body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not of type application/json.",
    "429": "Too many requests; see Retry-After.",
    "500": "The model failed.",
    "503": "No room, or out of order; see Retry-After.",
    "504": "It took longer than the client waits or the server allows.",
}


def document(*, generating: Iterable[str], embedding: Iterable[str], version: str, authenticated: bool) -> Schema:
    """The OpenAPI document of a router with these models."""
    generators, encoders = list(generating), list(embedding)
    paths: Schema = {
        "/v1/models": {"get": _operation("listModels", "The models there are.", "Models", ("401",))},
        "/v1/models/{model}": {
            "get": {
                **_operation("retrieveModel", "One model.", "Model", ("401", "404")),
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": _TEXT}],
            }
        },
    }
    if generators:
        for path, name, shape, answer in (
            ("/v1/chat/completions", "createChatCompletion", CHAT, "ChatCompletion"),
            ("/v1/completions", "createCompletion", COMPLETION, "Completion"),
        ):
            paths[path] = {"post": _posted(name, shape, answer, generators, streams=True)}
    if encoders:
        paths["/v1/embeddings"] = {"post": _posted("createEmbedding", EMBEDDING, "Embeddings", encoders)}
    found: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "seawall", "version": version, "description": "Models behind OpenAI's API."},
        "paths": paths,
        "components": {"schemas": _SCHEMAS},
    }
    if authenticated:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _operation(name: str, summary: str, answer: str, failures: Iterable[str] = tuple(_FAILURES)) -> Schema:
    responses: Schema = {"200": {"description": "The answer.", "content": _json(_ref(answer))}}
    for status in failures:
        responses[status] = {"description": _FAILURES[status], "content": _json(_ref("Error"))}
    return {"operationId": name, "summary": summary, "responses": responses}


def _posted(name: str, shape: Shape, answer: str, models: list[str], *, streams: bool = False) -> Schema:
    operation = _operation(name, "", answer)
    del operation["summary"]
    schema = shape.schema()
    schema["properties"]["model"] = {"type": "string", "enum": models}
    operation["requestBody"] = {"required": True, "content": _json(schema)}
    if streams:
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {}}
    return operation


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
