"""The policies as lower-case decorators: each use makes a policy of its own, named after the function."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import ParamSpec, Protocol, TypeVar, overload

from seawall.core.decorate import label
from seawall.core.policy import GuardPolicy
from seawall.policies.bulkhead import Bulkhead
from seawall.policies.circuit_breaker import CircuitBreaker
from seawall.policies.rate_limiter import RateLimiter
from seawall.policies.timeout import Timeout
from seawall.slo.objective import SLO

P = ParamSpec("P")
T = TypeVar("T")
Errors = type[BaseException] | tuple[type[BaseException], ...]


class Decorator(Protocol):
    """Takes a function and returns one with the same signature."""

    def __call__(self, fn: Callable[P, T], /) -> Callable[P, T]:
        """`fn`, guarded."""


def _named(make: Callable[[str], GuardPolicy], name: str | None) -> Decorator:
    if name is not None:
        return make(name)
    make("checked")  # bad settings are reported here, not where the function is

    def decorate(fn: Callable[P, T], /) -> Callable[P, T]:
        return make(label(fn))(fn)

    return decorate


@overload
def breaker(fn: Callable[P, T], /) -> Callable[P, T]: ...
@overload
def breaker(
    fn: str | None = None,
    /,
    *,
    failure_rate: float = ...,
    minimum_calls: int = ...,
    window: float | timedelta = ...,
    consecutive_failures: int | None = ...,
    reset_timeout: float | timedelta = ...,
    probes: int = ...,
    success_threshold: int = ...,
    probe_timeout: float | timedelta | None = ...,
    on: Errors = ...,
    ignore: Errors = ...,
) -> Decorator: ...
def breaker(fn: object = None, /, **settings: object) -> object:
    """Guard a function with a `CircuitBreaker` of its own: `@breaker`, `@breaker(...)` or `@breaker("name", ...)`.

    >>> @breaker(failure_rate=0.5, minimum_calls=20, reset_timeout=30)
    ... async def pay(amount: int) -> str: ...
    """
    if fn is None or isinstance(fn, str):
        return _named(lambda name: CircuitBreaker(name, **settings), fn)  # type: ignore[arg-type]
    return CircuitBreaker(label(fn))(fn)  # type: ignore[arg-type]


def bulkhead(
    name: str | None = None,
    *,
    max_concurrent: int,
    max_queued: int = 0,
    max_wait: float | timedelta = 1.0,
) -> Decorator:
    """Guard a function with a `Bulkhead` of its own.

    >>> @bulkhead(max_concurrent=8, max_queued=32, max_wait=0.2)
    ... async def pay(amount: int) -> str: ...
    """
    return _named(
        lambda named: Bulkhead(named, max_concurrent=max_concurrent, max_queued=max_queued, max_wait=max_wait),
        name,
    )


def rate_limiter(
    name: str | None = None,
    *,
    rate: float,
    per: float | timedelta = 1.0,
    burst: float | None = None,
    max_wait: float | timedelta = 0.0,
) -> Decorator:
    """Guard a function with a `RateLimiter` of its own.

    >>> @rate_limiter(rate=100, burst=20)
    ... async def pay(amount: int) -> str: ...
    """
    return _named(lambda named: RateLimiter(named, rate=rate, per=per, burst=burst, max_wait=max_wait), name)


def timeout(after: float | timedelta, *, name: str | None = None) -> Decorator:
    """Guard a function with a `Timeout` of its own.

    >>> @timeout(2.0)
    ... async def pay(amount: int) -> str: ...
    """
    return _named(lambda named: Timeout(named, after), name)


def slo(
    name: str | None = None,
    *,
    target: float,
    latency: float | timedelta | None = None,
    window: float | timedelta = 30 * 86400.0,
    on: Errors = Exception,
    ignore: Errors = (),
) -> Decorator:
    """Track a function with an `SLO` of its own.

    >>> @slo("answers", target=0.999, latency=0.5)
    ... async def answer(prompt: str) -> str: ...
    """
    return _named(lambda named: SLO(named, target=target, latency=latency, window=window, on=on, ignore=ignore), name)
