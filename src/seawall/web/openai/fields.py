"""Parameters of a request: each kind checks its values and knows its JSON Schema, so what is told is what is checked.

`read(value, at)` returns the value as Python has it, or raises `RequestError` naming `at`, the value and the rule.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

from seawall.web.openai.errors import RequestError

Schema = dict[str, Any]
_KINDS: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


class Kind(Protocol):
    """A kind of value."""

    def read(self, value: object, at: str) -> Any:
        """The value, checked."""

    def schema(self) -> Schema:
        """Its JSON Schema."""


def refuse(at: str, rule: str, value: object, code: str = "invalid_value") -> NoReturn:
    """Raise for a value that breaks a rule. Numbers are shown; of anything longer only what it is."""
    if isinstance(value, (int, float)) or value is None:
        shown = json.dumps(value)[:40]
    else:
        shown = next((word for kind, word in _KINDS.items() if isinstance(value, kind)), "something else")
    raise RequestError(f"{at} must be {rule}, got {shown}", param=at, code=code)


@dataclass(frozen=True, slots=True)
class Number:
    """A number from `least`, or above it, to `most`."""

    least: float
    most: float
    above: bool = False

    def read(self, value: object, at: str) -> float:
        """The number."""
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not self.least <= value <= self.most or (self.above and value == self.least):  # type: ignore[operator]
            refuse(at, f"a number {'above' if self.above else 'from'} {self.least:g} to {self.most:g}", value)
        return float(value)  # type: ignore[arg-type]

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return {"type": "number", "exclusiveMinimum" if self.above else "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number; 2.0 is one, as JSON Schema has it."""

    least: int
    most: int

    def read(self, value: object, at: str) -> int:
        """The number."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most:
            refuse(at, f"a whole number from {self.least} to {self.most}", value)
        return value

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    def read(self, value: object, at: str) -> bool:
        """The flag."""
        if not isinstance(value, bool):
            refuse(at, "true or false", value)
        return value

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Text:
    """A string of Unicode characters."""

    least: int = 0
    most: int | None = None

    def read(self, value: object, at: str) -> str:
        """The string."""
        if not isinstance(value, str):
            refuse(at, "a string", value)
        if len(value) < self.least:
            raise RequestError(f"{at} must not be empty", param=at)
        if self.most is not None and len(value) > self.most:
            raise RequestError(f"{at} must have at most {self.most} characters, got {len(value)}", param=at)
        if not value.isascii() and not _encodable(value):
            raise RequestError(f"{at} holds half of a surrogate pair, which is no character", param=at)
        return value

    def schema(self) -> Schema:
        """Its JSON Schema."""
        found: Schema = {"type": "string"}
        if self.least:
            found["minLength"] = self.least
        if self.most is not None:
            found["maxLength"] = self.most
        return found


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    def read(self, value: object, at: str) -> str:
        """The word."""
        if not isinstance(value, str) or value not in self.words:
            refuse(at, f"one of {', '.join(map(repr, self.words))}", value)
        return value

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return {"type": "string", "enum": list(self.words)}


@dataclass(frozen=True, slots=True)
class Items:
    """A list of one kind of values."""

    of: Kind
    least: int
    most: int

    def read(self, value: object, at: str) -> list[Any]:
        """The list."""
        if not isinstance(value, list):
            refuse(at, "a list", value)
        if not self.least <= len(value) <= self.most:
            raise RequestError(f"{at} must have {self.least} to {self.most} items, got {len(value)}", param=at)
        return [self.of.read(one, f"{at}[{index}]") for index, one in enumerate(value)]

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return {"type": "array", "items": self.of.schema(), "minItems": self.least, "maxItems": self.most}


@dataclass(frozen=True, slots=True)
class OneOrMany:
    """A list where it is one, else one value."""

    one: Kind
    many: Kind

    def read(self, value: object, at: str) -> Any:
        """The value."""
        return (self.many if isinstance(value, list) else self.one).read(value, at)

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return {"anyOf": [self.one.schema(), self.many.schema()]}


@dataclass(frozen=True, slots=True)
class Anything:
    """An object that somebody else reads, such as a JSON Schema."""

    def read(self, value: object, at: str) -> dict[str, Any]:
        """The object."""
        if not isinstance(value, dict):
            refuse(at, "an object", value)
        return value

    def schema(self) -> Schema:
        """Its JSON Schema."""
        return {"type": "object"}


class _Required:
    """No default."""


REQUIRED = _Required()


class Field(NamedTuple):
    """A parameter, and what it is where it is left out or null."""

    kind: Kind
    default: Any = None


class Unsupported(NamedTuple):
    """A parameter that others know and this server does not: taken where its value changes nothing."""

    why: str
    neutral: tuple[Any, ...] = ()


class Shape:
    """An object with these parameters and no others."""

    def __init__(self, fields: Mapping[str, Field], unsupported: Mapping[str, Unsupported] | None = None) -> None:
        self.fields = fields
        self.unsupported = unsupported or {}

    def read(self, value: object, at: str = "") -> dict[str, Any]:
        """Every parameter by its name, defaults filled in."""
        if not isinstance(value, dict):
            refuse(at, "an object", value)
        prefix = f"{at}." if at else ""
        for name in value:
            if name not in self.fields:
                self._refuse_other(name, value[name], prefix)
        found: dict[str, Any] = {}
        for name, field in self.fields.items():
            given: object = value.get(name)
            if given is not None:
                found[name] = field.kind.read(given, prefix + name)
            elif isinstance(field.default, _Required):
                raise RequestError(f"{prefix}{name} is missing", param=prefix + name, code="missing_required_parameter")
            else:
                found[name] = field.default
        return found

    def _refuse_other(self, name: str, value: object, prefix: str) -> None:
        known = self.unsupported.get(name)
        if known is None:
            near = difflib.get_close_matches(name, self.fields, 1) if len(name) < 64 else []
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            at = prefix + name[:64].encode("ascii", "backslashreplace").decode()
            raise RequestError(f"unknown parameter: {at}{hint}", param=at, code="unknown_parameter")
        if value is not None and not any(type(value) is type(one) and value == one for one in known.neutral):
            raise RequestError(
                f"{prefix}{name} is not supported: {known.why}", param=prefix + name, code="unsupported_parameter"
            )

    def schema(self) -> Schema:
        """Its JSON Schema."""
        properties: dict[str, Schema] = {}
        for name, field in self.fields.items():
            required = isinstance(field.default, _Required)
            properties[name] = field.kind.schema() if required else _nullable(field.kind.schema(), field.default)
        for name, known in self.unsupported.items():
            properties[name] = {"enum": [None, *known.neutral], "description": f"Not supported: {known.why}."}
        return {
            "type": "object",
            "properties": properties,
            "required": [name for name, field in self.fields.items() if isinstance(field.default, _Required)],
            "additionalProperties": False,
        }


def _nullable(schema: Schema, default: object) -> Schema:
    found = {"anyOf": [*(schema.get("anyOf") or [schema]), {"type": "null"}]}
    return found if default is None else {**found, "default": default}


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
