"""Compiles schemas, expressions and grammars, and follows them token by token.

The only module that imports `llguidance`.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from seawall.inference.errors import ConstraintError, MissingExtraError

from .constraints import Mask, Vocabulary

try:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
except ImportError as error:
    raise MissingExtraError(error.name or "llguidance", "structured") from error

_KEPT = 64  # compiled grammars of one vocabulary
_LIMITS = LLParserLimits(
    max_lexer_states=25_000,  # of 1 to 2 kB each
    step_lexer_fuel=60_000,  # 3,000 letters of any alphabet take 30,000; 200,000, as usual, let one step take 3 s
    verbose_errors=False,  # a message would quote the answer
)
_STACK = 256 << 20  # bytes, taken as they are used: 64 MiB do for a chain of 20,000 rules, 8 MiB not for 3,000
_stack_size = threading.Lock()  # the setting is the process's
_T = TypeVar("_T")
_compilers: weakref.WeakKeyDictionary[Vocabulary, _Compiler] = weakref.WeakKeyDictionary()
_compilers_lock = threading.Lock()  # held for microseconds, never while compiling


def of_json_schema(schema: str, separators: tuple[str, str] | None) -> str:
    """The grammar of the JSON texts that a schema admits; without separators, whitespace may stand anywhere."""
    options: dict[str, Any] = {"whitespace_flexible": separators is None}
    if separators is not None:
        options["item_separator"], options["key_separator"] = separators
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConstraintError(f"the schema is no JSON object: {_told(error)}") from error


def of_regex(pattern: str) -> str:
    """The grammar of the texts that a regular expression matches as a whole."""
    return LLMatcher.grammar_from_regex(pattern)


def of_choice(options: Sequence[str]) -> str:
    """The grammar of a few texts; every letter is written as its number, so none has to be escaped."""
    return of_regex("|".join("".join(f"\\x{{{ord(letter):x}}}" for letter in option) for option in options))


def of_lark(lark: str) -> str:
    """A grammar in the variant of Lark's format that llguidance reads."""
    return LLMatcher.grammar_from_lark(lark)


def check(grammar: str, what: str) -> None:
    """ConstraintError if a grammar cannot be followed, whatever the vocabulary."""
    failed, told = _with_room(lambda: LLMatcher.validate_grammar_with_warnings(grammar, limits=_LIMITS))
    if failed:
        raise ConstraintError(f"{what} cannot be followed: {_told(told[0])}")


def matcher(grammar: str, vocabulary: Vocabulary) -> GrammarMatcher:
    """A matcher at the beginning of a grammar, which is compiled once and then copied."""
    if not vocabulary.ends:
        raise ConstraintError("the model has no end token, so no answer under a constraint could end")
    with _compilers_lock:
        compiler = _compilers.get(vocabulary)
    if compiler is None:
        made = _Compiler(vocabulary)  # takes 0.3 s; if two threads make one, the first stays
        with _compilers_lock:
            compiler = _compilers.setdefault(vocabulary, made)
    return GrammarMatcher(compiler.start(grammar), vocabulary.size)


class GrammarMatcher:
    """How far one answer has come in a grammar."""

    def __init__(self, inner: LLMatcher, vocabulary: int) -> None:
        self._inner = inner
        self._vocabulary = vocabulary

    def allowed(self) -> Mask:
        """Which tokens may come next, [vocabulary]."""
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        self._refuse_failure()
        return np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)

    def consume(self, token: int) -> bool:
        """Go past a token; False if it may not come next."""
        taken = self._inner.try_consume_tokens([token]) == 1
        self._refuse_failure()
        return taken

    def rollback(self, tokens: int) -> None:
        """Go back over that many tokens."""
        self._inner.rollback(tokens)
        self._refuse_failure()

    def forced(self) -> Sequence[int]:
        """Tokens whose text must come next, and that the tokenizer would choose for it."""
        return self._inner.compute_ff_tokens()

    def _refuse_failure(self) -> None:
        if self._inner.is_error():
            raise ConstraintError(f"the constraint became too complex to follow: {_told(self._inner.get_error())}")


class _Compiler:
    """The compiled grammars of one vocabulary, the most recently used of them. Holds no vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Tokens(vocabulary)), n_vocab=vocabulary.size, eos_token=sorted(vocabulary.ends)
        )
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, grammar: str) -> LLMatcher:
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        if found is None:
            found = _with_room(lambda: LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS))
            if found.is_error():
                raise ConstraintError(f"the constraint cannot be followed: {_told(found.get_error())}")
            with self._lock:
                self._compiled[grammar] = found
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return found.deep_copy()


class _Tokens:
    """A vocabulary in the form that llguidance takes."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens = [vocabulary.bytes_of(token) for token in range(vocabulary.size)]
        self.eos_token_id = min(vocabulary.ends)
        self.special_token_ids = [token for token, its in enumerate(tokens) if not its]
        self.tokens = [its or b"<|%d|>" % token for token, its in enumerate(tokens)]
        self._encode: Callable[[str], list[int]] = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _with_room(work: Callable[[], _T]) -> _T:
    """Do it on a large stack: llguidance recurses from rule to rule, and a stack that overflows ends the process."""
    with ThreadPoolExecutor(1) as pool:
        with _stack_size:
            usual = threading.stack_size(_STACK)
            try:
                done = pool.submit(work)
            finally:
                threading.stack_size(usual)
        return done.result()


def _told(message: object) -> str:
    return " ".join(str(message).split())[:300]
