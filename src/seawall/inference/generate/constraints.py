"""What an answer may look like: settings that a user gives, and the protocol that one of his own follows.

The grammars themselves are compiled in `grammars`, with the package `llguidance`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from seawall.inference.errors import ConstraintError

Mask = np.ndarray[Any, np.dtype[np.bool_]]
_MOST_CHARACTERS = 1 << 17  # of a schema, regex, list of choices or grammar


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True, kw_only=True)
class Vocabulary:
    """The tokens of a model, as a constraint sees them. One per decoder, compared by identity.

    Attributes:
        size: ids run from 0 to one less.
        ends: tokens that end an answer.
        bytes_of: the bytes that a token stands for; none for control tokens.
        encode: tokens of a text in which nothing acts as a control token.
    """

    size: int
    ends: frozenset[int]
    bytes_of: Callable[[int], bytes]
    encode: Callable[[str], list[int]]


class Matcher(Protocol):
    """How far one answer has come in its constraint."""

    def allowed(self) -> Mask | None:
        """Which tokens may come next, [vocabulary]; None for all of them. Where the answer may end, its end tokens."""
        ...

    def consume(self, token: int) -> bool:
        """Go past a token; False, and nothing changes, if it may not come next."""
        ...

    def rollback(self, tokens: int) -> None:
        """Go back over that many tokens: they were drafted, and came to nothing."""
        ...

    def forced(self) -> Sequence[int]:
        """Tokens of the text that must come next, as far as that is known: they are drafted for free. May be none."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """Limits what an answer may look like. A setting: shared by all answers, so it holds nothing of any.

    Follow it to bring your own.
    """

    def matcher(self, vocabulary: Vocabulary) -> Matcher:
        """A matcher at the beginning of an answer."""
        ...


@dataclass(frozen=True, slots=True)
class _Grammar:
    """A constraint that llguidance follows; `_grammar` is what the setting comes to."""

    _grammar: str = field(init=False, repr=False)

    def matcher(self, vocabulary: Vocabulary) -> Matcher:
        """A matcher at the beginning of an answer; the first for a vocabulary compiles, the others copy."""
        from . import grammars

        return grammars.matcher(self._grammar, vocabulary)

    def _become(self, name: str, source: str, translate: Callable[[str], str]) -> None:
        """Refuse at once what cannot be followed."""
        from . import grammars

        if len(source) > _MOST_CHARACTERS:
            raise ConstraintError(
                f"{name} has {len(source):,} characters, and at most {_MOST_CHARACTERS:,} are taken: say it shorter"
            )
        try:
            source.encode()
        except UnicodeEncodeError as error:
            raise ConstraintError(f"{name} {source!r:.80} has a lone surrogate: replace it") from error
        grammar = translate(source)
        grammars.check(grammar, f"{name} {source!r:.80}")
        object.__setattr__(self, "_grammar", grammar)


@dataclass(frozen=True, slots=True)
class JsonSchema(_Grammar):
    """The answer is JSON that validates against a schema.

    What a schema leaves open the model may fill for ever: give strings a `maxLength`, arrays `maxItems`, and objects
    `additionalProperties: false`. Properties come in the schema's order. A keyword that is not supported is refused,
    not ignored; a `$ref` reaches inside the schema only.

    Attributes:
        schema: a mapping, or its JSON text.
        separators: between items, and between key and value, as `json.dumps` takes them and with its defaults; None
            lets whitespace stand wherever JSON allows it, which a small model may fill an answer with.
    """

    schema: Mapping[str, Any] | str = field(hash=False, compare=False)
    separators: tuple[str, str] | None = (", ", ": ")

    def __post_init__(self) -> None:
        from . import grammars

        separators: Any = self.separators
        pair = [str(text).strip(" \n\t") for text in separators] if isinstance(separators, tuple) else []
        if separators is not None and pair != [",", ":"]:
            raise ConstraintError(f'separators must be such as (", ", ": "), or None, got {separators!r}')
        source = self.schema
        if not isinstance(source, str):
            try:
                source = json.dumps(source)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConstraintError(f"schema must consist of JSON values: {error}") from error
        self._become("schema", source, lambda text: grammars.of_json_schema(text, separators))


@dataclass(frozen=True, slots=True)
class Regex(_Grammar):
    r"""The whole answer matches a regular expression.

    The syntax is that of Rust's `regex`, which is Python's without look-around, back-references and `\b`.

    Attributes:
        pattern: what the answer matches from its first character to its last.

    Examples:
        >>> Regex("[0-9]{3}-[0-9]{4}")
        Regex(pattern='[0-9]{3}-[0-9]{4}')
    """

    pattern: str

    def __post_init__(self) -> None:
        from . import grammars

        if not isinstance(self.pattern, str):
            raise ConstraintError(f"pattern must be the text of an expression, got {type(self.pattern).__name__}")
        self._become("pattern", self.pattern, grammars.of_regex)


@dataclass(frozen=True, slots=True)
class Choice(_Grammar):
    """The answer is one of a few texts: for classifying.

    Attributes:
        options: the texts.

    Examples:
        >>> Choice(["yes", "no"])
        Choice(options=('yes', 'no'))
    """

    options: Sequence[str]

    def __post_init__(self) -> None:
        from . import grammars

        given: Any = self.options
        options = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
        if not options or not all(type(option) is str and option for option in options):
            raise ConstraintError(f"options must be a list of texts, none of them empty, got {self.options!r:.200}")
        object.__setattr__(self, "options", options)
        self._become("options", json.dumps(options), lambda _: grammars.of_choice(options))


@dataclass(frozen=True, slots=True)
class Grammar(_Grammar):
    """The answer is a sentence of a context-free grammar.

    Attributes:
        lark: the grammar, in llguidance's variant of the format of Lark; its first rule is `start`.
    """

    lark: str

    def __post_init__(self) -> None:
        from . import grammars

        if not isinstance(self.lark, str):
            raise ConstraintError(f"lark must be the text of a grammar, got {type(self.lark).__name__}")
        self._become("lark", self.lark, grammars.of_lark)


class Course:
    """Where an answer stands in its constraint: goes ahead over drafted tokens, and comes back."""

    def __init__(self, matcher: Matcher, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._ends = ends
        self._ahead: list[int] = []
        self._masks: list[Mask | Literal["unknown"] | None] = ["unknown"]  # after none, one, two ... of them

    def allowed(self, drafted: Sequence[int] = ()) -> Mask | None:
        """Which tokens may follow the decided ones and `drafted`; None for all.

        After a draft that may not be, or that has ended the answer, it is all: nobody will want to know.
        """
        if not self._go(drafted):
            return None
        mask = self._masks[-1]
        if isinstance(mask, str):
            mask = self._matcher.allowed()
            if mask is not None and not np.any(mask):
                raise ConstraintError("the constraint allows no token at all here, not even the end of the answer")
            self._masks[-1] = mask
        return mask

    def forced(self) -> Sequence[int]:
        """Tokens that must follow the decided ones, as far as that is known."""
        self._go(())
        return self._matcher.forced()

    def decide(self, token: int) -> None:
        """A token is decided."""
        if token in self._ends:
            return
        if self._ahead and self._ahead[0] == token:
            del self._ahead[0], self._masks[0]
            return
        self._go(())
        if not self._matcher.consume(token):
            raise ConstraintError(f"token {token} was chosen, and the constraint refuses it after all")
        self._masks = ["unknown"]

    def _go(self, drafted: Sequence[int]) -> bool:
        """Stand after `drafted`, or after those of them that may be; whether that is all of them."""
        common = 0
        while common < min(len(drafted), len(self._ahead)) and drafted[common] == self._ahead[common]:
            common += 1
        if back := len(self._ahead) - common:
            self._matcher.rollback(back)
            del self._ahead[common:], self._masks[common + 1 :]
        for token in drafted[common:]:
            if token in self._ends or not self._matcher.consume(token):
                return False
            self._ahead.append(token)
            self._masks.append("unknown")
        return True
