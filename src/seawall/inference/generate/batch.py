"""Several sequences in one run, each with its own past and its own number of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from seawall.inference.errors import InvalidSettingError
from seawall.inference.models.kv_cache import cache_dtype, cache_width
from seawall.inference.runtime import ort

from .slot import CHUNK, Array, lazy_zeros, takes_query_seqlens

_MOST_ROWS = 1024


class Part(NamedTuple):
    """What one row of a batch does in a run.

    Attributes:
        row: which one.
        tokens: what is appended, 1 to 256 of them.
        length: tokens in its cache before; a smaller number than the last run left goes back.
        padding: tokens computed after them that nobody asks about, so that a single token runs as several do.
    """

    row: int
    tokens: Sequence[int]
    length: int
    padding: int = 0

    @property
    def width(self) -> int:
        """Tokens that it takes room for."""
        return len(self.tokens) + self.padding


class Batch:
    """Runs rows of one memory together. For one thread at a time; `Decoder.batch` makes it.

    A run takes the rows up to the highest that is named; those between that are not named idle, and keep their
    caches. Every row, idle ones too, is computed for as many tokens as the longest part has, so let parts of one
    run have about the same number: one each, or a few drafted ones. Where ONNX Runtime is older than 1.32, parts
    of several tokens run one after the other.

    A row's logits are those it gets alone, whatever the others do: bit for bit over an 8-bit cache. Over a float one
    that holds for parts of two tokens and more; single tokens are bit-equal among each other, and have
    bits of their own in a run with longer parts.

    Attributes:
        memory: [layers, 2, rows, kv_heads, positions, width], written in place.
    """

    def __init__(self, session: ort.Session, config: dict[str, Any], memory: Array) -> None:
        self.memory = memory
        self._session = session
        self._vocabulary: int = config["vocabulary"]
        self._ragged = takes_query_seqlens(session)
        self._bindings: dict[tuple[int, int], Any] = {}

    @property
    def rows(self) -> int:
        """Sequences that it has room for."""
        return int(self.memory.shape[2])

    @property
    def ragged(self) -> bool:
        """Whether rows of several tokens share a run; before ONNX Runtime 1.32 they run one after the other."""
        return self._ragged

    @property
    def positions(self) -> int:
        """Tokens that a row has room for."""
        return int(self.memory.shape[4])

    def run(self, parts: Sequence[Part], options: ort.RunOptions | None = None) -> list[Array]:
        """Append each part's tokens to its row; the logits after the last of them, [vocabulary] for each part.

        Setting `terminate` on `options`, which are good for one run, stops it from another thread. Raises
        InvalidSettingError for parts that no run can do, GenerationCancelledError, or RuntimeFailure.
        """
        return [logits[0] for logits in self._run(parts, options or ort.run_options(), every=False)]

    def run_all(self, parts: Sequence[Part], options: ort.RunOptions | None = None) -> list[Array]:
        """Like `run`, with the logits after every token, [tokens, vocabulary] for each part."""
        return self._run(parts, options or ort.run_options(), every=True)

    def _run(self, parts: Sequence[Part], options: ort.RunOptions, *, every: bool) -> list[Array]:
        self._check(parts)
        longest = max(part.width for part in parts)
        together: list[Part] = []
        alone: list[Part] = []
        for part in parts:  # the kernel wants room for the longest part in every row
            (together if part.length + longest <= self.positions else alone).append(part)
        if not self._fits_one_run(together):
            together, alone = [], list(parts)
        found: dict[int, Array] = {}
        if together:
            found |= self._call(0, 1 + max(part.row for part in together), together, options, every=every)
        for part in alone:
            found |= self._call(part.row, part.row + 1, [part], options, every=every)
        return [found[part.row] for part in parts]

    def _fits_one_run(self, parts: Sequence[Part]) -> bool:
        if len(parts) < 2 or self._ragged:
            return len(parts) > 1
        rows = sorted(part.row for part in parts)
        return rows == list(range(len(rows))) and all(part.width == 1 for part in parts)

    def _check(self, parts: Sequence[Part]) -> None:
        if not parts or len({part.row for part in parts}) != len(parts):
            raise InvalidSettingError(f"a run needs parts of different rows, got rows {[part.row for part in parts]}")
        for part in parts:
            if not 0 <= part.row < self.rows:
                raise InvalidSettingError(f"row must be from 0 to {self.rows - 1}, got {part.row}")
            if not 1 <= len(part.tokens) <= CHUNK:
                raise InvalidSettingError(f"a part has 1 to {CHUNK} tokens, got {len(part.tokens)} for row {part.row}")
            if part.padding < 0 or part.length < 0 or part.length + part.width > self.positions:
                raise InvalidSettingError(
                    f"row {part.row} has room for {self.positions} tokens, got {part.width} more after {part.length}"
                )

    def _call(
        self, first: int, stop: int, parts: Sequence[Part], options: ort.RunOptions, *, every: bool
    ) -> dict[int, Array]:
        """One run over the rows `first` to `stop`."""
        rows, longest = stop - first, max(part.width for part in parts)
        ids = np.zeros((rows, longest), np.int64)
        totals = np.ones(rows, np.int32)  # an idle row pretends to hold one token, and to add none
        counts = np.zeros(rows, np.int32)
        wanted: list[int] = []
        for part in parts:
            row, count = part.row - first, len(part.tokens)
            ids[row, :count] = part.tokens
            totals[row], counts[row] = part.length + part.width, part.width
            wanted += range(row * longest + (0 if every else count - 1), row * longest + count)
        logits = np.empty((len(wanted), self._vocabulary), np.float32)
        feeds: dict[str, Array] = {
            "input_ids": ids,
            "seqlens_k": totals - 1,
            "total_len": np.array(totals.max(), np.int32),
            "logit_rows": np.array(wanted, np.int64),
        }
        if self._ragged:
            feeds["query_seqlens"] = counts
        binding = self._binding(first, stop)
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.shared_value(array))
        binding.bind_ortvalue_output("logits", ort.shared_value(logits))
        ort.run(self._session, binding, options)
        ends = np.cumsum([len(part.tokens) if every else 1 for part in parts])[:-1]
        return dict(zip((part.row for part in parts), np.split(logits, ends), strict=True))

    def _binding(self, first: int, stop: int) -> Any:
        """The caches of some rows, bound as input and output; kept, for binding takes as long as a tenth of a step."""
        if (first, stop) not in self._bindings:
            binding = self._session.io_binding()
            for layer in range(len(self.memory)):
                for part, name in enumerate("kv"):
                    value = ort.shared_value(self.memory[layer, part, first:stop])
                    binding.bind_ortvalue_input(f"past.{layer}.{name}", value)
                    binding.bind_ortvalue_output(f"present.{layer}.{name}", value)
            self._bindings[first, stop] = binding
        return self._bindings[first, stop]


def memory_of(config: dict[str, Any], kv: str, rows: int, positions: int, given: Array | None) -> Array:
    """Caches for `rows` sequences: those that are given, once their form is known to fit, or new ones."""
    if type(rows) is not int or not 1 <= rows <= _MOST_ROWS:
        raise InvalidSettingError(f"rows must be a whole number from 1 to {_MOST_ROWS}, got {rows!r}")
    dtype, width = cache_dtype(kv), cache_width(kv, config["head_size"])
    shape = (config["layers"], 2, rows, config["kv_heads"])
    if given is None:
        return lazy_zeros((*shape, positions, width), dtype)
    if given.ndim != 6 or given.shape[:4] != shape or given.shape[5] != width:
        fits = False
    else:
        fits = given.dtype == dtype and given.flags.c_contiguous
    if not fits:
        raise InvalidSettingError(
            f"memory must be contiguous {dtype} [{', '.join(map(str, shape))}, positions, {width}], "
            f"got {given.dtype} {list(given.shape)}"
        )
    return given
