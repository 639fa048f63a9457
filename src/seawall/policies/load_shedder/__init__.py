"""Load shedder: refuses a share of the calls, the least important first, while something is overloaded."""

from seawall.policies.load_shedder.shedder import (
    LoadShedder,
    LoadShedderSnapshot,
    LoadShedError,
    SheddingStarted,
    SheddingStopped,
)
from seawall.policies.load_shedder.signals import CpuSignal, QueueDelaySignal, Signal

__all__ = [
    "CpuSignal",
    "LoadShedError",
    "LoadShedder",
    "LoadShedderSnapshot",
    "QueueDelaySignal",
    "SheddingStarted",
    "SheddingStopped",
    "Signal",
]
