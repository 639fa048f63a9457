"""The policies as lower-case decorators: each use makes a policy of its own, named after the function.

A policy is imported when its decorator is first used: all of them would double the time `import seawall` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from datetime import timedelta
from random import Random
from typing import TYPE_CHECKING, Literal, ParamSpec, Protocol, TypeVar, overload

from seawall.core import registry
from seawall.core.checks import NOTHING
from seawall.core.decorate import label
from seawall.core.policy import PolicyBase

if TYPE_CHECKING:
    from seawall.policies.adaptive_bulkhead.bulkhead import Algorithm as LimitAlgorithm
    from seawall.policies.chaos import Enabled
    from seawall.policies.circuit_breaker import State
    from seawall.policies.fallback import Step
    from seawall.policies.hedge import Quantile
    from seawall.policies.load_shedder import Signal
    from seawall.policies.rate_limiter import Algorithm
    from seawall.policies.retry.rules import Budget, Duration, On, Stop
    from seawall.policies.retry.rules import Wait as WaitRule

P = ParamSpec("P")
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Errors = type[BaseException] | tuple[type[BaseException], ...]


class Decorator(Protocol):
    """Takes a function and returns one with the same signature."""

    def __call__(self, fn: Callable[P, T], /) -> Callable[P, T]:
        """`fn`, guarded."""


def _named(make: Callable[[str], PolicyBase], name: str | None) -> Decorator:
    if name is not None:
        return make(name)
    with registry.unlisted():
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
    slow_call_rate: float | None = ...,
    slow_call_duration: float | timedelta | None = ...,
    consecutive_failures: int | None = ...,
    minimum_calls: int = ...,
    window: float | timedelta | None = ...,
    window_calls: int | None = ...,
    reset_timeout: float | timedelta | Callable[[int], float | timedelta] = ...,
    open_for: Callable[..., float | timedelta | None] | None = ...,
    probes: int = ...,
    permitted_probes: int | None = ...,
    success_threshold: int = ...,
    probe_timeout: float | timedelta | None = ...,
    half_open_timeout: float | timedelta | None = ...,
    half_open_then: State | Literal["open", "closed"] = ...,
    on: Errors | Callable[..., bool] = ...,
    ignore: Errors | Callable[..., bool] = ...,
    on_result: Callable[..., bool] | None = ...,
) -> Decorator: ...
def breaker(fn: object = None, /, **settings: object) -> object:
    """Guard a function with a `CircuitBreaker` of its own: `@breaker`, `@breaker(...)` or `@breaker("name", ...)`.

    Examples:
        >>> @breaker(failure_rate=0.5, minimum_calls=20, reset_timeout=30)
        ... async def pay(amount: int) -> str: ...
    """
    from seawall.policies.circuit_breaker import CircuitBreaker

    if fn is None or isinstance(fn, str):
        return _named(lambda name: CircuitBreaker(name, **settings), fn)  # type: ignore[arg-type]
    return CircuitBreaker(label(fn))(fn)  # type: ignore[arg-type]


def bulkhead(
    name: str | None = None,
    *,
    max_concurrent: int,
    max_queued: int = 0,
    max_wait: float | timedelta = 1.0,
    aging: float | timedelta = 1.0,
) -> Decorator:
    """Guard a function with a `Bulkhead` of its own.

    Examples:
        >>> @bulkhead(max_concurrent=8, max_queued=32, max_wait=0.2)
        ... async def pay(amount: int) -> str: ...
    """
    from seawall.policies.bulkhead import Bulkhead

    return _named(
        lambda named: Bulkhead(
            named, max_concurrent=max_concurrent, max_queued=max_queued, max_wait=max_wait, aging=aging
        ),
        name,
    )


def keyed(
    factory: Callable[[K], object],
    *,
    key: Callable[..., K],
    name: str | None = None,
    max_keys: int = 1024,
    idle: float | timedelta = 3600.0,
    around: bool = False,
) -> Decorator:
    """Guard a function with a guard per key (see `Keyed`), or with an `around` per key (see `KeyedAround`).

    Examples:
        >>> from seawall import CircuitBreaker
        >>> @keyed(CircuitBreaker, key=lambda host, path: host)
        ... async def fetch(host: str, path: str) -> str: ...
    """
    from seawall.policies.keyed import Keyed, KeyedAround

    chosen = KeyedAround if around else Keyed
    return _named(lambda named: chosen(named, factory, key=key, max_keys=max_keys, idle=idle), name)


@overload
def adaptive_bulkhead(fn: Callable[P, T], /) -> Callable[P, T]: ...
@overload
def adaptive_bulkhead(
    fn: str | None = None,
    /,
    *,
    algorithm: LimitAlgorithm = ...,
    initial_limit: int = ...,
    min_limit: int = ...,
    max_limit: int = ...,
    ramp_start: float = ...,
    ramp_end: float = ...,
    max_wait: float | timedelta = ...,
    aging: float | timedelta = ...,
    drops: Errors = ...,
    rng: Random | None = ...,
) -> Decorator: ...
def adaptive_bulkhead(fn: object = None, /, **settings: object) -> object:
    """Guard a function with an `AdaptiveBulkhead` of its own: bare, or with settings, and a name in front if you like.

    Examples:
        >>> @adaptive_bulkhead(initial_limit=10, max_wait=0.2)
        ... async def pay(amount: int) -> str: ...
    """
    from seawall.policies.adaptive_bulkhead import AdaptiveBulkhead

    if fn is None or isinstance(fn, str):
        return _named(lambda name: AdaptiveBulkhead(name, **settings), fn)  # type: ignore[arg-type]
    return AdaptiveBulkhead(label(fn))(fn)  # type: ignore[arg-type]


@overload
def load_shedder(fn: Callable[P, T], /) -> Callable[P, T]: ...
@overload
def load_shedder(
    fn: str | None = None,
    /,
    *,
    failure_rate: float | None = ...,
    window: float | timedelta = ...,
    minimum_calls: int = ...,
    max_rejection: float = ...,
    signals: Iterable[Signal] = ...,
    on: Errors = ...,
    ignore: Errors = ...,
    rng: Random | None = ...,
) -> Decorator: ...
def load_shedder(fn: object = None, /, **settings: object) -> object:
    """Guard a function with a `LoadShedder` of its own: bare, or with settings, and a name in front if you like.

    Examples:
        >>> @load_shedder(failure_rate=0.2)
        ... async def pay(amount: int) -> str: ...
    """
    from seawall.policies.load_shedder import LoadShedder

    if fn is None or isinstance(fn, str):
        return _named(lambda name: LoadShedder(name, **settings), fn)  # type: ignore[arg-type]
    return LoadShedder(label(fn))(fn)  # type: ignore[arg-type]


def chaos(
    name: str | None = None,
    *,
    rate: float = 0.001,
    latency: float | timedelta | Callable[[], float] | None = None,
    exception: Callable[[], BaseException] | None = None,
    result: Callable[[], object] | None = None,
    after: bool = False,
    enabled: Enabled = False,
    rng: Random | None = None,
) -> Decorator:
    """Disturb a function with a `Chaos` of its own.

    Examples:
        >>> @chaos(rate=0.1, exception=ConnectionError, enabled=True)
        ... async def pay(amount: int) -> str: ...
    """
    from seawall.policies.chaos import Chaos

    return _named(
        lambda named: Chaos(
            named,
            rate=rate,
            latency=latency,
            exception=exception,
            result=result,
            after=after,
            enabled=enabled,
            rng=rng,
        ),
        name,
    )


def rate_limiter(
    name: str | None = None,
    *,
    rate: float,
    per: float | timedelta = 1.0,
    burst: float | None = None,
    algorithm: Algorithm = "gcra",
    max_wait: float | timedelta = 0.0,
    drain_on: Callable[[object], bool | float | timedelta | None] | None = None,
    max_block: float | timedelta = 60.0,
) -> Decorator:
    """Guard a function with a `RateLimiter` of its own.

    Examples:
        >>> @rate_limiter(rate=100, burst=20)
        ... async def pay(amount: int) -> str: ...
    """
    from seawall.policies.rate_limiter import RateLimiter

    return _named(
        lambda named: RateLimiter(
            named,
            rate=rate,
            per=per,
            burst=burst,
            algorithm=algorithm,
            max_wait=max_wait,
            drain_on=drain_on,
            max_block=max_block,
        ),
        name,
    )


def deadline(after: float | timedelta, *, name: str | None = None) -> Decorator:
    """Guard a function with a `Deadline` of its own.

    Examples:
        >>> @deadline(5.0)
        ... async def page(number: int) -> str: ...
    """
    from seawall.policies.deadline import Deadline

    return _named(lambda named: Deadline(named, after), name)


def retry(
    name: str | None = None,
    *,
    on: On,
    on_result: Callable[..., bool] | None = None,
    attempts: int | None = 3,
    timeout: Duration | None = None,
    wait_initial: Duration = 0.1,
    wait_max: Duration = 5.0,
    jitter: bool = True,
    wait: WaitRule | None = None,
    stop: Stop | None = None,
    retry_after: Callable[..., Duration | None] | None = None,
    budget: Budget | None = None,
    until_first_item: bool = False,
) -> Decorator:
    """Guard a function with a `Retry` of its own.

    Examples:
        >>> @retry(on=ConnectionError, attempts=3, timeout=10.0)
        ... async def fetch(url: str) -> bytes: ...
    """
    from seawall.policies.retry import Retry

    return _named(
        lambda named: Retry(
            named,
            on=on,
            on_result=on_result,
            attempts=attempts,
            timeout=timeout,
            wait_initial=wait_initial,
            wait_max=wait_max,
            jitter=jitter,
            wait=wait,
            stop=stop,
            retry_after=retry_after,
            budget=budget,
            until_first_item=until_first_item,
        ),
        name,
    )


def fallback(
    steps: Step | tuple[Step, ...] = (),
    *,
    value: object = NOTHING,
    on: On = Exception,
    on_result: Callable[..., bool] | None = None,
    name: str | None = None,
) -> Decorator:
    """Guard a function with a `Fallback` of its own.

    Examples:
        >>> @fallback(value=[], on=ConnectionError)
        ... async def recommended(user: int) -> list[int]: ...
    """
    from seawall.policies.fallback import Fallback

    return _named(lambda named: Fallback(named, steps, value=value, on=on, on_result=on_result), name)


def hedge(
    name: str | None = None,
    *,
    delay: float | timedelta | Quantile,
    attempts: int = 2,
    on: Errors = Exception,
    acceptable: Callable[..., bool] | None = None,
    budget: Budget | None = None,
) -> Decorator:
    """Guard a function with a `Hedge` of its own.

    Examples:
        >>> @hedge(delay=0.1)
        ... async def search(words: str) -> list[str]: ...
    """
    from seawall.policies.hedge import Hedge

    return _named(
        lambda named: Hedge(named, delay=delay, attempts=attempts, on=on, acceptable=acceptable, budget=budget), name
    )


def cache(
    name: str | None = None,
    *,
    ttl: float | timedelta,
    key: Callable[..., Hashable] | None = None,
    max_entries: int = 1024,
    stale_ttl: float | timedelta = 0.0,
    refresh_ahead: float | timedelta = 0.0,
    on: Errors = Exception,
    cache_if: Callable[..., bool] | None = None,
) -> Decorator:
    """Guard a function with a `Cache` of its own.

    Examples:
        >>> @cache(ttl=60, stale_ttl=3600)
        ... async def price(item: str) -> float: ...
    """
    from seawall.policies.cache import Cache

    return _named(
        lambda named: Cache(
            named,
            ttl=ttl,
            key=key,
            max_entries=max_entries,
            stale_ttl=stale_ttl,
            refresh_ahead=refresh_ahead,
            on=on,
            cache_if=cache_if,
        ),
        name,
    )


@overload
def single_flight(fn: Callable[P, T], /) -> Callable[P, T]: ...
@overload
def single_flight(fn: str | None = None, /, *, key: Callable[..., Hashable] | None = ...) -> Decorator: ...
def single_flight(fn: object = None, /, *, key: Callable[..., Hashable] | None = None) -> object:
    """Let concurrent calls of a function with the same arguments share one run: a `Cache` that remembers nothing.

    Examples:
        >>> @single_flight
        ... async def price(item: str) -> float: ...
    """
    from seawall.policies.cache import Cache

    if fn is None or isinstance(fn, str):
        return _named(lambda name: Cache(name, ttl=0, key=key), fn)
    return Cache(label(fn), ttl=0)(fn)  # type: ignore[arg-type]


def timeout(after: float | timedelta, *, name: str | None = None) -> Decorator:
    """Guard a function with a `Timeout` of its own.

    Examples:
        >>> @timeout(2.0)
        ... async def pay(amount: int) -> str: ...
    """
    from seawall.policies.timeout import Timeout

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

    Examples:
        >>> @slo("answers", target=0.999, latency=0.5)
        ... async def answer(prompt: str) -> str: ...
    """
    from seawall.slo.objective import SLO

    return _named(lambda named: SLO(named, target=target, latency=latency, window=window, on=on, ignore=ignore), name)
