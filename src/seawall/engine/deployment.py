"""A model that is replaced while it serves: the new one beside the old, tried out, given the traffic, or sent away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Final, Generic, TypeVar

from seawall.core import checks, events
from seawall.core.events import Listener
from seawall.engine.generations import Generation, start
from seawall.engine.rehearsal import Gate, Load, Test, UnfitModelError, closed, loaded, warm_up
from seawall.engine.shadowing import Mirror, Shadow, shadowed
from seawall.engine.standing_in import Closes
from seawall.engine.swapping import (
    ModelRetired,
    ModelSwapped,
    Stages,
    SwapInProgressError,
    SwapRolledBack,
    SwapStarted,
    check_settings,
)
from seawall.engine.traffic import Traffic
from seawall.engine.trial import Probation, Trial
from seawall.engine.worker import Worker

M = TypeVar("M", bound=Closes)

DEFAULT_PROBATION: Final = Probation()


class Deployment(Traffic[M], Generic[M]):
    """Serves a model, and replaces it without a failed call: `await deployment.swap(load)`.

    For a Backend, a MicroBatcher, an Embedder, an Engine, or a stand-in for one; it takes the model over, and closes
    it. Ask it as you would the model. Any number of tasks, event loops and threads may, while it is swapped too: a call
    is answered to its end by the model that began it, streams included, and a model is closed after its last call.

    While a swap is on its way there are two models in memory: the old one is given back at its end. What a swap
    that failed or was cancelled had loaded is closed, and the old model has never stopped serving.

    Args:
        name: labels events, metrics and threads.
        model: what serves first.
        drain_timeout: seconds that a swap waits for the last calls on the old model, before it is closed under them;
            infinity to wait for them all.
        listeners: called with its `SwapStarted`, `ModelSwapped`, `SwapRolledBack` and `ModelRetired` events.

    ```python
    import asyncio

    import numpy as np
    from onnx.parser import parse_model

    from seawall.engine import Deployment
    from seawall.inference import Backend


    def load(name):
        head = '<ir_version: 10, opset_import: ["" : 21]>'
        text = f"{head} scores (float[n] x) => (float[n] y) {{ y = {name}(x, x) }}"
        return Backend.load(parse_model(text).SerializeToString())


    async def main():
        two = np.array([2, 3], np.float32)
        async with Deployment("scores", load("Add")) as scores:
            before = await scores.run({"x": two})
            await scores.swap(lambda: load("Mul"), self_test=lambda model: model.run_sync({"x": two}), probation=None)
            print(before["y"], (await scores.run({"x": two}))["y"])


    asyncio.run(main())
    #> [4. 6.] [4. 9.]
    ```
    """

    kind = "deployment"

    def __init__(
        self, name: str, model: M, *, drain_timeout: float | timedelta = 60.0, listeners: Iterable[Listener] = ()
    ) -> None:
        super().__init__(name, model, listeners)
        self.drain_timeout = checks.seconds("drain_timeout", drain_timeout, zero=True, infinite=True)
        self._numbers = 1
        self._swapping = False
        self._register()

    async def swap(
        self,
        load: Load[M],
        *,
        warm_up: Test[M] | None = warm_up,
        self_test: Test[M] | None = None,
        shadow: Shadow | None = None,
        gate: Gate[M] | None = None,
        probation: Probation | None = DEFAULT_PROBATION,
    ) -> int:
        """Replace the model by what `load` gives; the number of its generation, once the old one is closed.

        It is loaded beside the old one, warmed up, tried on `self_test`, compared with the old one, given all new calls
        at once, watched, and then the old one is closed after its last call. Where anything of that fails, or the
        caller is cancelled, it is closed, new calls go to the old one again, and the error is raised as it was, with
        a note. Plain functions run in a worker thread and may block; `async` ones run here.

        Args:
            load: makes the new model, another one each time; an engine may be returned unopened.
            warm_up: given the new model; its own `warm_up()` unless told, None for nothing.
            self_test: given the new model. It raises or answers False where that will not do.
            shadow: compare its answers to some calls with those that the callers got.
            gate: given the old and the new model, such as to compare them on data of yours; as `self_test`.
            probation: how long the old one stays warm after the traffic moved, and what brings it back. A call that
                fails on the new one meanwhile is answered by the old one. None to close the old one at once.

        Raises:
            UnfitModelError: it did not pass; `stage` and `why`.
            InvalidSettingError: `load` gave the model that serves; it serves on.
            SwapInProgressError: another swap is on its way.
            DeploymentClosedError: closed before, or meanwhile.
            Exception: whatever `load` or a test raised.
        """
        check_settings(load, shadow, probation, warm_up=warm_up, self_test=self_test, gate=gate)
        number = self._begin()
        stages = Stages(self.name)
        new = old = None
        try:
            began = self._now()
            self._say(SwapStarted, number)
            new = Generation(await loaded(stages.worker, load, [one.model for one in self._live]), number)
            await stages.passed("warm_up", warm_up, new.model)
            await stages.passed("self_test", self_test, new.model)
            if shadow is not None:
                stages.name = "shadow"
                await self._compare(new, shadow, stages.worker)
            await stages.passed("gate", gate, self._current.model, new.model)
            stages.name = "probation"
            old = self._switch(new, probation, began)
            await self._watched(new, old)
            stages.name = "drain"
            await old.idle.wait(self.drain_timeout)
            self._check_open()
        except BaseException as error:
            error.add_note(f"deployment {self.name!r}: its swap was rolled back in stage {stages.name!r}")
            await self._roll_back(new, old, stages, error)
            raise
        else:
            await self._retire(old, stages.worker)
            return number
        finally:
            stages.worker.stop()
            self._swapping = False

    def _begin(self) -> int:
        with self._lock:
            self._check_open()
            if self._swapping:
                raise SwapInProgressError(f"deployment {self.name!r} is being swapped already: one at a time")
            self._swapping = True
            self._numbers += 1
            return self._numbers

    async def _compare(self, new: Generation[M], shadow: Shadow, worker: Worker) -> None:
        self._mirror = Mirror(shadow)
        try:
            await shadowed(self._mirror, self.name, new.model, worker)
        finally:
            self._mirror = None

    def _switch(self, new: Generation[M], probation: Probation | None, began: float) -> Generation[M]:
        """All new calls go to the new one, from one moment on."""
        with self._lock:
            self._check_open()
            old, self._current = self._current, new
            self._live.append(new)
            if probation is not None:
                self._trial = Trial(probation, replace(old.tally), new.tally)
                new.before = old
            self._emit(ModelSwapped, now := self._now(), new.number, now - began)
        events.deliver()
        return old

    async def _watched(self, new: Generation[M], old: Generation[M]) -> None:
        """Let its probation pass; then the old one takes no calls any more, rescues neither."""
        trial = self._trial
        if trial is not None:
            await trial.over.wait(trial.settings.length)
        with self._lock:
            self._check_open()
            if trial is not None and trial.why is not None:
                raise UnfitModelError(self.name, "probation", trial.why)
            self._trial = new.before = None
            old.leave()

    async def _roll_back(
        self, new: Generation[M] | None, old: Generation[M] | None, stages: Stages, error: BaseException
    ) -> None:
        """New calls go to the old one, as before; the new one is closed after those that it has."""
        with self._lock:
            self._trial = None
            if new is not None:
                new.leave()
            if old is not None and not self._closing:
                old.stay()
                self._current = old
            self._emit(SwapRolledBack, self._now(), self._current.number, stages.name, error)
        events.deliver()
        if new is None:
            return
        gone = isinstance(error, GeneratorExit)  # the event loop: nobody can wait
        if not gone and (old is None or not new.calls):
            await self._retire(new, stages.worker)
            return
        start(f"{self.name} retires {new.number}", self._see_off, new)
        if isinstance(error, Exception):  # who is cancelled does not wait for the callers of others
            await new.closed.wait()

    def _see_off(self, generation: Generation[M]) -> None:
        """In a thread: close a model after its last call."""
        generation.idle.wait_sync(self.drain_timeout)
        ended = generation.calls
        try:
            generation.model.close()
        finally:
            self._gone(generation, ended)

    async def _retire(self, generation: Generation[M], worker: Worker) -> None:
        ended = generation.calls
        try:
            await closed(worker, generation.model)
        finally:
            self._gone(generation, ended)

    def _gone(self, generation: Generation[M], ended: int) -> None:
        with self._lock:
            self._live = [one for one in self._live if one is not generation]
            generation.closed.set()
            self._emit(ModelRetired, self._now(), generation.number, ended)
        events.deliver()

    def __repr__(self) -> str:
        state = "closed" if self._closing else f"generation {self.generation}, {self.calls} calls"
        return f"<Deployment {self.name!r}, {state}>"
