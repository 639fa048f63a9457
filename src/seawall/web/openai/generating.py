"""Chats and completions: a checked request to an engine, its pieces to an answer or to events."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from seawall.inference.errors import InvalidSettingError, PromptError, PromptTooLongError
from seawall.web.asgi import Send
from seawall.web.openai.errors import RequestError
from seawall.web.openai.metrics import Watch
from seawall.web.openai.outlet import Events, send_json, to_json
from seawall.web.openai.replies import Reply, Said, Total
from seawall.web.openai.requests import Generation, Rule

if TYPE_CHECKING:
    from seawall.engine import AnswerOptions, ModelInfo, Piece, Serving
    from seawall.inference.generate.constraints import Constraint


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the server chooses where a request says nothing, and the most that it may ask for."""

    temperature: float
    max_tokens: int | None
    choices: int


async def generate(
    asked: Generation, engine: Serving, defaults: Defaults, tenant: str, watch: Watch, send: Send
) -> None:
    """Answer a chat or completion. What is refused, is refused before the answer begins.

    Raises:
        RequestError: it asks for more than this model or server gives.
        Exception: whatever the engine raises.
    """
    facts = engine.info()
    max_tokens = _limited(asked, facts.context, defaults)
    settings = await _settings(asked, max_tokens, defaults, tenant)
    reply = Reply(asked.model, chat=asked.chat, fingerprint=_fingerprint(facts))
    async with aclosing(_pieces(engine, asked, settings, watch)) as pieces:
        try:
            await (_stream if asked.stream else _whole)(pieces, asked, reply, send)
        except PromptError as error:
            raise RequestError(
                str(error),
                param="messages" if asked.chat else "prompt",
                code="context_length_exceeded" if isinstance(error, PromptTooLongError) else "invalid_value",
            ) from error


def _limited(asked: Generation, context: int, defaults: Defaults) -> int:
    """The most tokens of an answer, or `RequestError` where it asks for too much."""
    most = context if defaults.max_tokens is None else min(context, defaults.max_tokens)
    if asked.max_tokens is not None and asked.max_tokens > most:
        whose = "this model's context" if most == context else "this server's limit"
        raise RequestError(
            f"{asked.limited_by} is {asked.max_tokens}, and {whose} is {most} tokens", param=asked.limited_by
        )
    choices = len(asked.prompts) * asked.n
    if choices > defaults.choices:
        raise RequestError(
            f"n times the number of prompts is {choices}, and this server gives at most {defaults.choices} answers",
            param="n",
        )
    return most if asked.max_tokens is None else asked.max_tokens


@functools.cache
def _fingerprint(facts: ModelInfo) -> str:
    """Another one where the model, how it is stored or this package is another."""
    parts = (facts.name, facts.precision, facts.kv, metadata.version("seawall"))
    return f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


async def _settings(asked: Generation, max_tokens: int, defaults: Defaults, tenant: str) -> AnswerOptions:
    """How an engine is told."""
    from seawall.inference.generate.choosing import Penalties

    rule = asked.constraint
    return {
        "chat": asked.chat,
        "constraint": None if rule is None else await anyio.to_thread.run_sync(_constraint, rule),
        "logprobs": asked.logprobs,
        "max_tokens": max_tokens,
        "min_p": asked.min_p,
        "n": asked.n,
        "penalties": Penalties(repetition=asked.repetition, presence=asked.presence, frequency=asked.frequency),
        "seed": asked.seed,
        "stop": asked.stop,
        "temperature": defaults.temperature if asked.temperature is None else asked.temperature,
        "tenant": tenant,
        "top_k": asked.top_k,
        "top_p": asked.top_p,
    }


def _constraint(rule: Rule) -> Constraint:
    """Compiles, for milliseconds, what may be hostile: not on the event loop."""
    from seawall.inference.generate import constraints

    makers: dict[str, Callable[[Any], Constraint]] = {
        "json": constraints.JsonSchema,
        "regex": constraints.Regex,
        "choice": constraints.Choice,
        "grammar": constraints.Grammar,
    }
    try:
        return makers[rule.kind](rule.value)
    except InvalidSettingError as error:
        raise RequestError(f"{rule.param} cannot be followed: {error}", param=rule.param) from error


async def _pieces(
    engine: Serving, asked: Generation, settings: AnswerOptions, watch: Watch
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all answers, with the number of the answer. Prompts take turns: a request is one call at a time."""
    for number, prompt in enumerate(asked.prompts):
        async with aclosing(engine.stream(prompt, **settings)) as stream:
            async for piece in stream:
                index = number * asked.n + piece.index
                watch.piece(index, piece)
                yield index, piece


async def _whole(pieces: AsyncGenerator[tuple[int, Piece], None], asked: Generation, reply: Reply, send: Send) -> None:
    answers = [Said() for _ in range(len(asked.prompts) * asked.n)]
    total = Total()
    async for index, piece in pieces:
        answers[index].add(piece)
        total = _counted(total, piece)
    await send_json(send, 200, to_json(reply.whole(answers, total)))


async def _stream(pieces: AsyncGenerator[tuple[int, Piece], None], asked: Generation, reply: Reply, send: Send) -> None:
    events = Events(send)
    begun: dict[int, int] = {}  # by answer: its characters so far
    total = Total()
    with_usage = asked.include_usage
    async for index, piece in pieces:
        told = reply.begin(index, include_usage=with_usage) if index not in begun else []
        offset = begun.setdefault(index, 0)
        if piece.text or piece.finish_reason or piece.logprobs is not None:
            told.append(reply.piece(index, piece, offset=offset, include_usage=with_usage))
        begun[index] += len(piece.text)
        total = _counted(total, piece)
        await events.tell(*told)
    if with_usage:
        await events.tell(reply.usage(total))
    await events.done()


def _counted(total: Total, piece: Piece) -> Total:
    return total if piece.usage is None else total.plus(piece.usage, same_prompt=piece.index > 0)
