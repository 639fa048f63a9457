"""The memory of one sequence: its key/value cache and the buffers of a run, bound once and reused."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np

from seawall.inference.models.kv_cache import cache_dtype, cache_width
from seawall.inference.runtime import ort

Array = np.ndarray[Any, Any]
CHUNK = 256  # tokens of a prompt per step: long enough for full speed, short enough to take turns
_BLOCK = 16  # divides the blocks of attention kernels, whatever the size of a head


def part_length(left: int, most: int = CHUNK) -> int:
    """How many of the `left` unread tokens of a prompt to read next, at most `most`, which is 4 or more.

    A single token goes through other kernels than several, with other last bits, and so does a token that is alone in a
    block of the attention kernel: blocks are twice the size of a head, so 129 tokens are 128 and a single one. Parts
    avoid both, and thus a prompt of two tokens or more comes to the same bits in whatever parts it is read.
    """
    if left == 1:
        return 1
    return next(size for size in range(min(left, most), 0, -1) if size % _BLOCK != 1 and left - size != 1)


class Slot:
    """Key/value cache for `context` tokens, bound to a session both as input and as output.

    ONNX Runtime reads and writes these arrays in place, so a run copies nothing, and going back to an
    earlier length is only a smaller number. Memory is touched, and counted by the system, as it fills.

    Attributes:
        session: runs it.
        cache: [layers, 2, 1, kv_heads, context, width], stored as `kv` says; another slot's, where that was given.
    """

    def __init__(
        self, session: ort.Session, config: dict[str, Any], context: int, kv: str = "fp32", cache: Array | None = None
    ) -> None:
        self.session = session
        layers, kv_heads, width = config["layers"], config["kv_heads"], cache_width(kv, config["head_size"])
        self.cache = lazy_zeros((layers, 2, 1, kv_heads, context, width), cache_dtype(kv)) if cache is None else cache
        self._tokens = np.zeros((1, CHUNK), dtype=np.int64)
        self._last = np.zeros(1, dtype=np.int32)
        self._total = np.zeros((), dtype=np.int32)
        self._row = np.zeros(1, dtype=np.int64)
        self._logits = np.zeros((1, config["vocabulary"]), dtype=np.float32)
        self._token = np.zeros((1, 1), dtype=np.int64)
        self._token_value = ort.shared_value(self._token)
        self._row_value = ort.shared_value(self._row)
        self._logits_value = ort.shared_value(self._logits)
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("seqlens_k", ort.shared_value(self._last))
        self._binding.bind_ortvalue_input("total_len", ort.shared_value(self._total))
        self._count = np.zeros(1, dtype=np.int32)
        if takes_query_seqlens(session):
            self._binding.bind_ortvalue_input("query_seqlens", ort.shared_value(self._count))
        for layer in range(layers):
            for part, name in enumerate("kv"):
                value = ort.shared_value(self.cache[layer, part])
                self._binding.bind_ortvalue_input(f"past.{layer}.{name}", value)
                self._binding.bind_ortvalue_output(f"present.{layer}.{name}", value)
        self._bound = 0

    def run(self, tokens: list[int], length: int, options: ort.RunOptions) -> Array:
        """Append at most CHUNK tokens to a cache of `length`; logits after the last of them.

        The array is overwritten by the next run.
        """
        count = len(tokens)
        if count == 1:
            self._token[0, 0] = tokens[0]
        else:
            self._tokens[0, :count] = tokens
        if count != self._bound:
            self._bind(count)
        self._row[0] = count - 1
        self._place(length, count)
        ort.run(self.session, self._binding, options)
        row: Array = self._logits[0]
        return row

    def run_all(self, tokens: list[int], length: int, options: ort.RunOptions) -> Array:
        """Like `run`, with the logits after every token: a new array [tokens, vocabulary], large."""
        count = len(tokens)
        logits = np.empty((count, self._logits.shape[1]), dtype=np.float32)
        self._tokens[0, :count] = tokens
        self._bind(count, np.arange(count, dtype=np.int64), logits)
        self._place(length, count)
        try:
            ort.run(self.session, self._binding, options)
        finally:
            self._bound = 0  # the next run binds its own buffers again
        return logits

    def _place(self, length: int, count: int) -> None:
        self._last[0] = length + count - 1
        self._total[()] = length + count
        self._count[0] = count

    def _bind(self, count: int, rows: Array | None = None, logits: Array | None = None) -> None:
        one = count == 1 and rows is None
        ids = self._token_value if one else ort.shared_value(self._tokens[:, :count])
        self._binding.bind_ortvalue_input("input_ids", ids)
        wanted = self._row_value if rows is None else ort.shared_value(rows)
        self._binding.bind_ortvalue_input("logit_rows", wanted)
        result = self._logits_value if logits is None else ort.shared_value(logits)
        self._binding.bind_ortvalue_output("logits", result)
        self._bound = count


def takes_query_seqlens(session: ort.Session) -> bool:
    """Whether a graph has the input that tells real tokens of a row from padding."""
    return any(port.name == "query_seqlens" for port in session.get_inputs())


def lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros whose memory is taken 4 KiB at a time, as it is written.

    With huge pages the first token would touch every one of them: 90 MB and 40 ms for 2,048 positions,
    because each head of each layer has a stretch of its own.
    """
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)
