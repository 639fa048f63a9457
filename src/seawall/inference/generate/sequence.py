"""One prompt and its answer, advanced by one bounded piece of work at a time."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NoReturn, Self

from seawall.inference.errors import (
    DecoderClosedError,
    GenerationCancelledError,
    RuntimeFailure,
    SequenceBusyError,
)
from seawall.inference.models.tokenizer import TextCodec
from seawall.inference.runtime import ort

from .answer import Answer, Step
from .choosing import Chooser
from .sampling import Logits
from .slot import Slot, part_length
from .speculation.drafter import Drafting
from .speculation.starting import Started
from .speculation.statistics import SpeculationStatistics

__all__ = ["Sequence", "Step"]


class Sequence:
    """A prompt being answered. Made by `Decoder.start`; close it, or use it in a `with` block.

    Each `step` blocks its thread for one piece of work: at most 256 tokens of the prompt, or one new token. With
    speculation one step in several works, for a draft and its verification, and those after it hand out what it found.
    So whoever drives several sequences can take turns, and can stop between any two steps. Steps of one
    sequence may run in different threads, one after the other; `cancel` and `close` may be called from any
    thread at any time.

    Attributes:
        prompt_tokens: how many tokens the prompt has.
    """

    def __init__(
        self,
        slot: Slot,
        give_back: Callable[[Slot], None],
        codec: TextCodec,
        prompt: list[int],
        *,
        limit: int,
        ends: frozenset[int],
        chooser: Chooser,
        stop: Seq[str],
        speculate: Callable[[Slot], Started] | None = None,
        held: Seq[Drafting] = (),
    ) -> None:
        self.prompt_tokens = len(prompt)
        self._slot: Slot | None = slot
        self._pending = prompt
        self._length = 0
        self._chooser = chooser
        self._answer = Answer(codec, chooser, ends=ends, limit=limit, stop=stop)
        self._speculate = speculate
        self._started: Started | None = None
        self._decided: deque[int] = deque()
        self._lock = threading.Lock()  # held for nanoseconds, never during a run
        self._running: Any = None
        self._cancelled = False
        self._failed = False
        self._closed = False
        # Runs once: at close, or when a forgotten sequence is collected.
        self._release = weakref.finalize(self, _release, give_back, slot, held)
        self._release.atexit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a sequence can't be copied or sent, for two would write into one cache: start another")

    def __iter__(self) -> Iterator[Step]:
        """All the steps that are left."""
        while (step := self.step()) is not None:
            yield step

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far, an end token included."""
        return self._answer.tokens

    @property
    def speculation(self) -> SpeculationStatistics | None:
        """What speculation did so far; None without it, and before the first step."""
        return self._started.speculator.statistics() if self._started is not None else None

    @property
    def finished(self) -> bool:
        """Whether the answer is complete; `step` returns None from then on."""
        return self._answer.finish is not None

    def step(self) -> Step | None:
        """Do one piece of work and say what came of it; None once the answer is complete.

        Raises GenerationCancelledError after `cancel`, DecoderClosedError after `close`, SequenceBusyError
        while another thread is in here, RuntimeFailure if ONNX Runtime fails, after which the next step tries again.
        What a constraint or a drafter raises ends the answer: DecoderClosedError from then on.
        """
        slot, options = self._begin()
        try:
            if self.finished:
                return None
            if self._speculate is not None:
                return self._speculative_step(slot, options, self._speculate)
            part = self._pending[: part_length(len(self._pending))]
            logits = slot.run(part, self._length, options)
            if len(part) < len(self._pending):
                self._length += len(part)
                self._pending = self._pending[len(part) :]
                return Step(None, "", None, len(part))
            token = self._choose(logits)  # before anything changes: if it fails, the next step tries again
            self._length += len(part)
            return self._accept(token, 0 if self.tokens else len(part))
        except RuntimeFailure as error:
            if self._cancelled or self._closed:  # however the runtime words that it was told to stop
                raise GenerationCancelledError("this sequence was cancelled during a step") from error
            raise
        except BaseException:
            self._failed = True
            raise
        finally:
            self._end()

    def _speculative_step(self, slot: Slot, options: Any, start: Callable[[Slot], Started]) -> Step:
        if self._decided:
            return self._accept(self._decided.popleft(), 0)
        if self._started is None:
            self._started = start(slot)
        target, speculator = self._started
        if self.tokens:
            self._decided.extend(speculator.round(self._pending[0], self._answer.room, options))
            return self._accept(self._decided.popleft(), 0)
        part = self._pending[: part_length(len(self._pending))]
        before = target.length
        logits = target.read(part, options)
        if len(part) < len(self._pending):
            self._pending = self._pending[len(part) :]
            return Step(None, "", None, len(part))
        try:
            token = self._choose(logits)
        except BaseException:
            target.rewind(before)  # the next step tries again
            raise
        speculator.begin(token)
        return self._accept(token, len(part))

    def _choose(self, logits: Logits) -> int:
        token = self._chooser.choose(logits)
        self._chooser.decide(token, logits)
        return token

    def cancel(self) -> None:
        """Stop a step that is running, within milliseconds, and refuse all later ones. Never blocks."""
        with self._lock:
            self._cancelled = True
            if self._running is not None:
                self._running.terminate = True

    def close(self) -> None:
        """Give the cache back to the decoder, at the latest when the running step stops. Never blocks."""
        with self._lock:
            self._closed = True
            if self._running is not None:
                self._running.terminate = True
                return
        self._give_back()

    def _begin(self) -> tuple[Slot, Any]:
        with self._lock:
            if self._closed or self._slot is None:
                raise DecoderClosedError("this sequence is closed: start a new one")
            if self._cancelled:
                raise GenerationCancelledError("this sequence was cancelled: start a new one")
            if self._failed:
                raise DecoderClosedError("this sequence has failed: start a new one")
            if self._running is not None:
                raise SequenceBusyError("a step of this sequence is running: wait for it, or start another")
            self._running = options = ort.run_options()
            return self._slot, options

    def _end(self) -> None:
        with self._lock:
            self._running = None
            closed = self._closed
        if closed:
            self._give_back()

    def _give_back(self) -> None:
        self._slot = None
        self._release()

    def _accept(self, token: int, read: int) -> Step:
        self._pending = [token]
        return self._answer.accept(token, read)


def _release(give_back: Callable[[Slot], None], slot: Slot, held: Seq[Drafting]) -> None:
    with ExitStack() as releasing:  # whatever a drafter raises while it closes, the others close too
        releasing.callback(give_back, slot)
        for drafting in held:
            releasing.callback(drafting.close)
