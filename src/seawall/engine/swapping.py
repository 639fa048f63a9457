"""What a swap raises and says, and the stages it goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from seawall.core.events import Event
from seawall.engine.rehearsal import checked_stages, passed
from seawall.engine.shadowing import Shadow
from seawall.engine.trial import Probation
from seawall.engine.worker import Worker
from seawall.inference.errors import ModelError


class DeploymentClosedError(ModelError):
    """The deployment was closed, or drains; it takes no more calls."""


class SwapInProgressError(ModelError):
    """Another swap of this deployment is on its way; one at a time."""

    retryable = True


@dataclass(frozen=True, slots=True)
class SwapStarted(Event):
    """A new model is loaded beside the one that serves; it is to be `generation`."""

    generation: int


@dataclass(frozen=True, slots=True)
class ModelSwapped(Event):
    """The traffic moved to `generation`, `seconds` after the swap began."""

    generation: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SwapRolledBack(Event):
    """The new model went in `stage`, and `generation`, the one before it, serves on."""

    generation: int
    stage: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class ModelRetired(Event):
    """The model of `generation` was closed; `ended` calls were still in flight and ended with it."""

    generation: int
    ended: int


def check_settings(load: object, shadow: object, probation: object, **stages: Callable[..., object] | None) -> None:
    """What a swap is given, before anything is loaded."""
    if not callable(load):
        raise TypeError(f"load must be a function that makes a model, got {load!r}")
    if shadow is not None and not isinstance(shadow, Shadow):
        raise TypeError(f"shadow must be a Shadow, or None, got {shadow!r}")
    if probation is not None and not isinstance(probation, Probation):
        raise TypeError(f"probation must be a Probation, or None, got {probation!r}")
    checked_stages(**stages)


class Stages:
    """Where a swap is, and the thread that does what blocks in it."""

    def __init__(self, name: str) -> None:
        self.worker = Worker(f"seawall-{name}-swap")
        self.name = "load"
        self._deployment = name

    async def passed(self, stage: str, test: Callable[..., object] | None, *models: object) -> None:
        """Begin a stage; where there is a test, the models pass it or it raises."""
        self.name = stage
        if test is not None:
            await passed(self.worker, self._deployment, stage, test, *models)
