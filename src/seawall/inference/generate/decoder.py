"""A loaded model that answers prompts. Synchronous, and safe to use from any thread."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np

from seawall.inference.errors import (
    DecoderClosedError,
    EmptyPromptError,
    InvalidPromptError,
    InvalidSettingError,
    PromptTooLongError,
)
from seawall.inference.models.chat import ChatTemplate, Message, checked_messages
from seawall.inference.models.convert import PreparedModel, open_prepared, prepare
from seawall.inference.models.fetch import Progress
from seawall.inference.models.kv_cache import CACHES, cache_dtype, cache_width
from seawall.inference.models.tokenizer import TextCodec
from seawall.inference.quality import manifest
from seawall.inference.runtime import ort
from seawall.inference.runtime.threads import available_threads

from .batch import Batch, memory_of
from .choosing import Chooser, Penalties
from .constraints import Constraint, Vocabulary
from .exactness import SHARED, StepExactness, probe
from .loading import as_folder, checked_config, open_decoder
from .report import DecoderReport
from .sampling import Greedy, Sampling
from .sequence import Sequence
from .slot import Slot
from .speculation.costs import Pace
from .speculation.drafter import Drafting
from .speculation.model import ModelDraft
from .speculation.ngram import NGram
from .speculation.settings import Speculation, resolved
from .speculation.starting import begin
from .speculation.target import measure
from .text import checked_stops

_KEPT_SLOTS = 4  # free caches kept for reuse; more would hold the memory of a burst for ever
_MEASURED = 64  # tokens per piece of `logits`


class Decoder:
    """A language model in this process.

    `load` blocks while it reads, and the first time converts, the model: call it in a worker thread where
    an event loop runs. One decoder serves many sequences; their steps may run in several threads at once,
    but they share one pool of threads, so turns are as fast.

    ```python
    from seawall.inference import Decoder, models

    models.add("smollm2-135m")
    with Decoder.load("smollm2-135m") as decoder:
        prompt = decoder.encode_chat("Why is the sea salty?")
        with decoder.start(prompt, max_tokens=8) as answer:
            text = "".join(step.text for step in answer)
    print(text)
    #> The sea is salty because it contains a
    ```

    Attributes:
        folder: where its files are.
        name: the model's name.
        precision: how its weights are stored.
        kv: how its key/value cache is stored.
        context: most tokens of one sequence, prompt and answer together.
        threads: threads that a step uses, the caller's own included.
    """

    def __init__(
        self, model: PreparedModel, *, threads: int | None = None, context: int = 2048, kv: str = "fp32"
    ) -> None:
        config = checked_config(model)
        threads = available_threads() if threads is None else threads
        if type(threads) is not int or not 1 <= threads <= 1024:
            raise InvalidSettingError(f"threads must be a whole number from 1 to 1024, got {threads!r}")
        if type(context) is not int or not 2 <= context <= config["context"]:
            raise InvalidSettingError(
                f"context must be a whole number from 2 to {config['context']} (the model's), got {context!r}"
            )
        if kv not in CACHES:
            raise InvalidSettingError(
                f"kv must be one of {', '.join(CACHES)}, got {kv!r}; 8-bit floats have no attention kernel on the CPU, "
                "and int8 takes as many bytes and loses less"
            )
        self.folder = model.folder
        self.name: str = model.facts["model"]
        self.precision: str = model.facts["precision"]
        self.kv = kv
        self.context = context
        self.threads = threads
        self._config = config
        self._ends = frozenset(model.facts["end_tokens"])
        self._codec = TextCodec(model.folder / "tokenizer.json")
        self._template = ChatTemplate(model.facts["chat_template"], self._codec)
        self._words = Vocabulary(
            size=int(model.facts["config"]["vocabulary"]),
            ends=self._ends,
            bytes_of=self._codec.bytes_of,
            encode=self._codec.encode_verbatim,
        )
        loaded = open_decoder(model, threads=threads, kv=kv, codec=self._codec, template=self._template)
        self._session: Any = loaded.session
        self._report = DecoderReport.of(self, loaded)
        self._exactness: StepExactness | None = None
        self._paces: dict[bool, Pace] = {}
        self._speculation: Speculation | None = None
        self._draft: Decoder | None = None
        # Reentrant: a forgotten sequence may be collected, and give its slot back, while it is held.
        self._lock = threading.RLock()
        self._free: list[Slot] = []
        self._lent = 0
        self._active: weakref.WeakSet[Sequence] = weakref.WeakSet()

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        precision: str | None = None,
        threads: int | None = None,
        context: int = 2048,
        kv: str | None = None,
        speculation: Speculation | Literal["auto"] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        check_quality: bool = True,
    ) -> Decoder:
        """Load a model by its name in the catalogue, from a GGUF file, or from a prepared folder.

        The first load of a name or a GGUF file converts it, which takes seconds; later ones verify the converted files
        by digest, and convert again what is damaged. A folder, such as `quantize_model` makes, is verified
        and never changed. Nothing is downloaded: `models.add` does that.

        Args:
            name_or_path: such as "smollm2-135m".
            precision: one of `models.PRECISIONS`; None for what a folder holds, "int4" for a file of 4-bit blocks,
                which are taken over without loss, and "int8-block32" for any other.
            threads: None for as many as affinity and CPU quota allow.
            context: most tokens of one sequence; its cache is reserved up front, and touched as it fills.
            kv: how the key/value cache is stored: "fp32", "int8" (a quarter of the bytes, hardly any loss, and runs
                of any number of tokens give the same logits) or "int4" (an eighth, lossy). The first load with a
                quantized cache measures its scales, for a second or two. None for "fp32", or "int8" where speculation
                is "auto" and the weights are quantized: exactness costs them a quarter of a pass over a float cache.
            speculation: what `start` uses unless told otherwise. "auto" drafts from the text itself, and for fp32 from
                the same model in its usual precision as well, which is loaded beside it.
            cache_dir: None for `$SEAWALL_CACHE`, or the user's cache folder.
            progress: called with a stage and a fraction while converting.
            check_quality: refuse a folder whose recorded scores are out of their gate's bounds; see `quality.record`.

        Raises:
            QualityGateError: the model was measured, and found worse than its gate allows.
            ModelError: UnknownModelError, UnknownPrecisionError, ModelNotInstalledError,
                CorruptModelError, ModelCacheError, InvalidSettingError or RuntimeFailure.
            MissingExtraError: a package of the `cpu` extra is not installed.
        """
        usual = resolved(None if speculation == "auto" else speculation, None)
        if (folder := as_folder(name_or_path)) is None:
            model = prepare(name_or_path, precision=precision, cache_dir=cache_dir, progress=progress)
        else:
            model = open_prepared(folder)
            if precision not in (None, found := model.facts.get("precision")):
                raise InvalidSettingError(f"precision is {precision!r}, but {folder} holds {found!r}: leave it out")
        if check_quality:
            manifest.check(model.facts, str(model.folder))
        if kv is None:
            kv = "int8" if speculation == "auto" and model.facts.get("precision") != "fp32" else "fp32"
        decoder = cls(model, threads=threads, context=context, kv=kv)
        if speculation != "auto":
            decoder._speculation = usual
        elif decoder.precision != "fp32" or folder is not None:
            decoder._speculation = Speculation()
        else:
            decoder._draft = cls.load(
                name_or_path, threads=threads, context=context, cache_dir=cache_dir, progress=progress
            )
            decoder._speculation = Speculation(drafters=(NGram(), ModelDraft(decoder=decoder._draft)))
        return decoder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def active_sequences(self) -> int:
        """Sequences that hold a cache: started, and neither closed nor collected."""
        return self._lent

    @property
    def speculation(self) -> Speculation | None:
        """How `start` drafts unless told otherwise; None for not at all."""
        return self._speculation

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows; ids run from 0 to one less."""
        return int(self._config["vocabulary"])

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._ends

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of key/value cache that one token of a sequence fills."""
        config = self._config
        vector = cache_width(self.kv, config["head_size"]) * cache_dtype(self.kv).itemsize
        return int(config["layers"] * 2 * config["kv_heads"] * vector)

    def batch(self, rows: int, memory: np.ndarray[Any, Any] | None = None) -> Batch:
        """A way to run up to `rows` sequences in one call, each with its own past; the floor that engines build on.

        `memory` holds their caches, [layers, 2, rows, kv_heads, positions, width] of the cache's type; None takes
        room for `context` tokens a row, touched as it fills. Raises InvalidSettingError or DecoderClosedError.
        """
        with self._lock:
            if self._session is None:
                raise DecoderClosedError("this decoder is closed: load it again")
            session = self._session
        return Batch(session, self._config, memory_of(self._config, self.kv, rows, self.context, memory))

    def exactness(self) -> StepExactness:
        """Whether a token's logits depend on how many tokens share its run: tried out once, in about a second.

        Raises DecoderClosedError, or RuntimeFailure if ONNX Runtime fails.
        """
        if self._exactness is None:
            slot = self._lend()
            try:
                memory = memory_of(self._config, self.kv, 3, min(SHARED, self.context), None)
                batch = Batch(slot.session, self._config, memory)
                self._exactness = probe(slot, batch, self.vocabulary, self.context)
            finally:
                self._take_back(slot)
        return self._exactness

    def pace(self, *, padded: bool = False) -> Pace:
        """Seconds of short passes, which speculation plans with: timed once, in a quarter of a second.

        `padded` is for single tokens that run as two. Raises like `exactness`.
        """
        if padded not in self._paces:
            slot = self._lend()
            try:
                self._paces[padded] = measure(slot, padded=padded, context=self.context)
            finally:
                self._take_back(slot)
        return self._paces[padded]

    def report(self) -> DecoderReport:
        """What this decoder really runs; `exactness` is in it once it was asked for."""
        return replace(self._report, exactness=self._exactness)

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain text: no template around it, and nothing in it acts as a control token."""
        if not isinstance(text, str):
            raise InvalidPromptError(f"a text is a str, got {type(text).__name__}")
        self._refuse_hopeless(text)
        return self._codec.encode_verbatim(text)

    def encode_chat(self, messages: str | Seq[Message]) -> list[int]:
        """Tokens of a conversation in the form that the model was trained on; a str is one user message.

        Control tokens come from the template alone: a message that spells one out cannot end its own turn.
        """
        checked = checked_messages(messages)
        for message in checked:
            self._refuse_hopeless(message["content"])
        return self._template.encode(checked)

    def decode(self, tokens: Seq[int]) -> str:
        """The text of a list of tokens, control tokens left out."""
        return self._codec.decode(tokens)

    def start(
        self,
        prompt_tokens: Seq[int],
        *,
        max_tokens: int,
        sampling: Greedy | Sampling = Greedy(),  # noqa: B008 - frozen
        stop: Seq[str] = (),
        penalties: Penalties | None = None,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        speculation: Speculation | Literal[False] | None = None,
    ) -> Sequence:
        """Begin to answer a prompt; nothing is computed before the first `step`.

        With `speculation` drafts are verified several at a time, which changes how fast the answer comes and not
        what it says; None does as the decoder was loaded, False goes without. The first such sequence of a decoder
        measures it, for a second or so.

        With a `constraint`, such as `JsonSchema(...)`, only tokens are chosen that it allows. With `logprobs`, 0 to 20,
        each step says how likely the model thought its token, and that many others.

        The answer ends at an end token of the model, before a stop string, after `max_tokens`, or where the
        context is full. Raises EmptyPromptError, PromptTooLongError, InvalidPromptError, InvalidSettingError,
        of which ConstraintError is one, or DecoderClosedError.
        """
        prompt = self._checked_prompt(prompt_tokens, self.context - 1)
        if type(max_tokens) is not int or max_tokens < 1:
            raise InvalidSettingError(f"max_tokens must be a whole number of at least 1, got {max_tokens!r}")
        stop = checked_stops(stop)
        chooser = Chooser(sampling, penalties, prompt, vocabulary=self._words, constraint=constraint, logprobs=logprobs)
        held: list[Drafting] = []
        drafts = resolved(speculation, self._speculation)
        speculate = begin(self, drafts, chooser, prompt, held.append) if drafts else None
        sequence = Sequence(
            self._lend(),
            self._take_back,
            self._codec,
            prompt,
            limit=min(max_tokens, self.context - len(prompt)),
            ends=self._ends,
            chooser=chooser,
            stop=stop,
            speculate=speculate,
            held=held,
        )
        with self._lock:
            self._active.add(sequence)
        if self._session is None:  # closed meanwhile: whoever closed it could not see this one
            sequence.close()
        return sequence

    def prepare(self, constraint: Constraint) -> None:
        """Compile a constraint, in any thread; else the first answer under it does, which keeps others waiting."""
        constraint.matcher(self._words)

    def logits(self, tokens: Seq[int]) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        """Logits after each token of a text, [tokens, vocabulary], in pieces of at most 64 tokens (12 MB).

        For measuring, not for answering. The text may fill the whole context. Raises like `start`.
        """
        text = self._checked_prompt(tokens, self.context)
        slot = self._lend()
        try:
            for start in range(0, len(text), _MEASURED):
                yield slot.run_all(text[start : start + _MEASURED], start, ort.run_options())
        finally:
            self._take_back(slot)

    def close(self) -> None:
        """Close every sequence and let the model go; a running step stops first, in its own thread."""
        with self._lock:
            self._session, active = None, list(self._active)
            self._free.clear()
        for sequence in active:
            sequence.close()
        if self._draft is not None:
            self._draft.close()

    def _refuse_hopeless(self, text: str) -> None:
        """Refuse a text that cannot fit before spending seconds on encoding it."""
        if (fewest := self._codec.fewest_tokens(text)) > self.context:
            raise PromptTooLongError(fewest, self.context - 1)

    def _checked_prompt(self, tokens: Seq[int], limit: int) -> list[int]:
        if isinstance(tokens, (str, bytes)):
            raise InvalidPromptError("a prompt is a list of tokens: encode the text with encode_chat or encode")
        prompt = list(tokens)
        if not prompt:
            raise EmptyPromptError
        if len(prompt) > limit:
            raise PromptTooLongError(len(prompt), limit)
        for token in prompt:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise InvalidPromptError(
                    f"token {token!r} is not one of the model's: an int from 0 to {self.vocabulary - 1}"
                )
        return prompt

    def _lend(self) -> Slot:
        with self._lock:
            if self._session is None:
                raise DecoderClosedError("this decoder is closed: load it again")
            slot = self._free.pop() if self._free else Slot(self._session, self._config, self.context, self.kv)
            self._lent += 1
            return slot

    def _take_back(self, slot: Slot) -> None:
        with self._lock:
            self._lent -= 1
            if self._session is not None and len(self._free) < _KEPT_SLOTS:
                self._free.append(slot)
