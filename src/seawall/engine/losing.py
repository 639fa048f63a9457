"""Which errors mean that a model is lost, or may be; and what is said of models that are lost and made anew."""

from __future__ import annotations

from dataclasses import dataclass

from seawall.core.events import Event
from seawall.engine.errors import EngineClosedError, StepStuckError
from seawall.inference.errors import (
    BackendClosedError,
    DecoderClosedError,
    ForkedBackendError,
    ModelError,
    RuntimeDeviceError,
    RuntimeExhaustedError,
    RuntimeFailure,
    RuntimeInterruptedError,
    RuntimeMisuseError,
)

DEAD = (RuntimeDeviceError, BackendClosedError, DecoderClosedError, EngineClosedError, ForkedBackendError)
ALIVE = (StepStuckError,)  # of those, what one prompt may be to blame for: an engine that is given up fails its test
_INNOCENT = (RuntimeMisuseError, RuntimeExhaustedError, RuntimeInterruptedError)


def suspicious(error: RuntimeFailure) -> bool:
    """Whether the model may be to blame for it, or its input: a test tells."""
    return isinstance(error, ALIVE) or not isinstance(error, (*DEAD, *_INNOCENT))


class SupervisedClosedError(ModelError):
    """It was closed, or has not been opened: use it inside `async with`."""


class RebuildError(ModelError):
    """A model could not be made anew; what was raised is the `__cause__`. It is tried again, later each time."""


@dataclass(frozen=True, slots=True)
class ModelSuspected(Event):
    """A call failed with `error`, which the model or its input may be to blame for: the model is tested."""

    error: Exception


@dataclass(frozen=True, slots=True)
class ModelLost(Event):
    """The model is dead: calls are refused until it is rebuilt. `reason` is what the breaker says."""

    reason: str


@dataclass(frozen=True, slots=True)
class ModelRebuilt(Event):
    """A new model serves, `seconds` after the old one was lost, at the `attempt`th attempt."""

    attempt: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RebuildFailed(Event):
    """The `attempt`th attempt at a new model failed; the next one comes later."""

    attempt: int
    error: Exception
