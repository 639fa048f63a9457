"""What the scheduler's thread drives: answers that advance together, or in turns where they can't."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from seawall.inference.errors import DecoderClosedError, GenerationCancelledError, ModelError, RuntimeFailure

if TYPE_CHECKING:
    from seawall.engine.settings import AnswerSettings
    from seawall.inference.generate.decoder import Decoder
    from seawall.inference.generate.rows.continuous import ContinuousBatch
    from seawall.inference.generate.sequence import Sequence as Generation
    from seawall.inference.generate.sequence import Step


class Wanted(NamedTuple):
    """One answer: the tokens of its prompt, how it is wanted, and which of several samples it is."""

    prompt: Sequence[int]
    settings: AnswerSettings
    sample: int = 0


class Row(Protocol):
    """One answer on its way; `paused` is set to leave it out of the steps. See `generate.rows.row.Row`."""

    paused: bool
    cached_tokens: int

    @property
    def drafted_tokens(self) -> int: ...  # noqa: D102
    @property
    def accepted_tokens(self) -> int: ...  # noqa: D102


class Advance(NamedTuple):
    """What a step did for a row: new steps, or the error that ended this row alone."""

    row: Row
    steps: Sequence[Step]
    error: Exception | None


class Memory(NamedTuple):
    """The key/value cache at one moment, in bytes; tokens that were looked up in the prefix cache, and found."""

    used: int = 0
    committed: int = 0
    limit: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Stepper(Protocol):
    """Advances several answers. One thread drives it; `could_fit` and `interrupt` may be called in any."""

    def could_fit(self, wanted: Wanted) -> bool:
        """Whether there would be memory for it if nothing else were here."""
        ...

    def fits(self, wanted: Wanted) -> bool:
        """Whether there is memory for it now."""
        ...

    def join(self, wanted: Wanted) -> Row:
        """Take an answer on. What is wrong with it is raised here: PromptError, InvalidSettingError ..."""
        ...

    def step(self) -> Iterable[Advance]:
        """One bounded piece of work. What it raises concerns all rows, and nothing has changed: it can be repeated."""
        ...

    def interrupt(self, rows: Collection[Row] | None = None) -> None:
        """Stop the step that runs, if it is for none but these; never blocks."""
        ...

    def leave(self, row: Row) -> None:
        """Give its place and its memory back."""
        ...

    def close(self) -> None:
        """Give all memory back."""
        ...

    def memory(self) -> Memory:
        """How full the cache is."""
        ...


class Together:
    """Answers that advance together, by continuous batching."""

    def __init__(self, batch: ContinuousBatch) -> None:
        self._batch = batch
        self._options: Any = None
        self._changing = threading.RLock()  # held for microseconds; re-entrant, for a finaliser may abandon a call

    def could_fit(self, wanted: Wanted) -> bool:
        """Whether an empty cache is large enough."""
        return self._batch.could_fit(_request(wanted))

    def fits(self, wanted: Wanted) -> bool:
        """Whether the cache has room for it, were it to become as long as it may."""
        return self._batch.fits(_request(wanted))

    def join(self, wanted: Wanted) -> Row:
        """Give it a row."""
        return self._batch.join(_request(wanted))

    def step(self) -> Iterable[Advance]:
        """One step of every row that is not paused, at most one of them reading a part of its prompt."""
        from seawall.inference.runtime import ort

        options = ort.run_options()  # good for one step: `terminate` sticks
        with self._changing:
            self._options = options
        try:
            return self._batch.step(options)  # type: ignore[return-value]
        except RuntimeFailure as error:
            if options.terminate:  # however the runtime words that it was told to stop
                raise GenerationCancelledError("this step was told to stop") from error
            raise
        finally:
            with self._changing:
                self._options = None

    def interrupt(self, rows: Collection[Row] | None = None) -> None:
        """Terminate the run."""
        with self._changing:
            if self._options is None:
                return
            if rows is None or all(row in rows or row.paused for row in self._batch.active):
                self._options.terminate = True

    def leave(self, row: Row) -> None:
        """Free its row."""
        self._batch.leave(row)  # type: ignore[arg-type]

    def close(self) -> None:
        """Free them all."""
        self._batch.close()

    def memory(self) -> Memory:
        """As the batch counts it."""
        batch, prefix = self._batch, self._batch.prefix
        return Memory(
            batch.used_bytes,
            batch.held_bytes,
            batch.cache_bytes,
            prefix.prompt_tokens,
            prefix.hit_tokens,
        )


def _request(wanted: Wanted) -> Any:
    from seawall.inference.generate.rows.request import Request

    settings = wanted.settings
    return Request(
        prompt=tuple(wanted.prompt),
        max_tokens=settings.max_tokens,
        sampling=settings.sampling(wanted.sample),
        penalties=settings.penalties,
        stop=tuple(settings.stop),
        constraint=settings.constraint,
        logprobs=settings.logprobs,
        salt=settings.tenant.encode(errors="surrogatepass"),
    )


class Turns:
    """Answers that take turns, one step each: for a decoder of one's own, that has no rows but sequences."""

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self._decoder = decoder
        self._rows = rows
        self._order: list[_Turn] = []
        self._current: _Turn | None = None
        self._changing = threading.RLock()  # held for microseconds; re-entrant, for a finaliser may abandon a call

    def could_fit(self, wanted: Wanted) -> bool:
        """Every sequence has its own memory."""
        return True

    def fits(self, wanted: Wanted) -> bool:
        """Whether there is a place for it now."""
        return len(self._order) < self._rows

    def join(self, wanted: Wanted) -> Row:
        """Start to answer."""
        settings = wanted.settings
        turn = _Turn(
            self._decoder.start(
                wanted.prompt,
                max_tokens=settings.max_tokens,
                sampling=settings.sampling(wanted.sample),
                stop=settings.stop,
                penalties=settings.penalties,
                logprobs=settings.logprobs,
                constraint=settings.constraint,
            )
        )
        self._order.append(turn)
        return turn

    def step(self) -> list[Advance]:
        """A step of the answer whose turn it is."""
        turn = next((turn for turn in self._order if not turn.paused), None)
        if turn is None:
            return []
        self._order.remove(turn)
        self._order.append(turn)
        with self._changing:
            self._current = turn
        try:
            step = turn.sequence.step()
        except DecoderClosedError:
            raise
        except GenerationCancelledError as error:
            if turn.interrupted:
                return [Advance(turn, (), error)]
            turn.interrupted = True  # whoever did it knows why
            raise
        except ModelError as error:
            return [Advance(turn, (), error)]
        finally:
            with self._changing:
                self._current = None
        return [Advance(turn, () if step is None else (step,), None)]

    def interrupt(self, rows: Collection[Row] | None = None) -> None:
        """Cancel the answer whose step runs."""
        with self._changing:
            if self._current is not None and (rows is None or self._current in rows):
                self._current.sequence.cancel()

    def leave(self, row: Row) -> None:
        """Close the sequence."""
        assert isinstance(row, _Turn)
        self._order.remove(row)
        row.sequence.close()

    def close(self) -> None:
        """Close all sequences."""
        for turn in list(self._order):
            self.leave(turn)

    def memory(self) -> Memory:
        """Nothing is counted here."""
        return Memory()


class _Turn:
    """A sequence among others."""

    def __init__(self, sequence: Generation) -> None:
        self.sequence = sequence
        self.paused = False
        self.interrupted = False
        self.cached_tokens = 0

    @property
    def drafted_tokens(self) -> int:
        statistics = self.sequence.speculation
        return 0 if statistics is None else sum(one.drafted for one in statistics.drafters.values())

    @property
    def accepted_tokens(self) -> int:
        statistics = self.sequence.speculation
        return 0 if statistics is None else sum(one.accepted for one in statistics.drafters.values())
