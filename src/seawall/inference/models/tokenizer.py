"""The tokenizer of a model, built from the vocabulary and merges that its GGUF file carries.

The only module that imports `tokenizers`.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seawall.inference.errors import CorruptModelError, InvalidPromptError, MissingExtraError

try:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
except ImportError as error:
    raise MissingExtraError(error.name or "tokenizers") from error

FILE = "tokenizer.json"
_SPECIAL, _ADDED = 3, 4  # GGUF token types
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}


def build_tokenizer(metadata: dict[str, Any], path: Path) -> Any:
    """Build the byte-level BPE tokenizer that a GGUF header describes.

    A pre-tokenizer that is not known exactly is refused: a wrong one gives other tokens for the same
    text, and nothing would show it but worse answers.
    """
    pre = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise CorruptModelError(
            path, f"its pre-tokenizer is {pre!r}; only {', '.join(map(repr, _PRE_TOKENIZERS))} is read"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens", path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or "" in vocabulary:
        raise CorruptModelError(path, "its vocabulary holds an empty or a repeated token")
    merges = _merges(metadata, tokens, path)
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CorruptModelError(path, "its token types do not match its vocabulary")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((_SPECIAL, True), (_ADDED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, its in zip(tokens, kinds, strict=True)
            if its == kind
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def _strings(metadata: dict[str, Any], key: str, path: Path) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CorruptModelError(path, f"{key} is no list of strings")
    return values


def _merges(metadata: dict[str, Any], tokens: list[str], path: Path) -> list[tuple[str, str]]:
    known = set(tokens)
    pairs = []
    for merge in _strings(metadata, "tokenizer.ggml.merges", path):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise CorruptModelError(path, f"its merge {merge!r} names tokens that its vocabulary lacks")
        pairs.append((left, right))
    return pairs


class TextCodec:
    """Text to tokens, and tokens to the bytes they stand for. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokenizer = load_tokenizer(path)
        self._verbatim: Any = None
        self._lock = threading.Lock()
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials: dict[str, int] = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = frozenset(self.specials.values())
        self._bytes: dict[int, bytes] = {}
        self._longest = max(map(len, self._tokenizer.get_vocab()), default=1)  # one letter is at least one byte

    @functools.cached_property
    def vocabulary_digest(self) -> str:
        """The same for two codecs exactly if every token has the same id in both."""
        vocabulary = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the tokens of a text, without the work of encoding it."""
        return len(text) // self._longest

    def encode(self, text: str) -> list[int]:
        """Tokens of a text in which the model's control tokens act as such; for templates."""
        return self._ids(self._tokenizer, text)

    def encode_verbatim(self, text: str) -> list[int]:
        """Tokens of a text that is only text: a control token's name in it is spelled out in letters."""
        with self._lock:
            if self._verbatim is None:
                self._verbatim = load_tokenizer(self._path)
                self._verbatim.encode_special_tokens = True
        return self._ids(self._verbatim, text)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that one token stands for; none for control and unknown tokens."""
        known = self._bytes.get(token)
        if known is None:
            name = None if token in self._special_ids else self._tokenizer.id_to_token(token)
            known = b"" if name is None else token_bytes(name)
            self._bytes[token] = known
        return known

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        try:
            found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # of a str, only where UTF-8 cannot hold it
            raise InvalidPromptError("a text must be Unicode without lone surrogates: replace them first") from error
        except BaseException as error:
            if not _is_failure(error):
                raise
            raise CorruptModelError(self._path, f"its tokenizer fails: {error}") from error
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """The whole text of a list of tokens."""
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", errors="replace")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a `tokenizer.json`, which neither cuts nor pads, or CorruptModelError."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise CorruptModelError(path, f"the tokenizer cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_failure(error: BaseException) -> bool:
    """Whether tokenizers has failed: it raises bare Exception, and where a file deceives it PanicException, not one."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: itself where printable, else the next free code point."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update((chr(256 + index), byte) for index, byte in enumerate(others))
    return alphabet


_ALPHABET = _byte_alphabet()


def token_bytes(name: str) -> bytes:
    """The bytes behind a byte-level token's name; an added token, written as plain text, is itself."""
    try:
        return bytes(_ALPHABET[letter] for letter in name)
    except KeyError:
        return name.encode()
