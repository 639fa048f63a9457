"""Calls on models that change underneath: counted, ended by the model that began them, rescued while one is new."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import ExitStack
from datetime import timedelta
from typing import Generic, TypeVar

from seawall.core.events import Listener
from seawall.engine.generations import Generation, Tally, patience
from seawall.engine.rehearsal import checked_model
from seawall.engine.shadowing import Mirror
from seawall.engine.standing_in import Closes, StandIn, relayed
from seawall.engine.swapping import DeploymentClosedError
from seawall.engine.trial import Trial

T = TypeVar("T")
M = TypeVar("M", bound=Closes)


class Traffic(StandIn[M], Generic[M]):
    """The half of a `Deployment` that answers: whoever replaces the model sets `_current`, `_trial` and `_mirror`."""

    def __init__(self, name: str, model: M, listeners: Iterable[Listener] = ()) -> None:
        super().__init__(name, listeners)
        self._current: Generation[M] = Generation(checked_model("model", model), 1)
        self._live = [self._current]  # those that may still have calls
        self._closing = False
        self._trial: Trial | None = None
        self._mirror: Mirror[M] | None = None
        self._seen = Tally()
        self._rescued = 0

    @property
    def model(self) -> M:
        """The model that serves now: to look at. Ask the deployment, since a swap may close it."""
        return self._current.model

    @property
    def generation(self) -> int:
        """Which model serves: 1 for the first, one more for each that was tried."""
        return self._current.number

    @property
    def calls(self) -> int:
        """Calls in flight, on all models; streams included."""
        with self._lock:
            return sum(generation.calls for generation in self._live)

    @property
    def closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._closing

    async def call(self, ask: Callable[[M], Awaitable[T]]) -> T:
        """What the model that serves now answers to `ask`."""
        generation = self._enter()
        try:
            answer = await ask(generation.model)
        except BaseException as error:
            other = self._exit(generation, error)
            if other is None:
                raise
        else:
            self._answered(generation, ask, answer)
            return answer
        try:
            answer = await ask(other.model)
        except BaseException as error:
            self._exit(other, error, rescue=True)
            raise
        self._exit(other, None, rescue=True)
        return answer

    def call_sync(self, ask: Callable[[M], T]) -> T:
        """The same for a plain thread."""
        generation = self._enter()
        try:
            answer = ask(generation.model)
        except BaseException as error:
            other = self._exit(generation, error)
            if other is None:
                raise
        else:
            self._answered(generation, ask, answer)
            return answer
        try:
            answer = ask(other.model)
        except BaseException as error:
            self._exit(other, error, rescue=True)
            raise
        self._exit(other, None, rescue=True)
        return answer

    async def iterate(self, ask: Callable[[M], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """A stream of the model that serves when its first item is asked for; that model gives all of it."""
        generation = self._enter()
        try:
            async for item in relayed(ask(generation.model)):
                yield item
        except BaseException as error:
            self._exit(generation, error, rescue=True)
            raise
        self._exit(generation, None)

    def _enter(self) -> Generation[M]:
        with self._lock:
            if self._closing:
                raise DeploymentClosedError(f"deployment {self.name!r} is closed")
            self._current.enter()
            return self._current

    def _exit(
        self, generation: Generation[M], error: BaseException | None, *, rescue: bool = False
    ) -> Generation[M] | None:
        """A call ended. The generation that answers in its place, entered, where one on probation failed."""
        with self._lock:
            generation.exit()
            blamed = generation.tally.count(error)
            if blamed and generation is self._current and self._trial is not None:
                self._trial.judge()
            before = generation.before
            if blamed and before is not None and not (rescue or self._closing or isinstance(error, TimeoutError)):
                other = before if generation is self._current else self._current  # it was rolled back meanwhile
                other.enter()
                return other
            if rescue and error is None:
                self._rescued += 1
            else:
                self._seen.count(error)
        return None

    def _answered(self, generation: Generation[M], ask: Callable[[M], object], answer: object) -> None:
        self._exit(generation, None)
        mirror = self._mirror
        if mirror is not None:
            mirror.offer(ask, answer)

    def _check_open(self) -> None:
        if self._closing:
            raise DeploymentClosedError(f"deployment {self.name!r} is closed")

    async def drain(self, timeout: float | timedelta | None = None) -> bool:  # noqa: ASYNC109 - ends no call
        """Take no more calls, and wait for those in flight; False if `timeout` seconds were too few."""
        until = self._now() + patience(timeout)
        for generation in self._leave():
            if not await generation.idle.wait(max(0.0, until - self._now())):
                return False
        return True

    def drain_sync(self, timeout: float | timedelta | None = None) -> bool:
        """The same for a plain thread."""
        until = self._now() + patience(timeout)
        return all(generation.idle.wait_sync(max(0.0, until - self._now())) for generation in self._leave())

    def close(self) -> None:
        """Close all its models, and end a swap that is on its way; `drain` first spares the calls in flight.

        Blocks until they have ended. Closing again does nothing.
        """
        with ExitStack() as models:
            for generation in self._leave():
                models.callback(generation.model.close)

    def _leave(self) -> list[Generation[M]]:
        with self._lock:
            self._closing = True
            for generation in self._live:
                generation.leave()
            if self._trial is not None:
                self._trial.over.set()
            return list(self._live)

    def counters(self) -> dict[str, int]:
        """Calls by how they ended for their callers; rescued ones were answered by the model before."""
        with self._lock:
            seen = self._seen
            return {
                "success": seen.success,
                "failure": seen.failure,
                "neither": seen.neither,
                "rescued": self._rescued,
            }

    def gauges(self) -> dict[str, float]:
        """The generation that serves, calls in flight, and models in memory."""
        with self._lock:
            active = sum(generation.calls for generation in self._live)
            return {"generation": self._current.number, "active": active, "models": len(self._live)}
