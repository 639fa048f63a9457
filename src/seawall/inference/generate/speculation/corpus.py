"""Drafts from a corpus of your own: what usually follows there after the words at hand (REST, arXiv 2311.08252)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from seawall.inference.errors import InvalidSettingError

from .drafter import Host, Proposal, Turn
from .ngram import STRENGTHS, check_shortest, strength_of

_DEPTH = 16  # tokens of context that are compared
_VOTES = 64  # continuations that are counted where there are more
_BREAK = -1  # between two documents: no match and no draft crosses it


class Corpus:
    """Documents as tokens, sorted by all their places: a suffix array, 8 bytes a token, built in memory.

    A million tokens take about a second. It holds nothing of the sequences that it drafts for.

    Args:
        documents: tokens of each, as `Decoder.encode` makes them.
    """

    def __init__(self, documents: Iterable[Sequence[int]]) -> None:
        parts: list[np.ndarray[Any, Any]] = []
        for document in documents:
            parts += [_checked(document), np.array([_BREAK], dtype=np.int32)]
        self._tokens = np.concatenate(parts) if parts else np.array([_BREAK], dtype=np.int32)
        self._places = _sorted_places(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def narrow(self, low: int, high: int, depth: int, token: int) -> tuple[int, int]:
        """The part of places `low` to `high`, all alike for `depth` tokens, that go on with `token`."""
        key = self._key(depth)
        return bisect_left(self._places, token, low, high, key=key), bisect_right(
            self._places, token, low, high, key=key
        )

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The places where these tokens stand."""
        low, high = 0, len(self._places)
        for depth, token in enumerate(tokens):
            low, high = self.narrow(low, high, depth, token)
            if low == high:
                break
        return low, high

    def commonest(self, low: int, high: int, depth: int) -> tuple[int, float]:
        """The token that follows most of these places after `depth` tokens, and in which share of them; -1 for none."""
        places = self._places[low : high : max(1, (high - low) // _VOTES)]
        following = self._tokens[np.minimum(places + depth, len(self._tokens) - 1)]
        found, votes = np.unique(following, return_counts=True)
        best = int(votes.argmax())
        return int(found[best]), float(votes[best] / len(following))

    def after(self, place: int, depth: int, count: int) -> list[int]:
        """At most `count` tokens that stand `depth` after this one of the sorted places, up to its document's end."""
        start = int(self._places[place]) + depth
        found: list[int] = self._tokens[start : start + count].tolist()
        return found[: found.index(_BREAK)] if _BREAK in found else found

    def _key(self, depth: int) -> Any:
        tokens, last = self._tokens, len(self._tokens) - 1
        return lambda place: tokens[min(place + depth, last)]


def _checked(document: Sequence[int]) -> np.ndarray[Any, Any]:
    try:
        tokens = np.asarray(document)
    except ValueError:  # a list of lists
        tokens = np.array(None)
    whole = tokens.ndim == 1 and (not len(tokens) or tokens.dtype.kind in "iu")
    if not whole or (len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < 1 << 31):
        raise InvalidSettingError(f"a document must be a list of tokens of 0 or more, got {document!r:.80}")
    return tokens.astype(np.int32)


def _sorted_places(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Places in the order of the `_DEPTH` tokens that stand there, by doubling the compared length."""
    _, rank = np.unique(tokens, return_inverse=True)
    rank = rank.astype(np.int64)
    width = 1
    while True:
        following = np.zeros_like(rank)
        following[:-width] = rank[width:] + 1
        combined = rank * (int(rank.max()) + 2) + following
        if width * 2 > _DEPTH or width >= len(tokens):
            return np.argsort(rank, kind="stable").astype(np.int32)
        _, rank = np.unique(combined, return_inverse=True)
        rank = rank.astype(np.int64)
        width *= 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusDraft:
    """Proposes what most often follows, in a corpus, the longest end of the sequence that stands there.

    Attributes:
        corpus: shared by all sequences, and never written.
        shortest: tokens that have to match before anything is proposed.
        name: labels its statistics.
    """

    corpus: Corpus
    shortest: int = 2
    name: str = "corpus"
    chances: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.35, 0.6, 0.8, 0.9, 0.95)[: len(STRENGTHS)]

    def __post_init__(self) -> None:
        if not isinstance(self.corpus, Corpus):
            raise InvalidSettingError(f"corpus must be Corpus(documents), got {self.corpus!r:.200}")
        check_shortest(self.shortest, _DEPTH)

    def cost(self) -> float:
        """Nothing worth counting: less than 0.1 ms a round."""
        return 0.0

    def start(self, prompt: Sequence[int], host: Host | None = None) -> CorpusDrafting:
        """Begin with a sequence."""
        return CorpusDrafting(self.corpus, prompt, self.shortest)


class CorpusDrafting:
    """A corpus drafter at work on one sequence."""

    def __init__(self, corpus: Corpus, prompt: Sequence[int], shortest: int) -> None:
        self._corpus = corpus
        self._shortest = shortest
        self._end: list[int] = []  # the last tokens
        self._matched = 0  # of them, how many stand in the corpus, at the places from `low` to `high`
        self._low = self._high = 0
        for token in prompt[-_DEPTH:]:
            self.extend(token)

    def propose(self, turn: Turn) -> Iterator[Proposal]:
        """The commonest continuation, one token at a time, among the places that still agree."""
        if self._matched < self._shortest:
            return
        low, high, depth = self._low, self._high, self._matched
        last = self._matched + turn.most
        while high - low > 1 and depth < min(_DEPTH, last):
            token, share = self._corpus.commonest(low, high, depth)
            if token < 0:
                return
            strength = strength_of(depth)
            yield Proposal(token, strength if share > 0.5 else max(0, strength - 2))
            low, high = self._corpus.narrow(low, high, depth, token)
            depth += 1
        for token in self._corpus.after(low, depth, last - depth):  # the places are sorted no further: follow one
            yield Proposal(token, strength_of(depth))
            depth += 1

    def extend(self, token: int) -> None:
        """The sequence grew by a token: the match grows, or a shorter one is looked for."""
        self._end = [*self._end[1 - _DEPTH :], token]
        if 0 < self._matched < _DEPTH:
            low, high = self._corpus.narrow(self._low, self._high, self._matched, token)
            if low < high:
                self._low, self._high = low, high
                self._matched += 1
                return
        length = min(self._matched, len(self._end) - 1, _DEPTH - 1) if self._matched else len(self._end)
        while length >= self._shortest:
            low, high = self._corpus.find(self._end[-length:])
            if low < high:
                self._low, self._high, self._matched = low, high, length
                return
            length = length - 1 if length <= 4 else length // 2 + 1
        self._matched = 0

    def close(self) -> None:
        """Nothing is held."""
