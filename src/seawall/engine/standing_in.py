"""What stands in for a model: it is asked as the model itself would be, and decides which one answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar, Unpack

from seawall.core import events
from seawall.core.events import Event, Listener
from seawall.core.policy import PolicyBase
from seawall.engine.serving import Serving
from seawall.inference.runtime.closing import Closing

if TYPE_CHECKING:
    from seawall.engine.answers import Completion, ModelInfo, Piece
    from seawall.engine.settings import AnswerOptions, Prompt
    from seawall.inference.runtime.inputs import Array

T = TypeVar("T")
Deadline: TypeAlias = float | timedelta | None
Text: TypeAlias = str | Sequence[int]  # or its tokens


class Closes(Protocol):
    """Anything that answers, and gives its memory back when it is closed."""

    def close(self) -> None:
        """Give everything back; may block."""


class Runs(Closes, Protocol):
    """A Backend or a MicroBatcher, or what stands in for one."""

    async def run(self, inputs: Mapping[str, Array], *, deadline: Deadline = None) -> dict[str, Array]:
        """The outputs by name."""
        ...

    def run_sync(self, inputs: Mapping[str, Array], *, deadline: Deadline = None) -> dict[str, Array]:
        """The same, for a plain thread."""
        ...


class Embeds(Closes, Protocol):
    """An Embedder, or what stands in for one."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def encode(self, text: Text) -> list[int]:
        """The tokens that a text is run as."""
        ...

    async def embed(self, texts: Sequence[Text], *, deadline: Deadline = None) -> Array:
        """A vector for each text."""
        ...

    def embed_sync(self, texts: Sequence[Text], *, deadline: Deadline = None) -> Array:
        """The same, for a plain thread."""
        ...


class Generates(Serving, Closes, Protocol):
    """An Engine, or what stands in for one."""


M = TypeVar("M", bound=Closes)
R = TypeVar("R", bound=Runs)
E = TypeVar("E", bound=Embeds)
G = TypeVar("G", bound=Generates)


class StandIn(PolicyBase, Closing, Generic[M]):
    """Is asked in a model's place, in the model's own words: `run`, `embed`, `stream` ..., or `call` for any others.

    So a stand-in goes wherever the model went, into another stand-in as well.
    """

    kind = "model"

    def __init__(self, name: str, listeners: Iterable[Listener] = ()) -> None:
        super().__init__(name, listeners)

    @abstractmethod
    async def call(self, ask: Callable[[M], Awaitable[T]]) -> T:
        """The answer of the model that serves now: `await stand_in.call(lambda model: model.run(inputs))`."""

    @abstractmethod
    def call_sync(self, ask: Callable[[M], T]) -> T:
        """The same for a plain thread."""

    @abstractmethod
    def iterate(self, ask: Callable[[M], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """The same for a stream, which the model that began it gives to its end."""

    @property
    @abstractmethod
    def model(self) -> M:
        """The model that serves now: to look at. Ask the stand-in, since a model may be closed behind its back."""

    async def run(self: StandIn[R], inputs: Mapping[str, Array], *, deadline: Deadline = None) -> dict[str, Array]:
        """As `Backend.run`."""
        return await self.call(lambda model: model.run(inputs, deadline=deadline))

    def run_sync(self: StandIn[R], inputs: Mapping[str, Array], *, deadline: Deadline = None) -> dict[str, Array]:
        """As `Backend.run_sync`."""
        return self.call_sync(lambda model: model.run_sync(inputs, deadline=deadline))

    async def embed(self: StandIn[E], texts: Sequence[Text], *, deadline: Deadline = None) -> Array:
        """As `Embedder.embed`."""
        return await self.call(lambda model: model.embed(texts, deadline=deadline))

    def embed_sync(self: StandIn[E], texts: Sequence[Text], *, deadline: Deadline = None) -> Array:
        """As `Embedder.embed_sync`."""
        return self.call_sync(lambda model: model.embed_sync(texts, deadline=deadline))

    def stream(self: StandIn[G], prompt: Prompt, **settings: Unpack[AnswerOptions]) -> AsyncGenerator[Piece, None]:
        """As `Engine.stream`."""
        return self.iterate(lambda model: model.stream(prompt, **settings))

    async def generate(self: StandIn[G], prompt: Prompt, **settings: Unpack[AnswerOptions]) -> Completion:
        """As `Engine.generate`."""
        return await self.call(lambda model: model.generate(prompt, **settings))

    async def generate_many(self: StandIn[G], prompt: Prompt, **settings: Unpack[AnswerOptions]) -> list[Completion]:
        """As `Engine.generate_many`."""
        return await self.call(lambda model: model.generate_many(prompt, **settings))

    def info(self: StandIn[G]) -> ModelInfo:
        """As `Engine.info`, of the model that serves now."""
        return self.look(lambda model: model.info())

    def encode(self: StandIn[E], text: Text) -> list[int]:
        """As `Embedder.encode`, by the model that serves now."""
        return self.look(lambda model: model.encode(text))

    @property
    def dimension(self: StandIn[E]) -> int:
        """As `Embedder.dimension`, of the model that serves now."""
        return self.look(lambda model: model.dimension)

    def look(self, at: Callable[[M], T]) -> T:
        """What the model that serves now says of itself; no call, and counted as none."""
        return at(self.model)

    def update(self, **settings: object) -> None:
        """Nothing of it changes by name; TypeError."""
        raise TypeError(f"{type(self).__name__} {self.name!r} has no settings to change while it serves")

    def _say(self, event: Callable[..., Event], *details: object) -> None:
        """Report an event now; without the lock."""
        with self._lock:
            self._emit(event, self._now(), *details)
        events.deliver()


async def relayed(stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Its items; it is closed with this generator."""
    async with aclosing(stream) as items:
        async for item in items:
            yield item
