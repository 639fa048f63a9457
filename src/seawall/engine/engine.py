"""The engine: prompts in, text out, behind policies."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import aclosing, closing
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack

import anyio
import anyio.to_thread

from seawall.core import answering, checks
from seawall.core.decorate import Policy
from seawall.core.errors import Rejected
from seawall.core.events import Listener
from seawall.core.pipeline import Pipeline
from seawall.engine import opening
from seawall.engine.admission import Admission
from seawall.engine.answers import Completion, Gathering, ModelInfo, Piece
from seawall.engine.asking import asked, read
from seawall.engine.errors import EngineClosedError, StepStuckError
from seawall.engine.generations import patience
from seawall.engine.metering import EngineMeter, EngineSnapshot
from seawall.engine.opening import Opening, looking_at
from seawall.engine.scheduler import Scheduler
from seawall.engine.settings import AnswerOptions, AnswerSettings, Prompt
from seawall.engine.worker import Worker, WorkerClosedError
from seawall.inference.errors import (
    DecoderClosedError,
    ForkedBackendError,
    InvalidSettingError,
    PromptError,
)
from seawall.policies.circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from seawall.inference.generate.decoder import Decoder
    from seawall.inference.generate.speculation import Speculation


class EngineOptions(TypedDict, total=False):
    """Settings of an engine as keywords, for what passes them on; see `Engine`."""

    policies: Iterable[Policy] | None
    rows: int
    cache_bytes: int | None
    prefix_cache_bytes: int
    max_queued: int
    max_queued_tokens: int
    max_wait: float
    aging: float
    step_timeout: float
    adjust: Callable[[AnswerSettings], AnswerSettings] | None
    listeners: Iterable[Listener]


class _Queue(TypedDict):
    max_queued: int
    max_queued_tokens: int
    max_wait: float
    aging: float


class Engine:
    """A language model embedded in this process, that answers many callers at once and holds under load.

    One thread advances up to `rows` answers together, a step at a time, so the event loop stays free and answers join
    and leave between steps. The others wait in a bounded queue: by priority (`seawall.priority`), fairly between
    tenants, earliest deadline (`Deadline`) first; a call that finds no place there, or whose deadline can't be met, is
    refused with a `Rejected`. A consumer that is cancelled, or stops reading, frees its row within one step; one that
    reads slowly slows its own answer only.

    Without `policies` of your own the engine is guarded by a circuit breaker. Time limits of whole calls are yours to
    set, with `Deadline`: then calls that would miss theirs are refused early.

    Args:
        load: makes the decoder, when the engine is opened.
        name: labels errors, metrics, threads and logs.
        policies: outermost first, around each call, instead of the usual ones; an empty tuple for none.
        rows: answers that advance together.
        cache_bytes: of key/value cache for them; None for what `rows` times `context` and the
            prefix cache take. Reserved, not filled.
        prefix_cache_bytes: for prompts whose beginning comes again; kept apart for each `tenant`.
        max_queued: answers that may wait beyond free rows.
        max_queued_tokens: tokens that may wait, of prompts and longest answers together.
        max_wait: seconds that one may wait.
        aging: seconds of waiting that are worth one level of priority; `math.inf` for none.
        step_timeout: seconds that one step may take before it is stopped, and repeated answer by answer.
        adjust: what becomes of the settings of a call before it queues, such as a shorter answer while the load is
            high. Runs in the caller's task; what it raises, the caller gets.
        listeners: called with its `CallRejected`, `StepStuck` and `AnswerShed` events.

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
        rows: int = 8,
        cache_bytes: int | None = None,
        prefix_cache_bytes: int = 128 << 20,
        max_queued: int = 64,
        max_queued_tokens: int = 65_536,
        max_wait: float = 30.0,
        aging: float = 5.0,
        step_timeout: float = 30.0,
        adjust: Callable[[AnswerSettings], AnswerSettings] | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        self.name = checks.name("model", name)
        self.policies = tuple(_default_policies(name) if policies is None else policies)
        self.rows = checks.count("rows", rows)
        self.cache_bytes = None if cache_bytes is None else checks.count("cache_bytes", cache_bytes)
        self.prefix_cache_bytes = checks.count("prefix_cache_bytes", prefix_cache_bytes, least=0)
        self.step_timeout = checks.seconds("step_timeout", step_timeout)
        self._queue: _Queue = {
            "max_queued": max_queued,
            "max_queued_tokens": max_queued_tokens,
            "max_wait": max_wait,
            "aging": aging,
        }
        Admission(name, rows=rows, **self._queue)  # refuses wrong settings now
        self._adjust = None if adjust is None else checks.function("adjust", adjust, of="AnswerSettings")
        self._load = checks.function("load", load)
        self._model: Opening | None = None
        self._changing = threading.RLock()  # re-entrant, for a finaliser may close the engine at any allocation
        self._meter = EngineMeter(name, listeners)
        self._guarded = Pipeline(*self.policies, name=f"{name}.generate")(_pieces)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        precision: str | None = None,
        kv: str | None = None,
        speculation: Speculation | Literal["auto"] | None = None,
        context: int = 2048,
        threads: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Callable[[str, float], None] | None = None,
        check_quality: bool = True,
        **settings: Unpack[EngineOptions],
    ) -> Engine:
        """An engine for `model`, which loads when it is opened: `async with Engine.load(...)`, or `await` it.

        Args:
            model: a name that `seawall models list` shows, the path of a GGUF file, or a prepared folder.
            precision: of the weights, one of `models.PRECISIONS`; None for the usual one, see `Decoder.load`.
            kv: of the key/value cache: "fp32", "int8", "int4", or None for the usual one; see `Decoder.load`.
            speculation: how to draft, or "auto"; answers come faster and stay the same. See `Decoder.load`.
            context: tokens of prompt and answer together, at most.
            threads: of a step; as many as affinity and the cgroup's quota allow unless told.
            cache_dir: where converted models are kept; `$SEAWALL_CACHE` or the user's cache folder unless told.
            progress: called with a stage and a fraction while a model is converted for the first time.
            check_quality: refuse a folder whose recorded scores are out of their gate's bounds.
            settings: those of `Engine`, by name: `rows`, `cache_bytes`, `max_queued`, `policies` ...

        Raises:
            ModelError: when it is opened: UnknownModelError, UnknownPrecisionError, ModelNotInstalledError,
                CorruptModelError, ModelCacheError, QualityGateError ...
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
                check_quality=check_quality,
            )

        return cls(load, name=Path(model).name, **settings)

    def _scheduling(self) -> Callable[[Decoder], Scheduler]:
        """What makes the scheduler of a loaded decoder. It does not hold the engine: one that is dropped closes."""
        name, meter, timeout, queue = self.name, self._meter, self.step_timeout, self._queue
        rows, cache_bytes, prefix_cache_bytes = self.rows, self.cache_bytes, self.prefix_cache_bytes

        def schedule(decoder: Decoder) -> Scheduler:
            stepper = opening.stepper_for(decoder, rows, cache_bytes, prefix_cache_bytes)
            return Scheduler(name, stepper, Admission(name, rows=rows, **queue), meter, step_timeout=timeout)

        return schedule

    async def open(self) -> Self:
        """Load the model, in the worker thread. All who open the engine meanwhile share the load, or its error."""
        with self._changing:
            if self._model is None or self._model.error is not None:
                self._model = Opening(self.name, self._load, self._scheduling())
            model = self._model
            model.openers += 1
        try:
            if not model.opened:
                await model.worker.run(model.load)
            with self._changing:
                if self._model is not model or model.scheduler is None:
                    raise WorkerClosedError
                model.opened = True
                self._meter.open(looking_at(model.scheduler))
        except WorkerClosedError:
            raise EngineClosedError(f"engine {self.name!r} was closed while it was opening") from None
        finally:
            self._leave(model)
        return self

    def _leave(self, model: Opening) -> None:
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
            self._meter.close()
        if model is not None and model.opened:  # else those who are opening it find it closed, and free it
            model.close()

    def __del__(self) -> None:
        model = getattr(self, "_model", None)  # no call is in flight, and nobody is opening: they would hold us
        if model is not None:
            model.worker.stop()
            model.free()
            warnings.warn(f"engine {self.name!r} was dropped without close", ResourceWarning, stacklevel=2, source=self)

    def stream(self, prompt: Prompt, **settings: Unpack[AnswerOptions]) -> AsyncGenerator[Piece, None]:
        """The answer to `prompt` (a text, or chat messages with `role` and `content`), piece by piece.

        Temperature 0, the default, is greedy: the same prompt gives the same answer. The policies hold for the whole
        stream.

        Args:
            prompt: a text or chat messages; with `chat=False` a text or token ids.
            settings: those of `AnswerSettings`, by name: `max_tokens`, `temperature`, `stop`, `n`, `tenant` ...

        Raises:
            PromptError: empty, too long or malformed prompt; a `ValueError`.
            InvalidSettingError: a setting outside its range; a `ValueError`.
            Rejected: a policy refused the call; or the engine's queue did: QueueFullError, QueueTimeoutError,
                DeadlineUnmeetableError; or it drains: EngineDrainingError.
            RuntimeFailure: the model failed: NotFiniteOutputError, RuntimeExhaustedError, StepStuckError ...
            EngineClosedError: the engine is not open.
        """
        return self._guarded(self, prompt, AnswerSettings(**settings))

    async def generate(self, prompt: Prompt, **settings: Unpack[AnswerOptions]) -> Completion:
        """The whole answer; settings and errors are those of `stream`. Of several samples, the first."""
        return (await self.generate_many(prompt, **settings))[0]

    async def generate_many(self, prompt: Prompt, **settings: Unpack[AnswerOptions]) -> list[Completion]:
        """`n` whole answers to one prompt; settings and errors are those of `stream`."""
        begun = time.monotonic()
        samples: dict[int, Gathering] = {}
        async with aclosing(self.stream(prompt, **settings)) as pieces:
            async for piece in pieces:
                samples.setdefault(piece.index, Gathering(begun)).add(piece, time.monotonic())
        return [samples[index].whole() for index in sorted(samples)]

    def info(self) -> ModelInfo:
        """What is served; EngineClosedError unless it is open."""
        decoder = self._running()[1]
        return ModelInfo(decoder.name, decoder.precision, decoder.kv, decoder.context, decoder.vocabulary)

    def snapshot(self) -> EngineSnapshot:
        """Queue, rows and cache at this moment, and what was counted so far; cheap, and from any thread."""
        return self._meter.snapshot()

    async def warm_up(self) -> None:
        """Answer one token, past the policies: what is made on first use is made, and the model is known to work."""
        async with aclosing(_pieces(self, "Hello", AnswerSettings(max_tokens=1))) as pieces:
            async for _ in pieces:
                pass

    async def drain(self, timeout: float | timedelta | None = None) -> bool:  # noqa: ASYNC109 - ends no call
        """Refuse new answers with `EngineDrainingError`; whether those in flight ended within `timeout` seconds.

        The engine stays open, and what has not ended goes on: `close` ends it.
        """
        until = time.monotonic() + patience(timeout)
        scheduler = self._running()[2]
        idle = scheduler.drain()
        while not await idle.wait(max(0.0, min(until - time.monotonic(), scheduler.patience))):
            if time.monotonic() >= until:
                return False
            with contextlib.suppress(StepStuckError):  # those in flight have ended with it
                scheduler.watch()
        return True

    def _running(self) -> tuple[Worker, Decoder, Scheduler]:
        model = self._model
        if model is None or not model.opened or model.decoder is None or model.scheduler is None:
            raise EngineClosedError(f"engine {self.name!r} is not open: use it inside `async with`")
        if os.getpid() != model.process:  # before anything is asked of its threads, which stayed in the parent
            raise ForkedBackendError(self.name, model.process, os.getpid())
        return model.worker, model.decoder, model.scheduler

    def __await__(self) -> Generator[Any, None, Self]:
        return self.open().__await__()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.close)  # it waits for a step to stop, and must not hold up the loop
        finally:
            self.close()  # cancelled before the thread began

    def __repr__(self) -> str:
        return f"<Engine {self.name!r} {'open' if self._model and self._model.opened else 'closed'}>"


async def _pieces(engine: Engine, prompt: Prompt, settings: AnswerSettings) -> AsyncGenerator[Piece, None]:
    """The answers of one call, in the caller's task, behind the policies. Not a method: the engine would be a cycle."""
    worker, decoder, scheduler = engine._running()
    if engine._adjust is not None:
        settings = engine._adjust(settings)
        if not isinstance(settings, AnswerSettings):
            raise TypeError(f"adjust must return AnswerSettings, got {settings!r}")
    with answering.watched(asked(engine.name, prompt, settings)) as answer, _translated(engine):
        tokens = await worker.run(lambda: read(decoder, prompt, settings))
        answer.read(len(tokens))
        with closing(scheduler.submit(tokens, settings, decoder.context - len(tokens))) as reader:
            left = settings.n
            while left:
                piece = await reader.next(scheduler.patience, scheduler.watch)
                left -= piece.finish_reason is not None
                answer.piece(piece.text, piece.finish_reason, piece.index)
                yield piece


@contextlib.contextmanager
def _translated(engine: Engine) -> Generator[None, None, None]:
    """Closing ends answers with one error, whatever it interrupts; refusals are counted, and told in this context."""
    try:
        yield
    except (WorkerClosedError, DecoderClosedError):
        raise EngineClosedError(f"engine {engine.name!r} was closed during this answer") from None
    except Rejected as error:
        engine._meter.refused(error)
        raise


def _default_policies(name: str) -> tuple[Policy, ...]:
    return (CircuitBreaker(name, ignore=(PromptError, InvalidSettingError, EngineClosedError)),)
