"""From the body of a request to an object. All of it is hostile: each way to be no good has its own answer."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import anyio

from seawall.core import checks
from seawall.web.asgi import Receive, Scope
from seawall.web.openai.errors import RequestError

DEPTH = 64  # lists and objects within each other; ours need six, a JSON Schema a few more
_DISCARDED = 16  # bodies of the largest size that are read to their end, and thrown away, so that a 413 arrives


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may cost.

    Attributes:
        body: bytes of a request's body.
        body_seconds: until all of it has come.
        write_seconds: that a client may take to accept one piece of its answer.
        choices: answers to one request, `n` times its prompts.
    """

    body: int = 1 << 20
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    choices: int = 8

    def __post_init__(self) -> None:
        checks.count("body", self.body)
        checks.count("choices", self.choices)
        checks.seconds("body_seconds", self.body_seconds)
        checks.seconds("write_seconds", self.write_seconds)


async def read(scope: Scope, receive: Receive, limits: Limits, *, gone: Callable[[], Awaitable[None]]) -> bytes:
    """The body of a request. `gone` is called where its client leaves meanwhile, and does not return.

    Raises:
        RequestError: it is no plain JSON by its headers, too large, or too slow.
    """
    headers = {name: value.decode("latin-1").strip().lower() for name, value in scope["headers"]}
    kind = headers.get(b"content-type", "").partition(";")[0].rstrip()
    if kind != "application/json":  # so a page of another site can't ask without asking first
        raise _not_json(f"the body must be of type application/json, got {kind[:64] or 'none'}")
    if headers.get(b"content-encoding", "identity") != "identity":
        raise _not_json("the body must not be compressed")
    told = headers.get(b"content-length", "0")
    if told.isdecimal() and int(told[:20]) > _DISCARDED * limits.body:
        raise _too_large(limits)
    with anyio.move_on_after(limits.body_seconds):
        return await _whole(receive, limits, gone)
    raise RequestError(f"the body did not come within {limits.body_seconds:g} s", code="request_timeout", status=408)


async def _whole(receive: Receive, limits: Limits, gone: Callable[[], Awaitable[None]]) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more and size <= _DISCARDED * limits.body:
        message = await receive()
        if message["type"] == "http.disconnect":
            await gone()
        part = message.get("body", b"")
        size += len(part)
        if size <= limits.body:
            parts.append(part)
        more = message.get("more_body", False)
    if size > limits.body:
        raise _too_large(limits)
    return b"".join(parts)


def _not_json(message: str) -> RequestError:
    return RequestError(message, code="unsupported_media_type", status=415)


def _too_large(limits: Limits) -> RequestError:
    return RequestError(f"the body must have at most {limits.body} bytes", code="request_too_large", status=413)


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object in a body: UTF-8, no name twice, only numbers that JSON has, and nested within reason.

    Raises:
        RequestError: it is anything else.

    Examples:
        >>> parsed(b'{"n": 2}')
        {'n': 2}
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _broken(f"the body is no UTF-8: {error.reason} at byte {error.start}") from None
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except json.JSONDecodeError as error:
        raise _broken(f"the body is no JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:  # more than 4300 digits
        raise _broken("the body holds a number that is too large") from None
    except RecursionError:
        raise _broken(f"the body nests lists and objects more than {DEPTH} deep") from None
    if not isinstance(found, dict):
        raise _broken("the body must be a JSON object")
    if _deeper(found, DEPTH):
        raise _broken(f"the body nests lists and objects more than {DEPTH} deep")
    return found


def _broken(message: str) -> RequestError:
    return RequestError(message, code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RequestError(f"the body has the name {name[:64]!r} twice in one object", param=name, code="invalid_json")
    return found


def _constant(name: str) -> NoReturn:
    raise _broken(f"the body holds {name}, which is no JSON")


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _broken("the body holds a number that is too large")
    return number


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects nest more than `levels` deep."""
    within = [value]
    while within and levels:
        levels -= 1
        within = [
            inner
            for outer in within
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        within = [inner for inner in within if isinstance(inner, (dict, list))]
    return bool(within)
