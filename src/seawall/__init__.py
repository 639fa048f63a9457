"""seawall keeps services standing when load, faults and slow models hit them.

Policies decorate any function, block or stream; everything named here is public, everything else may move.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from seawall.core.ambient import Priority, priority
from seawall.core.decorate import policies_of
from seawall.core.errors import CallTimeoutError, Rejected
from seawall.core.events import CallRejected, Event, listen
from seawall.core.gate import use_clock
from seawall.core.pipeline import Pipeline
from seawall.core.protocol import Around, Guard, Wait
from seawall.core.registry import live
from seawall.core.scope import Permit, Scope

from seawall.slo.objective import SLO, BudgetExhausted  # isort: skip - before the decorator of the package's name
from seawall.decorators import (  # isort: skip
    adaptive_bulkhead,
    breaker,
    bulkhead,
    cache,
    chaos,
    deadline,
    fallback,
    hedge,
    keyed,
    load_shedder,
    rate_limiter,
    retry,
    single_flight,
    slo,
    timeout,
)

if TYPE_CHECKING:
    from seawall.engine import Engine
    from seawall.inference import Backend
    from seawall.policies.adaptive_bulkhead import (
        AdaptiveBulkhead,
        AdaptiveBulkheadSnapshot,
        AIMDLimit,
        GradientLimit,
        Limit,
        LimitChanged,
        VegasLimit,
    )
    from seawall.policies.bulkhead import Bulkhead, BulkheadFullError
    from seawall.policies.cache import Cache, CacheSnapshot, RefreshFailed, StaleAnswered
    from seawall.policies.chaos import Chaos, ChaosInjected, ChaosSnapshot
    from seawall.policies.circuit_breaker import (
        BreakerSnapshot,
        CircuitBreaker,
        CircuitOpenError,
        State,
        StateChanged,
        ThresholdExceeded,
        growing,
    )
    from seawall.policies.deadline import (
        Deadline,
        DeadlineExceeded,
        DeadlineExceededError,
        DeadlinePassedError,
        time_left,
    )
    from seawall.policies.fallback import Fallback, FallbackFailed, FallbackSnapshot, FallbackUsed
    from seawall.policies.hedge import Hedge, HedgeLost, HedgeSnapshot, HedgeStarted, HedgeWon, Quantile
    from seawall.policies.keyed import Keyed, KeyedAround
    from seawall.policies.load_shedder import (
        CpuSignal,
        LoadShedder,
        LoadShedderSnapshot,
        LoadShedError,
        QueueDelaySignal,
        SheddingStarted,
        SheddingStopped,
        Signal,
    )
    from seawall.policies.rate_limiter import (
        KeyedRateLimiter,
        LimiterDrained,
        LimiterSnapshot,
        RateLimitedError,
        RateLimiter,
        Reservation,
    )
    from seawall.policies.retry import Attempt, Retry, RetryGivenUp, RetryScheduled, RetrySnapshot
    from seawall.policies.retry_budget import RetryBudget, RetryBudgetExhausted, RetryBudgetSnapshot
    from seawall.policies.timeout import CallTimedOut, Timeout

__version__ = "0.1.0"

__all__ = [
    "SLO",
    "AIMDLimit",
    "AdaptiveBulkhead",
    "AdaptiveBulkheadSnapshot",
    "Around",
    "Attempt",
    "Backend",
    "BreakerSnapshot",
    "BudgetExhausted",
    "Bulkhead",
    "BulkheadFullError",
    "Cache",
    "CacheSnapshot",
    "CallRejected",
    "CallTimedOut",
    "CallTimeoutError",
    "Chaos",
    "ChaosInjected",
    "ChaosSnapshot",
    "CircuitBreaker",
    "CircuitOpenError",
    "CpuSignal",
    "Deadline",
    "DeadlineExceeded",
    "DeadlineExceededError",
    "DeadlinePassedError",
    "Engine",
    "Event",
    "Fallback",
    "FallbackFailed",
    "FallbackSnapshot",
    "FallbackUsed",
    "GradientLimit",
    "Guard",
    "Hedge",
    "HedgeLost",
    "HedgeSnapshot",
    "HedgeStarted",
    "HedgeWon",
    "Keyed",
    "KeyedAround",
    "KeyedRateLimiter",
    "Limit",
    "LimitChanged",
    "LimiterDrained",
    "LimiterSnapshot",
    "LoadShedError",
    "LoadShedder",
    "LoadShedderSnapshot",
    "Permit",
    "Pipeline",
    "Priority",
    "Quantile",
    "QueueDelaySignal",
    "RateLimitedError",
    "RateLimiter",
    "RefreshFailed",
    "Rejected",
    "Reservation",
    "Retry",
    "RetryBudget",
    "RetryBudgetExhausted",
    "RetryBudgetSnapshot",
    "RetryGivenUp",
    "RetryScheduled",
    "RetrySnapshot",
    "Scope",
    "SheddingStarted",
    "SheddingStopped",
    "Signal",
    "StaleAnswered",
    "State",
    "StateChanged",
    "ThresholdExceeded",
    "Timeout",
    "VegasLimit",
    "Wait",
    "adaptive_bulkhead",
    "breaker",
    "bulkhead",
    "cache",
    "chaos",
    "deadline",
    "fallback",
    "growing",
    "hedge",
    "keyed",
    "listen",
    "live",
    "load_shedder",
    "policies_of",
    "priority",
    "rate_limiter",
    "retry",
    "single_flight",
    "slo",
    "time_left",
    "timeout",
    "use_clock",
]


# Where the names live that are imported on first use: all at once would double the time `import seawall` takes.
_HOMES: dict[str, tuple[str, ...]] = {
    "seawall.policies.adaptive_bulkhead": (
        "AdaptiveBulkhead",
        "AdaptiveBulkheadSnapshot",
        "AIMDLimit",
        "GradientLimit",
        "Limit",
        "LimitChanged",
        "VegasLimit",
    ),
    "seawall.policies.bulkhead": ("Bulkhead", "BulkheadFullError"),
    "seawall.policies.cache": ("Cache", "CacheSnapshot", "RefreshFailed", "StaleAnswered"),
    "seawall.policies.chaos": ("Chaos", "ChaosInjected", "ChaosSnapshot"),
    "seawall.policies.circuit_breaker": (
        "BreakerSnapshot",
        "CircuitBreaker",
        "CircuitOpenError",
        "State",
        "StateChanged",
        "ThresholdExceeded",
        "growing",
    ),
    "seawall.policies.deadline": (
        "Deadline",
        "DeadlineExceeded",
        "DeadlineExceededError",
        "DeadlinePassedError",
        "time_left",
    ),
    "seawall.policies.fallback": ("Fallback", "FallbackFailed", "FallbackSnapshot", "FallbackUsed"),
    "seawall.policies.hedge": ("Hedge", "HedgeLost", "HedgeSnapshot", "HedgeStarted", "HedgeWon", "Quantile"),
    "seawall.policies.keyed": ("Keyed", "KeyedAround"),
    "seawall.policies.load_shedder": (
        "CpuSignal",
        "LoadShedder",
        "LoadShedderSnapshot",
        "LoadShedError",
        "QueueDelaySignal",
        "SheddingStarted",
        "SheddingStopped",
        "Signal",
    ),
    "seawall.policies.rate_limiter": (
        "KeyedRateLimiter",
        "LimiterDrained",
        "LimiterSnapshot",
        "RateLimitedError",
        "RateLimiter",
        "Reservation",
    ),
    "seawall.policies.retry": ("Attempt", "Retry", "RetryGivenUp", "RetryScheduled", "RetrySnapshot"),
    "seawall.policies.retry_budget": ("RetryBudget", "RetryBudgetExhausted", "RetryBudgetSnapshot"),
    "seawall.policies.timeout": ("CallTimedOut", "Timeout"),
    "seawall.engine": ("Engine",),
    "seawall.inference": ("Backend",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """A policy, `Engine` or `Backend` on first use; these two need the `cpu` or `gpu` extra, which policies don't."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
