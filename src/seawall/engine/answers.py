"""What a model's answer comes as: piece by piece, or whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seawall.inference.generate.choosing import Logprobs


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer took, in tokens.

    Attributes:
        prompt_tokens: of the prompt, its template included.
        cached_tokens: those of them that were not computed again, since another prompt began with them.
        completion_tokens: of the answer, an end token included.
        drafted_tokens: guessed by speculation, and verified.
        accepted_tokens: those of them that stand in the answer.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to an answer.

    Attributes:
        text: what became certain; may be empty while a character is still incomplete.
        token: the token that was chosen.
        finish_reason: on the last piece of an answer, "stop" or "length"; else None.
        index: which of the `n` samples it belongs to, from 0.
        logprobs: of the token, where they were asked for.
        usage: on the last piece of an answer, what it took.
    """

    text: str
    token: int | None
    finish_reason: str | None
    index: int = 0
    logprobs: Logprobs | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. Times are seconds; `tokens_per_second` counts the tokens after the first.

    `logprobs` has one entry for each token, where they were asked for; else it is empty.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    time_to_first_token: float
    tokens_per_second: float
    usage: Usage = Usage()
    logprobs: tuple[Logprobs, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a server says about the model behind it.

    Attributes:
        name: of the model.
        precision: how its weights are stored.
        kv: how its key/value cache is stored.
        context: tokens of prompt and answer together, at most.
        vocabulary: tokens that it knows.
    """

    name: str
    precision: str
    kv: str
    context: int
    vocabulary: int


class Gathering:
    """Pieces of one sample, as they come, and when they did; `whole` makes the answer of them."""

    def __init__(self, begun: float) -> None:
        self._begun = self._first = self._last = begun
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._reason = "stop"
        self._usage = Usage()

    def add(self, piece: Piece, now: float) -> None:
        """One more piece came."""
        if piece.token is not None:
            self._tokens.append(piece.token)
            self._first = now if len(self._tokens) == 1 else self._first
        if piece.logprobs is not None:
            self._logprobs.append(piece.logprobs)
        self._texts.append(piece.text)
        self._reason = piece.finish_reason or self._reason
        self._usage = piece.usage or self._usage
        self._last = now

    def whole(self) -> Completion:
        """The answer."""
        seconds, more = self._last - self._first, len(self._tokens) - 1
        return Completion(
            "".join(self._texts),
            tuple(self._tokens),
            self._reason,
            self._first - self._begun,
            more / seconds if more > 0 and seconds > 0 else 0.0,
            self._usage,
            tuple(self._logprobs),
        )
