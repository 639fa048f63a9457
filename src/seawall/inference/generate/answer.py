"""The answer of one prompt as it grows: its tokens, its text, and how it ends. Pure."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Literal, NamedTuple

from seawall.inference.models.tokenizer import TextCodec

from .choosing import Chooser, Logprobs
from .text import TextStream


class Step(NamedTuple):
    """What one step produced.

    Attributes:
        token: the new token, or None while the prompt is still being read.
        text: text that became certain; often a word, sometimes nothing.
        finish: "stop" where the model or a stop string ended the answer, "length" where a limit did,
            None while there is more to come.
        read: tokens of the prompt that this step read; 0 for a step of decoding.
        logprobs: how likely the model thought the token, and others; None unless `start` was told to tell.
    """

    token: int | None
    text: str
    finish: Literal["stop", "length"] | None
    read: int
    logprobs: Logprobs | None = None


class Answer:
    """Turns decided tokens into steps.

    Attributes:
        tokens: decided so far, an end token included.
        finish: why it is complete, None while it is not.
    """

    def __init__(
        self, codec: TextCodec, chooser: Chooser, *, ends: frozenset[int], limit: int, stop: Seq[str] = ()
    ) -> None:
        self.tokens: list[int] = []
        self.finish: Literal["stop", "length"] | None = None
        self._codec = codec
        self._chooser = chooser
        self._ends = ends
        self._limit = limit
        self._text = TextStream(stop)

    @property
    def room(self) -> int:
        """Tokens that may still be decided."""
        return self._limit - len(self.tokens)

    def accept(self, token: int, read: int = 0) -> Step:
        """The step that hands out a token; `read` tokens of the prompt were read for it."""
        self.tokens.append(token)
        text = ""
        if token in self._ends:
            self.finish, text = "stop", self._text.flush()
        else:
            text = self._text.push(self._codec.bytes_of(token))
            if self._text.stopped:
                self.finish = "stop"
            elif len(self.tokens) >= self._limit:
                self.finish = "length"
                text += self._text.flush()
        return Step(token, text, self.finish, read, self._chooser.logprobs())
