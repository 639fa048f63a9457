"""What telemetry sees of a model's answers. It sets `watch` and `watch_step`; the engine knows no exporter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Context
from dataclasses import dataclass

from seawall.core.events import ask


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked of a model. `prompt` is a text, chat messages or tokens; telemetry leaves it alone unless told.

    `chat` says whether the prompt was put into the model's template for chats, `samples` how many answers are wanted.
    """

    model: str
    prompt: str | Sequence[Mapping[str, str]] | Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    chat: bool = True
    samples: int = 1


class Answer:
    """An answer on its way. This one is watched by nobody."""

    def read(self, tokens: int) -> None:
        """The prompt has so many tokens."""

    def piece(self, text: str, finish: str | None, sample: int = 0) -> None:
        """One more token of a sample came, with the text that became certain; the last one says why it is."""

    def end(self, exc: BaseException | None) -> None:
        """The answer is whole, or ended with `exc`."""


watch: Callable[[Asked], Answer] | None = None
watch_step: Callable[[Sequence[Context]], AbstractContextManager[object]] | None = None  # of several answers at once
_NOBODY = Answer()


@contextmanager
def watched(asked: Asked) -> Iterator[Answer]:
    """Tell whoever watches of an answer that is made in this block."""
    answer = _NOBODY if watch is None else ask(watch, asked, otherwise=_NOBODY)
    try:
        yield answer
    except BaseException as exc:
        ask(answer.end, exc, otherwise=None)
        raise
    ask(answer.end, None, otherwise=None)


def step_watched(contexts: Sequence[Context]) -> AbstractContextManager[object]:
    """Tell whoever watches of a step that these calls' answers share; it must not raise."""
    unwatched: AbstractContextManager[object] = nullcontext()
    return unwatched if watch_step is None else ask(watch_step, contexts, otherwise=unwatched)
