"""What a new model goes through before anybody relies on it: loaded, warmed up, tested; off the event loop."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Generic, TypeAlias, TypeVar, cast

from seawall.engine.standing_in import Closes
from seawall.engine.worker import Worker
from seawall.inference.errors import InvalidSettingError, ModelError

M = TypeVar("M", bound=Closes)

Load: TypeAlias = Callable[[], M | Awaitable[M]]
Test: TypeAlias = Callable[[M], object]  # plain or async; it raises, or answers False, where the model will not do
Gate: TypeAlias = Callable[[M, M], object]  # the same, of the old model and the new one


_BOOLEANS = ("bool", "bool_")  # Python's, and what numpy's `all` answers


class UnfitModelError(ModelError):
    """A model that loads, and does not pass what it was tried on.

    Attributes:
        stage: "warm_up", "self_test", "shadow", "gate" or "probation".
        why: what was found.
    """

    def __init__(self, name: str, stage: str, why: str) -> None:
        super().__init__(f"the new model of {name!r} did not pass its {stage}: {why}")
        self.stage = stage
        self.why = why


def warm_up(model: object) -> object:
    """What a model is warmed up with unless told: its own `warm_up()`, where it has one."""
    own = getattr(model, "warm_up", None)
    return own() if own is not None else None


def checked_model(what: str, model: M) -> M:
    """The model itself, if it can be closed one day."""
    if not callable(getattr(model, "close", None)):
        raise TypeError(f"{what} must be a model, which has close(), got {model!r}")
    return model


def checked_stages(**stages: Callable[..., object] | None) -> list[tuple[str, Test[M] | None]]:
    """Stages and their tests, which are functions or None."""
    for stage, test in stages.items():
        if test is not None and not callable(test):
            raise TypeError(f"{stage} must be a function of the model, or None, got {test!r}")
    return list(stages.items())


async def loaded(worker: Worker, load: Load[M], serving: Iterable[object] = ()) -> M:
    """A new model: from an `async` function here, from a plain one in the worker, and opened where it can be.

    When the caller is cancelled the model is closed, and the cancellation leaves after that. One that is `serving`
    already, as a `load` that remembers its model gives it, is refused and left alone: closing it would end its calls.
    """
    if inspect.iscoroutinefunction(load):
        model = cast(M, await load())
    else:
        made: list[M] = []
        try:
            await worker.run(lambda: made.append(cast(M, load())))
        except BaseException:
            if made and hasattr(made[0], "close") and all(made[0] is not one for one in serving):
                await closed(worker, made[0])
            raise
        model = await made[0] if inspect.iscoroutine(made[0]) else made[0]  # of a lambda around an `async` one
    if any(model is one for one in serving):
        raise InvalidSettingError(f"load must make a new model each time, and gave the one that serves: {model!r}")
    checked_model("what load returns", model)
    try:
        if hasattr(model, "open"):  # an engine, which loads then
            await model.open()
    except BaseException:
        await closed(worker, model)
        raise
    return model


async def finished(worker: Worker, work: Callable[[], object]) -> Any:
    """What `work` comes to: it runs in the worker, and what it returns is awaited here where that can be."""
    made: list[object] = []
    try:
        await worker.run(lambda: made.append(work()))
    except BaseException:
        if made and inspect.iscoroutine(made[0]):  # cancelled meanwhile: nobody will await it
            made[0].close()
        raise
    return await made[0] if inspect.isawaitable(made[0]) else made[0]


async def closed(worker: Worker, model: Closes) -> None:
    """Close the model in the worker; whoever cancels meanwhile waits until that is done."""
    await worker.run(model.close)


class Rehearsal(Generic[M]):
    """How a model is made that may serve: loaded, warmed up, tested.

    Attributes:
        canary: what tells a sick model, while it serves; None where nothing does.
    """

    def __init__(
        self, name: str, load: Load[M], *, warm_up: Test[M] | None = None, self_test: Test[M] | None = None
    ) -> None:
        if not callable(load):
            raise TypeError(f"load must be a function that makes a model, got {load!r}")
        self._name = name
        self._load = load
        self._stages: list[tuple[str, Test[M] | None]] = checked_stages(warm_up=warm_up, self_test=self_test)
        self.canary = self_test or warm_up

    async def make(self) -> M:
        """A new model that passed; one that did not is closed."""
        worker = Worker(f"seawall-{self._name}-load")
        try:
            model = await loaded(worker, self._load)
            try:
                for stage, test in self._stages:
                    if test is not None:
                        await passed(worker, self._name, stage, test, model)
            except BaseException:
                await closed(worker, model)
                raise
            return model
        finally:
            worker.stop()

    async def retest(self, model: M) -> None:
        """Whether one that is suspected passes its canary; it is left open."""
        if self.canary is None:
            return
        worker = Worker(f"seawall-{self._name}-test")
        try:
            await passed(worker, self._name, "self_test", self.canary, model)
        finally:
            worker.stop()


async def passed(worker: Worker, name: str, stage: str, test: Callable[..., object], *models: object) -> None:
    """Try the models; UnfitModelError where the test answers False, and what it raises as it is."""
    if inspect.iscoroutinefunction(test):
        verdict = await test(*models)
    else:
        verdict = await finished(worker, lambda: test(*models))
    if type(verdict).__name__ in _BOOLEANS and not verdict:
        raise UnfitModelError(name, stage, f"{getattr(test, '__name__', test)} answered False")
