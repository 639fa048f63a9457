"""What a new model goes through before anybody relies on it: loaded, warmed up, tested; off the event loop."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar, cast

from seawall.engine.standing_in import Closes
from seawall.engine.worker import Worker
from seawall.inference.errors import ModelError

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


async def loaded(worker: Worker, load: Load[M]) -> M:
    """A new model: from an `async` function here, from a plain one in the worker, and opened where it can be.

    When the caller is cancelled the model is closed, and the cancellation leaves after that.
    """
    if inspect.iscoroutinefunction(load):
        model = cast(M, await load())
    else:
        made: list[M] = []
        try:
            await worker.run(lambda: made.append(cast(M, load())))
        except BaseException:
            if made:
                await closed(worker, made[0])
            raise
        model = await made[0] if inspect.iscoroutine(made[0]) else made[0]  # of a lambda around an `async` one
    try:
        if hasattr(model, "open"):  # an engine, which loads then
            await model.open()
    except BaseException:
        await closed(worker, model)
        raise
    return model


async def closed(worker: Worker, model: Closes) -> None:
    """Close the model in the worker; whoever cancels meanwhile waits until that is done."""
    await worker.run(model.close)


async def passed(worker: Worker, name: str, stage: str, test: Callable[..., object], *models: object) -> None:
    """Try the models; UnfitModelError where the test answers False, and what it raises as it is."""
    if inspect.iscoroutinefunction(test):
        verdict = await test(*models)
    else:
        verdict = await worker.run(lambda: test(*models))
        if inspect.isawaitable(verdict):
            verdict = await verdict
    if type(verdict).__name__ in _BOOLEANS and not verdict:
        raise UnfitModelError(name, stage, f"{getattr(test, '__name__', test)} answered False")
