"""Texts to vectors: tokens, batches of similar length, one run each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio.to_thread
import numpy as np

from seawall.inference.errors import (
    CorruptModelError,
    InvalidPromptError,
    InvalidSettingError,
    RunDeadlineError,
    TextTooLongError,
)
from seawall.inference.models.cache import MANIFEST, read_verified
from seawall.inference.models.convert import PreparedModel, prepare
from seawall.inference.models.encoder import KIND
from seawall.inference.models.tokenizer import FILE, load_tokenizer
from seawall.inference.runtime.backend import Backend
from seawall.inference.runtime.batching.batcher import MicroBatcher
from seawall.inference.runtime.batching.padding import Padding
from seawall.inference.runtime.calls import seconds_of
from seawall.inference.runtime.closing import Closing
from seawall.inference.runtime.providers import CPU, Provider

from .planning import batches, bucket, buckets

Array = np.ndarray[Any, Any]
Text = str | Sequence[int]  # or its tokens
Watch = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
MAX_CHARACTERS = 65_536  # up to 0.1 s of tokenizing; a text of 512 tokens has a few thousand
OUTPUT = "sentence_embedding"
_MOST_ROWS = 64  # of a run: more of them are no faster, and the trial takes longer
_SAMPLES = ("Why is the sea salty?", "salt")  # to try sharing on
_INLINE = 4096  # characters that are tokenized on the event loop: about 1 ms


class Embedder(Closing):
    """A sentence encoder in this process: vectors whose dot product says how alike two texts are.

    For any number of tasks, event loops and threads at once. Made by `load`; close it, or use it in a `with`
    or `async with`.

    Attributes:
        name: the model's name.
        dimension: length of a vector.
        max_tokens: longest text that it takes, its two marks included.
        backend: what runs the model; its `report()` says how.
        batcher: joins texts of several callers in front of it; None without `share`.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Any,
        *,
        name: str,
        max_tokens: int,
        truncate: bool,
        batch_tokens: int,
        share: bool,
        max_delay: float | timedelta,
        watch: Watch | None = None,
    ) -> None:
        self.backend = backend
        self.name = name
        self.dimension = int(next(port.shape[-1] for port in backend.outputs if port.name == OUTPUT) or 0)
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._truncate = truncate
        self._watch = watch
        self._batch_tokens = max(batch_tokens, max_tokens)
        self._most_rows = min(batch_tokens, _MOST_ROWS)
        self._vocabulary = int(tokenizer.get_vocab_size())
        marks = tokenizer.encode("").ids
        if len(marks) < 2:
            raise CorruptModelError(name, "its tokenizer puts no marks around a text")
        self._marks = (int(marks[0]), int(marks[-1]))
        self.batcher = self._batching(max_delay) if share else None

    def _batching(self, max_delay: float | timedelta) -> MicroBatcher:
        padding = Padding({"input_ids": 0}, buckets=buckets(self.max_tokens), mask="attention_mask")
        return MicroBatcher(
            self.backend,
            max_size=self._most_rows,
            max_delay=max_delay,
            max_tokens=self._batch_tokens,
            padding=padding,
            samples=[{"input_ids": np.array([self._encode(text)[: self.max_tokens]])} for text in _SAMPLES],
        )

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] = "all-minilm-l6-v2",
        *,
        max_tokens: int | None = None,
        truncate: bool = False,
        batch_tokens: int = 1024,
        share: bool = True,
        max_delay: float | timedelta = 0.002,
        providers: Sequence[Provider] = (CPU,),
        threads: int | None = None,
        memory_limit: int | None = None,
        workers: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        watch: Watch | None = None,
    ) -> Self:
        """Load an encoder; blocks. Nothing is downloaded: `models.add` does that.

        Args:
            model: a name in the catalogue, a folder in sentence-transformers' layout (BERT with mean or CLS pooling),
                or a folder that `prepare` or `quantize_model` made.
            max_tokens: longest text, its two marks included. None for what the model was trained on.
            truncate: cut longer texts in silence, as other libraries do, instead of raising TextTooLongError.
            batch_tokens: most tokens, padding included, in one run. Memory grows with it, speed hardly does.
            share: let texts of several callers share runs, which is tried out first; see `MicroBatcher`.
            max_delay: seconds that a call waits for others while one is running; see `MicroBatcher`.
            providers: as in `Backend.load`, and so are `threads`, `memory_limit` and `workers`.
            threads: threads of a run.
            memory_limit: most bytes of weights and runs.
            workers: runs of coroutines at once.
            cache_dir: where converted models are kept; None for the usual cache folder.
            watch: gives, of the model's name and dimension, a context manager for each call, whose value is told the
                tokens of all texts: `seawall.telemetry.embeddings`. It must not raise.

        Raises:
            DependentRowsError: texts that share a run influence each other; `share=False` loads it all the same.
            ModelError: what `models.prepare` and `Backend.load` raise, or InvalidSettingError.
        """
        prepared = _prepared(model, cache_dir)
        limit = _checked_limit(prepared, max_tokens)
        if type(batch_tokens) is not int or batch_tokens < 1:
            raise InvalidSettingError(f"batch_tokens must be a whole number, at least 1, got {batch_tokens!r}")
        tokenizer = load_tokenizer(prepared.folder / FILE)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "[SEP]" in a text is five characters, and no mark
        backend = Backend.load(
            prepared.folder,
            providers=providers,
            threads=threads,
            memory_limit=memory_limit,
            workers=workers,
            outputs=(OUTPUT,),
            finite=True,
        )
        try:
            return cls(
                backend,
                tokenizer,
                name=str(prepared.facts.get("model", prepared.folder.name)),
                max_tokens=limit,
                truncate=truncate,
                batch_tokens=batch_tokens,
                share=share,
                max_delay=max_delay,
                watch=watch,
            )
        except BaseException:
            backend.close()
            raise

    def embed_sync(self, texts: Sequence[Text], *, deadline: float | timedelta | None = None) -> Array:
        """Vectors of the texts, float32 [texts, dimension], each of length 1 if the model says so.

        A text's vector depends on its neighbours by rounding alone: 9e-8 in any component was measured.

        Args:
            texts: any number of texts, or of lists of tokens; an empty one has a vector as well.
            deadline: seconds for all of them.

        Raises:
            InvalidPromptError: `texts` is a single str, or holds something that is no text.
            TextTooLongError: a text has more than `max_tokens` tokens and `truncate` is off, or is longer than
                65,536 characters. Nothing was run.
            RunDeadlineError: the deadline passed first.
            ModelError: what `Backend.run_sync` raises.
        """
        clock = _Countdown(deadline)
        with self._watched() as told:
            texts = _listed(texts)
            tokens = self._tokens(texts)
            told(sum(map(len, tokens)))
            vectors = np.empty((len(tokens), self.dimension), np.float32)
            for group in self._groups(tokens):
                with clock:
                    outputs = self._asked.run_sync(_padded([tokens[index] for index in group]), deadline=clock.left())
                vectors[group] = outputs[OUTPUT]
        return vectors

    async def embed(self, texts: Sequence[Text], *, deadline: float | timedelta | None = None) -> Array:
        """`embed_sync` in a worker thread, on asyncio and trio.

        Who is cancelled leaves at once; a run that nobody else shares ends within one node.
        """
        clock = _Countdown(deadline)
        with self._watched() as told:
            texts = _listed(texts)
            if sum(map(len, filter(_is_text, texts))) > _INLINE:
                tokens = await anyio.to_thread.run_sync(self._tokens, texts)
            else:
                tokens = self._tokens(texts)
            told(sum(map(len, tokens)))
            vectors = np.empty((len(tokens), self.dimension), np.float32)
            for group in self._groups(tokens):
                with clock:
                    outputs = await self._asked.run(_padded([tokens[index] for index in group]), deadline=clock.left())
                vectors[group] = outputs[OUTPUT]
        return vectors

    def encode(self, text: str | Sequence[int]) -> list[int]:
        """The tokens that a text is run as, its two marks included: cut where `truncate` says so, or TextTooLongError.

        Tokens may be given instead of a text; the marks are added where they are missing.
        """
        return self._fitting(self._encode(text) if isinstance(text, str) else self._marked(text))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, its two marks included, before anything is cut; TextTooLongError past 65,536 characters."""
        return len(self._encode(text))

    def warm_up(self) -> float:
        """Embed a text, and give the seconds that took."""
        start = time.perf_counter()
        self.embed_sync([_SAMPLES[0]])
        return time.perf_counter() - start

    def drain(self, timeout: float | timedelta | None = None) -> bool:
        """Take no more texts, and wait for those in flight; see `Backend.drain`."""
        return self._asked.drain(timeout)

    def close(self) -> None:
        """Let the model go; see `Backend.close`."""
        if self.batcher is not None:
            self.batcher.close()
        self.backend.close()

    @property
    def closed(self) -> bool:
        """Whether it takes no more texts."""
        return self._asked.closed

    @property
    def _asked(self) -> Backend | MicroBatcher:
        return self.backend if self.batcher is None else self.batcher

    def _watched(self) -> AbstractContextManager[Callable[[int], object]]:
        return nullcontext(_nobody) if self._watch is None else self._watch(self.name, self.dimension)

    def _groups(self, tokens: list[list[int]]) -> Iterator[list[int]]:
        lengths = [len(text) if self.batcher is None else bucket(len(text), self.max_tokens) for text in tokens]
        return batches(lengths, max_rows=self._most_rows, max_tokens=self._batch_tokens)

    def _tokens(self, texts: Sequence[Text]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def _marked(self, tokens: Sequence[int]) -> list[int]:
        if not isinstance(tokens, (list, tuple)):
            raise InvalidPromptError(f"a text must be a str or a list of its tokens, got {type(tokens).__name__}")
        for token in tokens:
            if type(token) is not int or not 0 <= token < self._vocabulary:
                raise InvalidPromptError(f"a token must be from 0 to {self._vocabulary - 1}, got {token!r}")
        first, last = self._marks
        return [
            *([] if tokens and tokens[0] == first else [first]),
            *tokens,
            *([] if tokens and tokens[-1] == last else [last]),
        ]

    def _encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise InvalidPromptError(f"a text must be a str, got {type(text).__name__}")
        if len(text) > MAX_CHARACTERS:
            raise TextTooLongError(len(text), MAX_CHARACTERS, "characters")
        try:
            ids: list[int] = self._tokenizer.encode(text).ids
        except TypeError as error:  # half of a surrogate pair
            raise InvalidPromptError("a text holds what is no Unicode character") from error
        return ids

    def _fitting(self, tokens: list[int]) -> list[int]:
        if len(tokens) <= self.max_tokens:
            return tokens
        if not self._truncate:
            raise TextTooLongError(len(tokens), self.max_tokens, "tokens")
        return [*tokens[: self.max_tokens - 1], tokens[-1]]  # the closing mark stays


class _Countdown:
    """What is left of a deadline that several runs share."""

    def __init__(self, deadline: float | timedelta | None) -> None:
        self._total = None if deadline is None else seconds_of(deadline)
        self._end = None if self._total is None else time.monotonic() + self._total

    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RunDeadlineError) and self._total is not None:
            raise RunDeadlineError(self._total) from None  # the caller's number, not what one run had left


def _padded(rows: list[list[int]]) -> dict[str, Array]:
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _listed(texts: object) -> list[Any]:
    """The texts, read once: an iterator gives them once."""
    if isinstance(texts, str):
        raise InvalidPromptError("texts must be a sequence of str, got a single str: put it into a list")
    if not isinstance(texts, Iterable):
        raise InvalidPromptError(f"texts must be a sequence of str, got {type(texts).__name__}")
    return list(texts)


def _nobody(tokens: int) -> None:
    """Is told where nobody watches."""


def _is_text(text: object) -> bool:
    return isinstance(text, str)


def _prepared(model: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> PreparedModel:
    folder = Path(model)
    if (folder / MANIFEST).is_file():
        facts = read_verified(folder)
        if facts is None:
            raise CorruptModelError(folder, "its files do not match its manifest")
        prepared = PreparedModel(folder, facts)
    else:
        prepared = prepare(model, cache_dir=cache_dir)
    if prepared.facts.get("kind") != KIND:
        raise InvalidSettingError(
            f"model must be a sentence encoder such as 'all-minilm-l6-v2', got {os.fspath(model)!r}"
        )
    return prepared


def _checked_limit(prepared: PreparedModel, max_tokens: int | None) -> int:
    try:
        trained, positions = prepared.facts["max_tokens"], prepared.facts["config"]["positions"]
    except (KeyError, TypeError) as error:
        raise CorruptModelError(prepared.folder, "its manifest does not say how long a text may be") from error
    limit = trained if max_tokens is None else max_tokens
    if type(limit) is not int or not 3 <= limit <= positions:
        raise InvalidSettingError(f"max_tokens must be a whole number from 3 to {positions}, got {limit!r}")
    return limit
