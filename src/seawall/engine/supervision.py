"""A model that is made anew when its session dies, behind a breaker whose probe is the rebuilding itself."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar, cast

import anyio

from seawall.core import checks, events
from seawall.core.errors import Rejected
from seawall.core.events import Listener
from seawall.core.pipeline import Pipeline
from seawall.engine.generations import Generation, patience, start
from seawall.engine.losing import (
    ModelSuspected,
    RebuildError,
    SupervisedClosedError,
    suspicious,
)
from seawall.engine.rebuilding import Rebuilding, caused
from seawall.engine.rehearsal import Load, Rehearsal, Test, warm_up
from seawall.engine.standing_in import Closes, relayed
from seawall.inference.errors import RuntimeFailure
from seawall.policies.circuit_breaker import CircuitOpenError, growing

T = TypeVar("T")
M = TypeVar("M", bound=Closes)

BACKOFF = growing(0.1, maximum=60.0)


class Supervised(Rebuilding[M], Generic[M]):
    """Serves a model, and makes it anew when it dies. Ask it as you would the model.

    Dead is a model whose device or provider failed, that was closed behind its users' back, or that crossed a fork.
    One that answers with NaN (`NotFiniteOutputError`), or fails in a way that its input may be to blame for, is
    suspected: its self-test runs while it serves on, and only where that fails is it dead, so no input makes it
    reload. While there is no model its breaker is open: calls are refused with `CircuitOpenError` and `retry_after`,
    or go to the spare of a `Failover`. A thread closes the dead one, waits, and makes the breaker's probe: load, warm
    up, self-test. Each failure doubles the wait, shortened by a random share, so that a fleet does not reload at once.

    There is never more than one model in memory.

    Args:
        name: labels events, metrics, threads and the breaker.
        load: makes the model, first when it is opened. An engine may be returned unopened. `async` ones run on a loop
            of their own when a model is rebuilt.
        warm_up: given a new model; its own `warm_up()` unless told, None for nothing.
        self_test: given a new model, or a suspected one: raises or answers False where it will not do. `warm_up` is
            the test where there is none.
        backoff: seconds before the nth attempt in a row, as a function of n; a minute where that gives none.
        drain_timeout: seconds that calls in flight on a dead model may go on, before it is closed under them.
        test_interval: seconds between two tests of a suspected model, at least.
        listeners: called with its `ModelSuspected`, `ModelLost`, `ModelRebuilt` and `RebuildFailed` events.

    Attributes:
        breaker: what refuses calls meanwhile. `breaker.force_open()` has the model rebuilt by hand.

    ```python
    import asyncio

    import numpy as np
    from onnx.parser import parse_model

    from seawall.engine import Supervised
    from seawall.inference import Backend

    text = '<ir_version: 10, opset_import: ["" : 21]> double (float[n] x) => (float[n] y) { y = Add(x, x) }'
    model = parse_model(text).SerializeToString()


    async def main():
        async with Supervised("scores", lambda: Backend.load(model, finite=True)) as scores:
            print(await scores.run({"x": np.array([1, 2], np.float32)}), scores.breaker.state)


    asyncio.run(main())
    #> {'y': array([2., 4.], dtype=float32)} State.CLOSED
    ```
    """

    kind = "supervisor"

    def __init__(
        self,
        name: str,
        load: Load[M],
        *,
        warm_up: Test[M] | None = warm_up,
        self_test: Test[M] | None = None,
        backoff: Callable[[int], float] = BACKOFF,
        drain_timeout: float | timedelta = 5.0,
        test_interval: float | timedelta = 1.0,
        listeners: Iterable[Listener] = (),
    ) -> None:
        rehearsal = Rehearsal(name, load, warm_up=warm_up, self_test=self_test)
        super().__init__(name, rehearsal, backoff=backoff, drain_timeout=drain_timeout, listeners=listeners)
        self.test_interval = checks.seconds("test_interval", test_interval, zero=True)
        pipeline = Pipeline(self.breaker, name=name)
        self._guarded: Callable[..., Awaitable[Any]] = pipeline(_asked)
        self._guarded_sync: Callable[..., Any] = pipeline(_asked_sync)
        self._guarded_stream: Callable[..., AsyncGenerator[Any, None]] = pipeline(_streamed)
        self._opening = False
        self._testing = False
        self._tested_at = -float("inf")
        self._register()

    async def open(self) -> Self:
        """Load the first model; raises what that raises. `async with` does it."""
        with self._lock:
            if self._opened:
                return self
            if self._opening or self.closed:
                raise SupervisedClosedError(
                    f"{self.name!r} {'was closed' if self.closed else 'is being opened already'}"
                )
            self._opening = True
        try:
            self._put(await self._made())
            self._opened = True
        finally:
            self._opening = False
        return self

    def open_sync(self) -> Self:
        """The same for a plain thread; `with` does it."""
        return anyio.run(self.open)

    @property
    def model(self) -> M:
        """The model that serves now: to look at. Ask this, since a model may be closed behind its back."""
        generation = self._current
        if generation is None:
            raise self._absent()
        return generation.model

    async def call(self, ask: Callable[[M], Awaitable[T]]) -> T:
        """What the model answers to `ask`; CircuitOpenError while there is none."""
        return cast(T, await self._guarded(self, ask))

    def call_sync(self, ask: Callable[[M], T]) -> T:
        """The same for a plain thread."""
        return cast(T, self._guarded_sync(self, ask))

    def iterate(self, ask: Callable[[M], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """The same for a stream."""
        return self._guarded_stream(self, ask)

    def _enter(self) -> Generation[M]:
        with self._lock:
            generation = self._current
            if generation is not None and not self.closed:
                generation.enter()
                return generation
        raise self._absent()

    def _absent(self) -> Exception:
        if self.closed or not self._opened:
            return SupervisedClosedError(f"{self.name!r} is not open: use it inside `async with`")
        with suppress(RuntimeError):  # the system has no thread to give: the next call tries again
            self._make_anew(self._now())
        return CircuitOpenError(self.name, self._pause)

    def _exit(self, generation: Generation[M], error: BaseException | None) -> None:
        with self._lock:
            generation.exit()
            now = self._now()
            if not isinstance(error, RuntimeFailure) or not suspicious(error):
                return
            idle = not self._testing and now >= self._tested_at + self.test_interval
            if not idle or generation is not self._current or self._rehearsal.canary is None:
                return
            self._testing = True
            self._emit(ModelSuspected, now, error)
        events.deliver()
        try:
            start(f"{self.name} self-test", self._test, generation)
        except RuntimeError:  # the system has no thread to give: the next such call tries again
            self._testing = False

    def _test(self, generation: Generation[M]) -> None:
        """In a thread: is the model to blame, or was it the input?"""
        try:
            anyio.run(self._rehearsal.retest, generation.model)
        except Rejected as refusal:  # by a policy of the model's own: that proves nothing
            events.logger.debug("the self-test of %r was refused: %s", self.name, refusal)
        except Exception as error:
            with self._lock:
                suspected = generation is self._current
            if suspected and not self.closed:
                with suppress(CircuitOpenError):  # it opened meanwhile
                    permit = self.breaker.admit()
                    permit.failure(caused(RebuildError(f"the self-test of {self.name!r} failed: {error}"), error))
        finally:
            with self._lock:
                self._testing = False
                self._tested_at = self._now()

    async def drain(self, timeout: float | timedelta | None = None) -> bool:  # noqa: ASYNC109 - ends no call
        """Take no more calls, and wait for those in flight; False if `timeout` seconds were too few."""
        seconds, generation = patience(timeout), self._stop()
        return generation is None or await generation.idle.wait(seconds)

    def drain_sync(self, timeout: float | timedelta | None = None) -> bool:
        """The same for a plain thread."""
        seconds, generation = patience(timeout), self._stop()
        return generation is None or generation.idle.wait_sync(seconds)

    def close(self) -> None:
        """Close the model, and rebuild it no more; `drain` first spares the calls in flight.

        Blocks until they have ended, and until a load that is on its way has. Closing again does nothing.
        """
        generation = self._stop()
        rebuilding = self._rebuilding
        with ExitStack() as rest:  # which an error of one leaves to be done
            if rebuilding is not None and rebuilding is not threading.current_thread():
                rest.callback(rebuilding.join)
            for one in (self._dead, generation):
                if one is not None:
                    rest.callback(one.model.close)

    def counters(self) -> dict[str, int]:
        """Models lost, rebuilt, and attempts that failed. Calls are counted by the breaker."""
        return {"lost": self._lost, "rebuilt": self._rebuilt, "failed": self._failed}

    def gauges(self) -> dict[str, float]:
        """Whether there is a model, and calls in flight on it."""
        with self._lock:
            generation = self._current
            return {
                "serving": float(generation is not None and not self.closed),
                "active": 0 if generation is None else generation.calls,
            }

    def __enter__(self) -> Self:
        return self.open_sync()

    async def __aenter__(self) -> Self:
        return await self.open()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "serving" if self._current is not None else "without a model"
        return f"<Supervised {self.name!r}, {state}>"


async def _asked(supervised: Supervised[M], ask: Callable[[M], Awaitable[T]]) -> T:
    generation = supervised._enter()
    try:
        answer = await ask(generation.model)
    except BaseException as error:
        supervised._exit(generation, error)
        raise
    supervised._exit(generation, None)
    return answer


def _asked_sync(supervised: Supervised[M], ask: Callable[[M], T]) -> T:
    generation = supervised._enter()
    try:
        answer = ask(generation.model)
    except BaseException as error:
        supervised._exit(generation, error)
        raise
    supervised._exit(generation, None)
    return answer


async def _streamed(supervised: Supervised[M], ask: Callable[[M], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    generation = supervised._enter()
    try:
        async for item in relayed(ask(generation.model)):
            yield item
    except BaseException as error:
        supervised._exit(generation, error)
        raise
    supervised._exit(generation, None)
