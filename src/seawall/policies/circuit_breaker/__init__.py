"""Circuit breaker: stop calling what is failing, and find out gently when it works again."""

from __future__ import annotations

from seawall.policies.circuit_breaker.breaker import CircuitBreaker
from seawall.policies.circuit_breaker.states import (
    BreakerSnapshot,
    CircuitOpenError,
    State,
    StateChanged,
    ThresholdExceeded,
)
from seawall.policies.circuit_breaker.timeouts import growing

__all__ = [
    "BreakerSnapshot",
    "CircuitBreaker",
    "CircuitOpenError",
    "State",
    "StateChanged",
    "ThresholdExceeded",
    "growing",
]
