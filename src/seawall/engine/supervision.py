"""A model that is made anew when its session dies, behind a breaker whose probe is the rebuilding itself."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar, cast

import anyio

from seawall.core import checks, events
from seawall.core.errors import Rejected
from seawall.core.events import Event, Listener
from seawall.core.pipeline import Pipeline
from seawall.core.scope import Permit
from seawall.engine.generations import Generation, Signal, start
from seawall.engine.losing import (
    ALIVE,
    DEAD,
    ModelLost,
    ModelRebuilt,
    ModelSuspected,
    RebuildError,
    RebuildFailed,
    SupervisedClosedError,
    suspicious,
)
from seawall.engine.rehearsal import Load, Test, loaded, passed, warm_up
from seawall.engine.standing_in import Closes, StandIn, relayed
from seawall.engine.worker import Worker
from seawall.inference.errors import RuntimeFailure
from seawall.policies.circuit_breaker import CircuitBreaker, CircuitOpenError, State, StateChanged, growing

T = TypeVar("T")
M = TypeVar("M", bound=Closes)

_NEVER = 1_000_000_000  # calls: no rate of failures opens the breaker, a death does
BACKOFF = growing(0.1, maximum=60.0)
_CALM = 60.0  # seconds that a rebuilt model has to live before its death counts as a first one


class Supervised(StandIn[M], Generic[M]):
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
        backoff: seconds before the nth attempt in a row, as a function of n.
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
        super().__init__(name, listeners)
        self.drain_timeout = checks.seconds("drain_timeout", drain_timeout, zero=True)
        self.test_interval = checks.seconds("test_interval", test_interval, zero=True)
        self.backoff = checks.function("backoff", backoff, of="the number of the attempt")
        self._load = load
        self._tests = [("warm_up", warm_up), ("self_test", self_test)]
        self._canary = self_test or warm_up
        self.breaker = CircuitBreaker(
            name,
            consecutive_failures=1,
            minimum_calls=_NEVER,
            on=(*DEAD, RebuildError),
            ignore=ALIVE,
            listeners=[self._hear],
        )
        pipeline = Pipeline(self.breaker, name=name)
        self._guarded: Callable[..., Awaitable[Any]] = pipeline(_asked)
        self._guarded_sync: Callable[..., Any] = pipeline(_asked_sync)
        self._guarded_stream: Callable[..., AsyncGenerator[Any, None]] = pipeline(_streamed)
        self._current: Generation[M] | None = None
        self._dead: Generation[M] | None = None  # lost, and not closed yet
        self._opened = self._opening = False
        self._stopping = Signal()
        self._rebuilding: threading.Thread | None = None
        self._testing = False
        self._tested_at = self._rebuilt_at = -float("inf")
        self._attempts = 0
        self._lost = self._rebuilt = self._failed = 0
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

    @property
    def closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._stopping.is_set

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
        return CircuitOpenError(self.name, self._wait())

    def _exit(self, generation: Generation[M], error: BaseException | None) -> None:
        with self._lock:
            generation.exit()
            now = self._now()
            if not isinstance(error, RuntimeFailure) or not suspicious(error):
                return
            idle = not self._testing and now >= self._tested_at + self.test_interval
            if not idle or generation is not self._current or self._canary is None:
                return
            self._testing = True
            self._emit(ModelSuspected, now, error)
        events.deliver()
        start(f"{self.name} self-test", self._test, generation)

    def _test(self, generation: Generation[M]) -> None:
        """In a thread: is the model to blame, or was it the input?"""
        try:
            anyio.run(self._pass, [("self_test", self._canary)], generation.model)
        except Rejected as refusal:  # by a policy of the model's own: that proves nothing
            events.logger.debug("the self-test of %r was refused: %s", self.name, refusal)
        except Exception as error:
            with self._lock:
                suspected = generation is self._current
            if suspected and not self.closed:
                with suppress(CircuitOpenError):  # it opened meanwhile
                    permit = self.breaker.admit()
                    permit.failure(_caused(RebuildError(f"the self-test of {self.name!r} failed: {error}"), error))
        finally:
            with self._lock:
                self._testing = False
                self._tested_at = self._now()

    def _hear(self, event: Event) -> None:
        """The breaker opened, whatever the reason: the model is lost, and a thread makes a new one."""
        if not isinstance(event, StateChanged) or event.after is not State.OPEN:
            return
        with self._lock:
            if self._busy or self.closed or not self._opened:
                return
            self._dead, self._current = self._current, None
            if event.at - self._rebuilt_at > _CALM:
                self._attempts = 0
            self._lost += 1
            self._emit(ModelLost, event.at, event.reason)
            self._make_anew(event.at)

    @property
    def _busy(self) -> bool:
        """Whether a thread makes a new model; after a fork none does."""
        return self._rebuilding is not None and self._rebuilding.is_alive()

    def _make_anew(self, since: float) -> None:
        with self._lock:
            if not self._busy:
                self._rebuilding = start(f"{self.name} rebuilds", self._rebuild, since)

    def _rebuild(self, since: float) -> None:
        """In a thread: close the dead model, then try until there is a new one."""
        dead, self._dead = self._dead, None
        if dead is not None:
            self._bury(dead)
        while not self.closed and not self._attempted(since):
            pass

    def _bury(self, dead: Generation[M]) -> None:
        with self._lock:
            dead.leave()
        dead.idle.wait_sync(self.drain_timeout)
        try:
            dead.model.close()
        except Exception:  # a dead session may not even close; what counts is the next one
            events.logger.exception("closing the lost model of %r failed", self.name)

    def _attempted(self, since: float) -> bool:
        """One attempt, after its wait. Whether there is a model again."""
        self._attempts += 1
        seconds = self._wait()
        if self.breaker.state is not State.ISOLATED:
            self.breaker.force_open(seconds)
        permit = self._permit()
        if permit is None:
            return True
        try:
            model = anyio.run(self._made)
        except Exception as error:
            self._failed += 1
            self._say(RebuildFailed, self._attempts, error)
            permit.failure(_caused(RebuildError(f"{self.name!r} could not be rebuilt: {error}"), error))
            return False
        except BaseException:
            permit.cancel()
            raise
        self._put(model)
        self._rebuilding = None  # before anybody can lose the new one
        permit.success()
        self._say(ModelRebuilt, self._attempts, self._now() - since)
        return True

    def _permit(self) -> Permit | None:
        """The breaker's probe, once it lets one through; None where this was closed before."""
        while not self.closed:
            try:
                return self.breaker.admit()
            except CircuitOpenError as refusal:  # no `retry_after`: isolated by hand
                wait = 1.0 if refusal.retry_after is None else max(0.001, refusal.retry_after)
            self._stopping.wait_sync(wait)
        return None

    def _wait(self) -> float:
        """Seconds before the attempt that is due; a millisecond at least, which the breaker needs to be open."""
        return max(0.001, events.ask(self.backoff, max(1, self._attempts), otherwise=60.0))

    async def _made(self) -> M:
        """A new model that passed."""
        worker = Worker(f"seawall-{self.name}-load")
        began = self._now()
        try:
            model = await loaded(worker, self._load)
            try:
                await self._pass(self._tests, model, worker)
            except BaseException:
                await worker.run(model.close)
                raise
            self.breaker.update(probe_timeout=max(1.0, 2 * (self._now() - began)))  # what `retry_after` says meanwhile
            return model
        finally:
            worker.stop()

    async def _pass(self, tests: Iterable[tuple[str, Test[M] | None]], model: M, worker: Worker | None = None) -> None:
        own = worker or Worker(f"seawall-{self.name}-test")
        try:
            for stage, test in tests:
                if test is not None:
                    await passed(own, self.name, stage, test, model)
        finally:
            if worker is None:
                own.stop()

    def _put(self, model: M) -> None:
        """It serves; or it is closed, where this was closed meanwhile."""
        with self._lock:
            closed = self.closed
            if not closed:
                self._current = Generation(model, self._rebuilt + 1)
                self._rebuilt += self._opened
                self._rebuilt_at = self._now()
        if closed:
            model.close()

    async def drain(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - ends no call
        """Take no more calls, and wait for those in flight; False if `timeout` seconds were too few."""
        generation = self._stop()
        return generation is None or await generation.idle.wait(float("inf") if timeout is None else timeout)

    def drain_sync(self, timeout: float | None = None) -> bool:
        """The same for a plain thread."""
        generation = self._stop()
        return generation is None or generation.idle.wait_sync(float("inf") if timeout is None else timeout)

    def close(self) -> None:
        """Close the model, and rebuild it no more; `drain` first spares the calls in flight.

        Blocks until they have ended, and until a load that is on its way has. Closing again does nothing.
        """
        generation = self._stop()
        rebuilding = self._rebuilding
        for one in (generation, self._dead):
            if one is not None:
                one.model.close()
        if rebuilding is not None and rebuilding is not threading.current_thread():
            rebuilding.join()

    def _stop(self) -> Generation[M] | None:
        with self._lock:
            self._stopping.set()
            if self._current is not None:
                self._current.leave()
            return self._current

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


def _caused(error: RebuildError, cause: Exception) -> RebuildError:
    error.__cause__ = cause
    return error
