"""What a server needs of whatever answers prompts: an engine, several behind a balancer, a deployment, a fallback."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Protocol, Unpack, runtime_checkable

if TYPE_CHECKING:
    from seawall.engine.answers import Completion, ModelInfo, Piece
    from seawall.engine.settings import AnswerOptions, Prompt


@runtime_checkable
class Serving(Protocol):
    """Answers prompts. `Engine` says what each method does and raises."""

    name: str

    def stream(self, prompt: Prompt, **settings: Unpack[AnswerOptions]) -> AsyncGenerator[Piece, None]:
        """The answer, piece by piece; what refuses it does so before the first piece."""
        ...

    async def generate(self, prompt: Prompt, **settings: Unpack[AnswerOptions]) -> Completion:
        """The whole answer."""
        ...

    async def generate_many(self, prompt: Prompt, **settings: Unpack[AnswerOptions]) -> list[Completion]:
        """`n` answers to one prompt."""
        ...

    def info(self) -> ModelInfo:
        """What is served; EngineClosedError where nothing is."""
        ...

    async def drain(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - ends no call
        """Take no more; whether all that was in flight ended within `timeout` seconds."""
        ...
