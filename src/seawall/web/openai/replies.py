"""The shapes of answers. Pure: what a model said in, JSON objects out."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from seawall.engine import Piece, Usage
    from seawall.inference.generate.choosing import Logprobs, TokenLogprob

Content = dict[str, Any]
Array = np.ndarray[Any, Any]


class Total(NamedTuple):
    """What all answers of a request took. Samples of one prompt read it once."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    drafted: int = 0
    accepted: int = 0

    def plus(self, usage: Usage, *, same_prompt: bool) -> Total:
        """With one more answer."""
        return Total(
            self.prompt + (0 if same_prompt else usage.prompt_tokens),
            self.cached + (0 if same_prompt else usage.cached_tokens),
            self.completion + usage.completion_tokens,
            self.drafted + usage.drafted_tokens,
            self.accepted + usage.accepted_tokens,
        )

    def content(self) -> Content:
        """As OpenAI tells it. Rejected drafts are told and not counted: they are no part of the answer."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
        }


@dataclass(slots=True)
class Said:
    """One answer, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        """One more piece."""
        self.texts.append(piece.text)
        self.logprobs += _told(piece)
        self.finish = piece.finish_reason or self.finish


class Reply:
    """The answer to one chat or completion: what all its parts have in common."""

    def __init__(self, model: str, *, chat: bool, fingerprint: str | None) -> None:
        self._chat = chat
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, answers: Iterable[Said], usage: Total) -> Content:
        """All of it at once."""
        choices = [self._choice(index, said) for index, said in enumerate(answers)]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": usage.content()}

    def _choice(self, index: int, said: Said) -> Content:
        text = "".join(said.texts)
        shown: Content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        if not self._chat:
            shown = {"text": text}
        return {"index": index, **shown, "logprobs": self._logprobs(said.logprobs, 0), "finish_reason": said.finish}

    def begin(self, index: int, *, include_usage: bool) -> list[Content]:
        """What comes before the first piece of an answer: in a chat, who speaks."""
        if not self._chat:
            return []
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return [self._chunk([choice], include_usage=include_usage)]

    def piece(self, index: int, piece: Piece, *, offset: int, include_usage: bool) -> Content:
        """One piece of an answer; `offset` counts the characters before it."""
        shown: Content = (
            {"delta": {"content": piece.text} if piece.text else {}} if self._chat else {"text": piece.text}
        )
        logprobs = self._logprobs(_told(piece), offset)
        choice = {"index": index, **shown, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        return self._chunk([choice], include_usage=include_usage)

    def usage(self, usage: Total) -> Content:
        """The chunk that tells what it took."""
        return {**self._chunk([], include_usage=True), "usage": usage.content()}

    def _chunk(self, choices: list[Content], *, include_usage: bool) -> Content:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunk = {**self._common, "object": kind, "choices": choices}
        return {**chunk, "usage": None} if include_usage else chunk

    def _logprobs(self, told: list[Logprobs], offset: int) -> Content | None:
        if not told:
            return None
        return {"content": [_token(one) for one in told], "refusal": None} if self._chat else _columns(told, offset)


def vectors(found: Array, *, dimensions: int | None, as_base64: bool) -> list[list[float] | str]:
    """Embeddings [texts, dimension] as JSON has them, cut to their first `dimensions` and made of length 1 again."""
    if dimensions is not None and dimensions < found.shape[1]:
        found = found[:, :dimensions]
        found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    rows = np.ascontiguousarray(found, dtype="<f4")
    return [base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist() for row in rows]


def _told(piece: Piece) -> list[Logprobs]:
    """The log-probabilities of a piece; of an end token, which is no text, nobody is told."""
    return [] if piece.logprobs is None or not piece.logprobs.chosen.bytes else [piece.logprobs]


def _token(told: Logprobs) -> Content:
    """One token and its alternatives, as chats tell them."""
    return {**_likelihood(told.chosen), "top_logprobs": [_likelihood(one) for one in told.top]}


def _likelihood(one: TokenLogprob) -> Content:
    return {"token": _text(one.bytes), "logprob": _finite(one.logprob), "bytes": list(one.bytes)}


def _columns(told: list[Logprobs], offset: int) -> Content:
    """Tokens and their alternatives, as completions tell them; the chosen token is among these."""
    offsets = []
    for one in told:
        offsets.append(offset)
        offset += len(one.chosen.bytes.decode(errors="ignore"))
    return {
        "tokens": [_text(one.chosen.bytes) for one in told],
        "token_logprobs": [_finite(one.chosen.logprob) for one in told],
        "top_logprobs": [{_text(each.bytes): _finite(each.logprob) for each in (*one.top, one.chosen)} for one in told],
        "text_offset": offsets,
    }


def _text(token: bytes) -> str:
    """A token as text; one that is a part of a character is spelled out, as OpenAI does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity
