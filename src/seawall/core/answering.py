"""What telemetry sees of a model's answers. It sets `watch`; the engine tells it, and knows no exporter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from seawall.core.events import ask


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked of a model. `prompt` is a text or chat messages, which telemetry leaves alone unless told."""

    model: str
    prompt: str | Sequence[Mapping[str, str]]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Answer:
    """An answer on its way. This one is watched by nobody."""

    def read(self, tokens: int) -> None:
        """The prompt has so many tokens."""

    def piece(self, text: str, finish: str | None) -> None:
        """One more token came, with the text that became certain; the last one says why it is."""

    def end(self, exc: BaseException | None) -> None:
        """The answer is whole, or ended with `exc`."""


watch: Callable[[Asked], Answer] | None = None
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
