"""Rate limiters: so many calls per period, for all calls together or for each key."""

from __future__ import annotations

from seawall.policies.rate_limiter._line import RateLimitedError
from seawall.policies.rate_limiter._meters import Algorithm
from seawall.policies.rate_limiter.keyed import AtKey, KeyedLimiterSnapshot, KeyedRateLimiter
from seawall.policies.rate_limiter.limiter import LimiterDrained, LimiterSnapshot, RateLimiter
from seawall.policies.rate_limiter.reservation import Reservation

__all__ = [
    "Algorithm",
    "AtKey",
    "KeyedLimiterSnapshot",
    "KeyedRateLimiter",
    "LimiterDrained",
    "LimiterSnapshot",
    "RateLimitedError",
    "RateLimiter",
    "Reservation",
]
