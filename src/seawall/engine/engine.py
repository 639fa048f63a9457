"""The engine: prompts in, text out, behind policies."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import aclosing, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import anyio
import anyio.to_thread

from seawall.core import answering
from seawall.core.decorate import Policy
from seawall.core.pipeline import Pipeline
from seawall.engine.worker import Worker, WorkerClosedError
from seawall.inference.errors import DecoderClosedError, InvalidSettingError, ModelError, PromptError
from seawall.policies.bulkhead import Bulkhead
from seawall.policies.circuit_breaker import CircuitBreaker
from seawall.policies.timeout import Timeout

if TYPE_CHECKING:
    from seawall.inference.generate.decoder import Decoder
    from seawall.inference.generate.sampling import Greedy, Sampling
    from seawall.inference.generate.speculation import Speculation

Prompt = str | Seq[Mapping[str, str]]


class EngineClosedError(ModelError):
    """The engine was closed, or has not been opened: use it inside `async with`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to the answer. `text` may be empty while a character is still incomplete."""

    text: str
    token: int | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. Times are seconds; `tokens_per_second` counts the tokens after the first."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    time_to_first_token: float
    tokens_per_second: float

    def __str__(self) -> str:
        return self.text


class _Model:
    """What one opening makes and one closing ends: a thread, and the decoder it loads for all who wait for it."""

    def __init__(self, name: str, load: Callable[[], Decoder]) -> None:
        self.worker = Worker(f"seawall-{name}")
        self.decoder: Decoder | None = None
        self.error: BaseException | None = None
        self.openers = 0
        self.opened = False  # somebody got it, so it stays until the engine is closed
        self._load = load

    def load(self) -> None:
        """In the worker thread, once for each opener: the first loads, the others hear what became of that."""
        if self.decoder is None and self.error is None:
            try:
                self.decoder = self._load()
            except BaseException as error:
                self.error = error
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End the thread, then free the decoder."""
        self.worker.close()
        self.free()

    def free(self) -> None:
        """Let go of the decoder; never blocks."""
        self.error = None  # its traceback holds this object
        decoder, self.decoder = self.decoder, None
        if decoder is not None:
            decoder.close()


class Engine:
    """A language model embedded in this process, behind policies.

    Steps run in one worker thread and those of concurrent calls take turns, so the event loop stays free and a
    short answer need not wait for a long one. A consumer that is cancelled, or stops reading, stops the decoding
    within one step and gives its cache back. A consumer that reads slowly slows its own decoding only.

    Without `policies` of your own the engine is guarded by a circuit breaker, a bulkhead (4 calls at once, 32
    queued for up to 30 s) and a timeout of 30 s for each piece.

    Examples:
        >>> async def main():
        ...     async with Engine.load("smollm2-135m") as engine:
        ...         async for piece in engine.stream("Why is the sea salty?"):
        ...             print(piece.text, end="")
    """

    def __init__(
        self,
        load: Callable[[], Decoder],
        *,
        name: str = "engine",
        policies: Iterable[Policy] | None = None,
    ) -> None:
        self.name = name
        self.policies = tuple(_default_policies(name) if policies is None else policies)
        self._load = load
        self._model: _Model | None = None
        self._changing = threading.Lock()
        self._guarded = Pipeline(*self.policies, name=f"{name}.generate")(_steps)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        precision: str | None = None,
        kv: str = "fp32",
        speculation: Speculation | Literal["auto"] | None = None,
        context: int = 2048,
        threads: int | None = None,
        policies: Iterable[Policy] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> Engine:
        """An engine for `model`, which loads when it is opened: `async with Engine.load(...)`, or `await` it.

        Args:
            model: a name that `seawall models list` shows, the path of a GGUF file, or a prepared folder.
            precision: of the weights, one of `models.PRECISIONS`; None for "int8", or for what a folder holds.
            kv: of the key/value cache: "fp32", "int8" or "int4"; see `Decoder.load`.
            speculation: how to draft, or "auto"; answers come faster and stay the same. See `Decoder.load`.
            context: tokens of prompt and answer together, at most.
            threads: of a step; as many as affinity and the cgroup's quota allow unless told.
            policies: outermost first, instead of the usual ones; an empty tuple for none.
            cache_dir: where converted models are kept; `$SEAWALL_CACHE` or the user's cache folder unless told.
            progress: called with a stage and a fraction while a model is converted for the first time.

        Raises:
            ModelError: when it is opened: UnknownModelError, UnknownPrecisionError, ModelNotInstalledError,
                CorruptModelError, ModelCacheError ...
            MissingExtraError: if the `cpu` extra is not installed.
        """

        def load() -> Decoder:
            from seawall.inference.generate.decoder import Decoder

            return Decoder.load(
                model,
                precision=precision,
                kv=kv,
                speculation=speculation,
                threads=threads,
                context=context,
                cache_dir=cache_dir,
                progress=progress,
            )

        return cls(load, name=Path(model).name, policies=policies)

    async def open(self) -> Self:
        """Load the model, in the worker thread. All who open the engine meanwhile share the load, or its error."""
        with self._changing:
            if self._model is None or self._model.error is not None:
                self._model = _Model(self.name, self._load)
            model = self._model
            model.openers += 1
        try:
            if not model.opened:
                await model.worker.run(model.load)
            with self._changing:
                if self._model is not model:
                    raise WorkerClosedError
                model.opened = True
        except WorkerClosedError:
            raise EngineClosedError(f"engine {self.name!r} was closed while it was opening") from None
        finally:
            self._leave(model)
        return self

    def _leave(self, model: _Model) -> None:
        """An opener is done. The last one frees what nobody wants: all of them failed, or the engine was closed."""
        with self._changing:
            model.openers -= 1
            unwanted = model.openers == 0 and not (model.opened and self._model is model)
            if unwanted and self._model is model:
                self._model = None
        if unwanted:
            model.close()

    def close(self) -> None:
        """Free the model. Calls in flight end with `EngineClosedError` at their next step."""
        with self._changing:
            model, self._model = self._model, None
        if model is not None and model.opened:  # else those who are opening it find it closed, and free it
            model.close()

    def __del__(self) -> None:
        model = getattr(self, "_model", None)  # no call is in flight, and nobody is opening: they would hold us
        if model is not None:
            model.worker.stop()
            model.free()
            warnings.warn(f"engine {self.name!r} was dropped without close", ResourceWarning, stacklevel=2, source=self)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Seq[str] = (),
    ) -> AsyncGenerator[Piece, None]:
        """The answer to `prompt` (a text, or chat messages with `role` and `content`), piece by piece.

        Temperature 0 is greedy: the same prompt gives the same answer. The policies hold for the whole stream.

        Raises:
            PromptError: empty, too long or malformed prompt; a `ValueError`.
            Rejected: a policy refused the call.
            CallTimeoutError: a piece took too long.
            EngineClosedError: the engine is not open.
        """
        return self._guarded(self, prompt, max_tokens, _sampling(temperature, top_k, top_p, min_p, seed), tuple(stop))

    async def generate(self, prompt: Prompt, **settings: Any) -> Completion:
        """The whole answer; settings and errors are those of `stream`."""
        begun = first = time.monotonic()
        text: list[str] = []
        tokens: list[int] = []
        reason = "stop"
        async with aclosing(self.stream(prompt, **settings)) as pieces:
            async for piece in pieces:
                if piece.token is not None:
                    tokens.append(piece.token)
                    first = time.monotonic() if len(tokens) == 1 else first
                text.append(piece.text)
                reason = piece.finish_reason or reason
        seconds = time.monotonic() - first
        rate = (len(tokens) - 1) / seconds if len(tokens) > 1 and seconds > 0 else 0.0
        return Completion("".join(text), tuple(tokens), reason, first - begun, rate)

    def _running(self) -> tuple[Worker, Decoder]:
        model = self._model
        decoder = model.decoder if model is not None and model.opened else None
        if model is None or decoder is None:
            raise EngineClosedError(f"engine {self.name!r} is not open: use it inside `async with`")
        return model.worker, decoder

    def __await__(self) -> Generator[Any, None, Self]:
        return self.open().__await__()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(
                    self.close
                )  # the step in flight ends first, and must not hold up the loop
        finally:
            self.close()  # cancelled before the thread began

    def __repr__(self) -> str:
        return f"<Engine {self.name!r} {'open' if self._model and self._model.opened else 'closed'}>"


async def _steps(
    engine: Engine, prompt: Prompt, max_tokens: int, sampling: Greedy | Sampling, stop: tuple[str, ...]
) -> AsyncGenerator[Piece, None]:
    """One answer, in the caller's task, behind the policies. Not a method: the engine would be a cycle."""
    worker, decoder = engine._running()
    with answering.watched(_asked(engine.name, prompt, max_tokens, sampling)) as answer:
        try:
            tokens = await worker.run(lambda: decoder.encode_chat(prompt))
            answer.read(len(tokens))
            with closing(decoder.start(tokens, max_tokens=max_tokens, sampling=sampling, stop=stop)) as sequence:
                finished = False
                while not finished:
                    step = await worker.run(sequence.step, sequence.cancel)
                    finished = step is None or step.finish is not None
                    if step is not None and step.token is not None:
                        answer.piece(step.text, step.finish)
                        yield Piece(step.text, step.token, step.finish)
        except (WorkerClosedError, DecoderClosedError):
            raise EngineClosedError(f"engine {engine.name!r} was closed during this answer") from None


def _asked(name: str, prompt: Prompt, max_tokens: int, sampling: Greedy | Sampling) -> answering.Asked:
    from seawall.inference.generate.sampling import Sampling

    if isinstance(sampling, Sampling):
        return answering.Asked(name, prompt, max_tokens, sampling.temperature, sampling.top_p, sampling.seed)
    return answering.Asked(name, prompt, max_tokens)


def _default_policies(name: str) -> tuple[Policy, ...]:
    return (
        CircuitBreaker(name, ignore=(PromptError, InvalidSettingError, EngineClosedError)),
        Bulkhead(name, max_concurrent=4, max_queued=32, max_wait=30.0),
        Timeout(name, 30.0),
    )


def _sampling(temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None) -> Greedy | Sampling:
    from seawall.inference.generate.sampling import Greedy, Sampling

    if temperature == 0:
        return Greedy()
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
