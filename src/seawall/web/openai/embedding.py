"""Embeddings: texts or tokens in, vectors out, as numbers or as base64 of little-endian float32."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import anyio.lowlevel
import anyio.to_thread

from seawall.inference.errors import PromptError, TextTooLongError
from seawall.web.asgi import Send
from seawall.web.openai.errors import RequestError
from seawall.web.openai.outlet import send_json
from seawall.web.openai.replies import Array, vectors
from seawall.web.openai.requests import Embedding

MOST_TOKENS = 300_000  # of all inputs of a request, as OpenAI has it
_ROWS = 16  # vectors that are written as JSON in one go: about 2 ms as numbers


class Embeds(Protocol):
    """What the router needs of an embedder."""

    name: str
    dimension: int

    def encode(self, text: str | Sequence[int]) -> list[int]:
        """The tokens that a text, or tokens of one, are run as."""

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> Array:
        """Vectors of texts or of their tokens, [texts, dimension]."""


Embed = Callable[[Embeds, Sequence[Sequence[int]]], Awaitable[Array]]


async def embed(asked: Embedding, embedder: Embeds, guarded: Embed, send: Send) -> None:
    """Answer a request for embeddings; `guarded` runs the embedder behind its policies."""
    dimensions = asked.dimensions
    if dimensions is not None and dimensions > embedder.dimension:
        raise RequestError(f"dimensions is {dimensions}, and this model has {embedder.dimension}", param="dimensions")
    tokens = await anyio.to_thread.run_sync(_encoded, embedder, asked.inputs)
    count = sum(map(len, tokens))
    found = await guarded(embedder, tokens)
    as_base64 = asked.as_base64
    rows: list[str] = []
    for start in range(0, len(found), _ROWS):
        part = vectors(found[start : start + _ROWS], dimensions=dimensions, as_base64=as_base64)
        for index, vector in enumerate(part, start):
            rows.append(json.dumps({"object": "embedding", "index": index, "embedding": vector}))
        await anyio.lowlevel.checkpoint()
    head = json.dumps(
        {"object": "list", "model": asked.model, "usage": {"prompt_tokens": count, "total_tokens": count}}
    )
    await send_json(send, 200, f'{head[:-1]}, "data": [{", ".join(rows)}]}}'.encode())


def _encoded(embedder: Embeds, inputs: list[str | list[int]]) -> list[list[int]]:
    tokens: list[list[int]] = []
    total = 0
    for index, one in enumerate(inputs):
        try:
            tokens.append(embedder.encode(one))
        except PromptError as error:
            code = "context_length_exceeded" if isinstance(error, TextTooLongError) else "invalid_value"
            raise RequestError(f"input[{index}]: {error}", param=f"input[{index}]", code=code) from error
        total += len(tokens[-1])
        if total > MOST_TOKENS:
            raise RequestError(f"the inputs have more than {MOST_TOKENS} tokens together", param="input")
    return tokens
