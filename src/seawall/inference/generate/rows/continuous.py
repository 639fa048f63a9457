"""Continuous batching: requests join and leave between steps, and each answers as if it were alone."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from seawall.inference.errors import DecoderClosedError, InvalidSettingError, NoRoomError
from seawall.inference.models.kv_cache import cache_dtype, cache_width
from seawall.inference.runtime import ort

from ..slot import CHUNK
from .memory import Layout
from .pool import Pool
from .prefix import PrefixStatistics
from .reading import ReadingPace
from .request import Request
from .row import Row, new_row
from .stepping import Advance, Stepping

if TYPE_CHECKING:
    from ..decoder import Decoder

_MOST_ROWS = 1024


class ContinuousBatch:
    """Answers many requests at once, on one decoder. For one thread at a time.

    A `step` is one bounded piece of work for all: a run that decodes a token of every row that has read its prompt,
    or verifies a draft of each where that pays, and a part of the prompt of one that has not, sized so that the others
    wait about as long again. A row's tokens are those that `Decoder.start` gives, whatever its neighbours do.

    Memory is promised when a request joins: the prompt and `max_tokens`, in whole pages. So a row that has joined never
    runs out. Beginnings of prompts stay in a cache, and rows share them.

    ```python
    from seawall.inference import Decoder, models
    from seawall.inference.generate.rows import ContinuousBatch, Request

    models.add("smollm2-135m")
    with Decoder.load("smollm2-135m", kv="int8") as decoder, ContinuousBatch(decoder, rows=4) as batch:
        questions = ["Why is the sea salty?", "Name three colours."]
        rows = [batch.join(Request(prompt=tuple(decoder.encode_chat(q)), max_tokens=8)) for q in questions]
        while batch.rows_in_use:
            for row, steps, error in batch.step():
                ...  # steps[i].text goes to whoever asked
        print([len(row.tokens) for row in rows])
    #> [8, 8]
    ```

    Args:
        decoder: the model. Closing it is yours; close the batch first.
        rows: most requests at once.
        cache_bytes: most bytes of key/value cache, of rows and of kept prompts together; None for what `rows`
            of the decoder's whole context and the prefix cache can come to need.
        prefix_cache_bytes: most bytes of prompts that are kept for later ones; 0 keeps none.
        prefill_chunk: tokens of a prompt that are read beside a run of decoding, 4 to 256; None lets measured pace
            decide.

    Raises InvalidSettingError, DecoderClosedError, or RuntimeFailure if the trial runs of `Decoder.exactness` fail.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: int = 8,
        cache_bytes: int | None = None,
        prefix_cache_bytes: int = 128 << 20,
        prefill_chunk: int | None = None,
    ) -> None:
        layout = _layout(decoder)
        page_bytes = layout.page_tokens * layout.token_bytes
        _whole("rows", rows, 1, _MOST_ROWS)
        _whole("cache_bytes", page_bytes if cache_bytes is None else cache_bytes, page_bytes)
        _whole("prefix_cache_bytes", prefix_cache_bytes, 0)
        _whole("prefill_chunk", 4 if prefill_chunk is None else prefill_chunk, 4, CHUNK)
        exactness = decoder.exactness()
        self._kind = exactness.kind
        exact = exactness.kind != "none"
        self.decoder = decoder
        self.rows = rows
        self._pool = Pool(
            layout,
            rows=rows,
            context=decoder.context,
            budget=cache_bytes,
            prefix_bytes=prefix_cache_bytes if exact else 0,
            bitwise=self._kind == "bitwise",
        )
        self._stepping = Stepping(decoder, self._pool, exactness, ReadingPace(prefill_chunk if exact else CHUNK))
        self._joined = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def active(self) -> tuple[Row, ...]:
        """The rows in use, in no particular order."""
        return self._stepping.active

    @property
    def rows_in_use(self) -> int:
        """Requests that have joined, and neither ended nor left."""
        return len(self.active)

    @property
    def cache_bytes(self) -> int:
        """Most bytes of key/value cache, of rows and of kept prompts together."""
        return self._pool.budget

    @property
    def promised_bytes(self) -> int:
        """Bytes of `cache_bytes` that are spoken for: what rows may come to need, and the kept prompts."""
        return self._pool.promised(self.active)

    @property
    def committed_bytes(self) -> int:
        """Bytes that the system holds for rows: whole pages; what they share counts once."""
        return self._pool.memory.committed_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of those that hold tokens."""
        return self._pool.memory.used_bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes of the kept prompts, those included that rows share."""
        return self._pool.prefix.bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that the system holds for rows and kept prompts together, each counted once."""
        return self._pool.held()

    @property
    def prefix(self) -> PrefixStatistics:
        """What the prefix cache did and holds."""
        return self._pool.prefix.statistics()

    @property
    def last_run(self) -> tuple[Row, ...]:
        """The rows of the run that was tried last: after a failure, those to shed one of."""
        return self._stepping.last_run

    def could_fit(self, request: Request) -> bool:
        """Whether a request can join at all, once nobody else is there. Raises as `join` does for a wrong prompt."""
        self._check_prompt(request)
        return self._pool.needs(request) * self.decoder.cache_bytes_per_token <= self.cache_bytes

    def fits(self, request: Request) -> bool:
        """Whether a request can join now. Raises as `join` does for a wrong prompt."""
        self._check()
        self._check_prompt(request)
        found = self._pool.prefix.find(self._pool.names(request))
        return self._stepping.free is not None and self._pool.lacks(request, found, self.active) <= 0

    def join(self, request: Request) -> Row:
        """Give a request a row; nothing is computed before the next `step`.

        A request whose prompt another row is just reading waits for it, and begins with what that one has read. So
        samples of one prompt are requests that differ in their seed.

        Raises NoRoomError, EmptyPromptError, PromptTooLongError, InvalidPromptError, InvalidSettingError (of which
        ConstraintError is one), or DecoderClosedError.
        """
        self._check()
        self._check_prompt(request)
        names = self._pool.names(request)
        found = self._pool.prefix.find(names)
        if (index := self._stepping.free) is None:
            raise NoRoomError(self._pool.needs(request) * self.decoder.cache_bytes_per_token, None, self.rows)
        self._pool.make_room(request, found, self.active)
        row = new_row(request, self.decoder, index=index, number=self._joined, kind=self._kind)
        self._joined += 1
        row.names = names
        self._pool.adopt(row, found)  # before it is one of the rows, for the system may refuse
        self._stepping.add(row)
        return row

    def leave(self, row: Row) -> None:
        """Let a request go, wherever it stands; one that has ended already has left by itself.

        Raises InvalidSettingError for a row of another batch.
        """
        self._stepping.leave(row)

    def step(self, options: ort.RunOptions | None = None) -> list[Advance]:
        """Decode every row that has read its prompt, and read a part of another's; what came of it, by row.

        A row that finished, or failed, has left by then. Setting `terminate` on `options`, which are good for one
        step, stops it from another thread.

        Raises GenerationCancelledError, RuntimeFailure or DecoderClosedError. Rows are then as they were before the run
        that failed, and the next step tries again; what other rows got before it comes with that one.
        """
        self._check()
        return self._stepping.step(ort.run_options() if options is None else options)

    def close(self) -> None:
        """Let all rows go, and all memory; twice changes nothing."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as everything:  # whatever a drafter raises while it closes, all rows go
            everything.callback(self._stepping.close)
            everything.callback(self._pool.prefix.clear)
            for row in self.active:
                everything.callback(self.leave, row)

    def _check(self) -> None:
        if self._closed or self.decoder._session is None:
            raise DecoderClosedError("this batch, or its decoder, is closed: make a new one")

    def _check_prompt(self, request: Request) -> None:
        self.decoder._checked_prompt(request.prompt, self.decoder.context - 1)


def _layout(decoder: Decoder) -> Layout:
    config = decoder._config
    width = cache_width(decoder.kv, config["head_size"])
    return Layout(config["layers"], config["kv_heads"], width, cache_dtype(decoder.kv))


def _whole(name: str, value: int, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        rule = f"of at least {least:,}" if most is None else f"from {least} to {most:,}"
        raise InvalidSettingError(f"{name} must be a whole number {rule}, got {value!r}")
