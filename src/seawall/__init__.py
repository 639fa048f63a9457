"""seawall keeps services standing when load, faults and slow models hit them.

Policies decorate any function, block or stream; everything named here is public, everything else may move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seawall.core.decorate import policies_of
from seawall.core.errors import Rejected
from seawall.core.events import CallRejected, Event, listen
from seawall.core.gate import use_clock
from seawall.core.pipeline import Pipeline
from seawall.core.protocol import Around, Guard, Wait
from seawall.core.registry import live
from seawall.core.scope import Permit, Scope
from seawall.decorators import breaker, bulkhead, rate_limiter, slo, timeout
from seawall.policies.bulkhead import Bulkhead, BulkheadFullError
from seawall.policies.circuit_breaker import CircuitBreaker, CircuitOpenError, State, StateChanged
from seawall.policies.rate_limiter import RateLimitedError, RateLimiter
from seawall.policies.timeout import CallTimedOut, CallTimeoutError, Timeout
from seawall.slo.objective import SLO, BudgetExhausted

if TYPE_CHECKING:
    from seawall.engine import Engine

__version__ = "0.1.0"

__all__ = [
    "SLO",
    "Around",
    "BudgetExhausted",
    "Bulkhead",
    "BulkheadFullError",
    "CallRejected",
    "CallTimedOut",
    "CallTimeoutError",
    "CircuitBreaker",
    "CircuitOpenError",
    "Engine",
    "Event",
    "Guard",
    "Permit",
    "Pipeline",
    "RateLimitedError",
    "RateLimiter",
    "Rejected",
    "Scope",
    "State",
    "StateChanged",
    "Timeout",
    "Wait",
    "breaker",
    "bulkhead",
    "listen",
    "live",
    "policies_of",
    "rate_limiter",
    "slo",
    "timeout",
    "use_clock",
]


def __getattr__(name: str) -> object:
    """`Engine` on first use: it needs the `cpu` or `gpu` extra, which policies alone don't."""
    if name == "Engine":
        from seawall.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
