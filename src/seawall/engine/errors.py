"""What an engine raises, beside what is wrong with a prompt or a setting, and what the model itself raises.

Rejected
+-- AdmissionError                the queue did not take the call, or could not serve it
|   +-- QueueFullError
|   +-- QueueTimeoutError
|   +-- DeadlineUnmeetableError
+-- EngineDrainingError
ModelError
+-- EngineClosedError
+-- RuntimeFailure
    +-- RuntimeDeviceError
        +-- StepStuckError        a step, or the whole engine, hangs
"""

from __future__ import annotations

from seawall.core.errors import Rejected
from seawall.inference.errors import ModelError, RuntimeDeviceError


class AdmissionError(Rejected):
    """The engine did not take an answer on, or did not get to begin it; base of its refusals."""


class QueueFullError(AdmissionError):
    """Too much waits, or one that comes first took the place of this one, or its turn would come too late."""

    reason = "has a full queue"


class QueueTimeoutError(AdmissionError):
    """No row came free within the longest wait."""

    reason = "had no row free within the longest wait"


class DeadlineUnmeetableError(AdmissionError):
    """At the pace that was measured the answer would not be whole before the call's deadline."""

    reason = "can't answer before the deadline of the call"


class EngineDrainingError(Rejected):
    """The engine finishes what it has and takes no more; another may take the call."""

    reason = "is draining and takes no new answers"


class EngineClosedError(ModelError):
    """The engine was closed, or has not been opened: use it inside `async with`."""


class StepStuckError(RuntimeDeviceError):
    """A step did not end in time and was stopped; or it could not even be stopped, and the engine is of no more use."""
