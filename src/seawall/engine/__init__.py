"""Hardened generation: a model that answers many at once, behind policies. The one package that knows both halves."""

from seawall.engine.answers import Completion, ModelInfo, Piece, Usage
from seawall.engine.balancing import LeastLoaded, PeakEwma, RoundRobin
from seawall.engine.brownout import Shorter
from seawall.engine.deployment import Deployment
from seawall.engine.downgrade import Downgrade
from seawall.engine.ejection import Ejection
from seawall.engine.engine import Engine, EngineOptions
from seawall.engine.errors import (
    AdmissionError,
    DeadlineUnmeetableError,
    EngineClosedError,
    EngineDrainingError,
    QueueFullError,
    QueueTimeoutError,
    StepStuckError,
)
from seawall.engine.failover import Failover
from seawall.engine.losing import (
    ModelLost,
    ModelRebuilt,
    ModelSuspected,
    RebuildError,
    RebuildFailed,
    SupervisedClosedError,
)
from seawall.engine.metering import AnswerShed, EngineSnapshot, StepStuck
from seawall.engine.rehearsal import UnfitModelError
from seawall.engine.replica import (
    NoReplicaError,
    PanicChanged,
    ReplicaEjected,
    ReplicaRestored,
    ReplicasClosedError,
    ReplicaSnapshot,
)
from seawall.engine.replicas import Replicas
from seawall.engine.serving import Serving
from seawall.engine.settings import AnswerOptions, AnswerSettings
from seawall.engine.shadowing import Shadow
from seawall.engine.standing_in import StandIn
from seawall.engine.supervision import Supervised
from seawall.engine.swapping import (
    DeploymentClosedError,
    ModelRetired,
    ModelSwapped,
    SwapInProgressError,
    SwapRolledBack,
    SwapStarted,
)
from seawall.engine.trial import Probation

__all__ = [
    "AdmissionError",
    "AnswerOptions",
    "AnswerSettings",
    "AnswerShed",
    "Completion",
    "DeadlineUnmeetableError",
    "Deployment",
    "DeploymentClosedError",
    "Downgrade",
    "Ejection",
    "Engine",
    "EngineClosedError",
    "EngineDrainingError",
    "EngineOptions",
    "EngineSnapshot",
    "Failover",
    "LeastLoaded",
    "ModelInfo",
    "ModelLost",
    "ModelRebuilt",
    "ModelRetired",
    "ModelSuspected",
    "ModelSwapped",
    "NoReplicaError",
    "PanicChanged",
    "PeakEwma",
    "Piece",
    "Probation",
    "QueueFullError",
    "QueueTimeoutError",
    "RebuildError",
    "RebuildFailed",
    "ReplicaEjected",
    "ReplicaRestored",
    "ReplicaSnapshot",
    "Replicas",
    "ReplicasClosedError",
    "RoundRobin",
    "Serving",
    "Shadow",
    "Shorter",
    "StandIn",
    "StepStuck",
    "StepStuckError",
    "Supervised",
    "SupervisedClosedError",
    "SwapInProgressError",
    "SwapRolledBack",
    "SwapStarted",
    "UnfitModelError",
    "Usage",
]
