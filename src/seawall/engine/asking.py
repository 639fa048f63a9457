"""What an engine is asked: the prompt's tokens, and what telemetry is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seawall.core import answering
from seawall.inference.errors import EmptyPromptError, InvalidPromptError, PromptTooLongError

if TYPE_CHECKING:
    from seawall.engine.settings import AnswerSettings, Prompt
    from seawall.inference.generate.decoder import Decoder


def read(decoder: Decoder, prompt: Prompt, settings: AnswerSettings) -> list[int]:
    """Tokens of the prompt; in the worker thread, as is whatever else takes long before an answer begins.

    Raises:
        PromptError: it is empty, too long, or nothing that could be one.
    """
    given: object = prompt
    if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray, memoryview)):
        raise InvalidPromptError(
            f"a prompt must be a text or chat messages, or with chat=False a text or tokens, got {prompt!r:.200}"
        )
    tokens: Sequence[int]
    if settings.chat:
        tokens = decoder.encode_chat(prompt)  # type: ignore[arg-type]
    else:
        tokens = decoder.encode(prompt) if isinstance(prompt, str) else prompt  # type: ignore[assignment]
    if not tokens:
        raise EmptyPromptError
    if len(tokens) >= decoder.context:
        raise PromptTooLongError(len(tokens), decoder.context - 1)
    if settings.constraint is not None and (prepare := getattr(decoder, "prepare", None)) is not None:
        prepare(settings.constraint)
    return list(tokens)


def asked(name: str, prompt: Prompt, settings: AnswerSettings) -> answering.Asked:
    """What those who watch answers hear of a call."""
    seed = settings.seed if settings.temperature else None
    return answering.Asked(
        name, prompt, settings.max_tokens, settings.temperature, settings.top_p, seed, settings.chat, settings.n
    )
