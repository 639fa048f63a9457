"""The peers of the overhead benchmark, each set to do the same job, and a proof that each one does it.

The same settings everywhere: a breaker that opens at 20 failures (or half of at least 20), 8 calls at once, a
rate that never limits, 2 seconds at most. Where seawall's stack has the SLO, a peer's stack has its retry.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import aiobreaker
import aiolimiter
import circuitbreaker
import hyx.bulkhead.api
import hyx.circuitbreaker.api
import hyx.fallback.api
import hyx.ratelimit.api
import hyx.retry.api
import hyx.timeout.api
import nopanic
import purgatory
import resilix
import stamina
import tenacity
from _assembly import FAILURES, Function, assembly

DISTRIBUTIONS = (
    "aiobreaker",
    "aiolimiter",
    "circuitbreaker",
    "hyx",
    "nopanic",
    "purgatory",
    "resilix",
    "stamina",
    "tenacity",
)


def nopanic_stack(function: Function) -> Function:
    """Five policies of nopanic."""
    stack = nopanic.compose(
        nopanic.retry(3, on=ConnectionError),
        nopanic.circuit_breaker(failure_threshold=0.5, min_calls=FAILURES, reset_timeout=30.0),
        nopanic.bulkhead(8, max_wait=0.2),
        nopanic.rate_limit(1e6, 1.0, burst=1e6, max_wait=0.2),
        nopanic.timeout(2.0),
    )
    guarded: Function = stack(function)
    return guarded


def hyx_stack(function: Function) -> Function:
    """Five policies of hyx."""
    timed = hyx.timeout.api.timeout(2.0)(function)
    limited = hyx.ratelimit.api.tokenbucket(1e6, 1.0, 1e6)(timed)
    bounded = hyx.bulkhead.api.bulkhead(8, 40)(limited)
    broken = _hyx_breaker()(bounded)
    guarded: Function = hyx.retry.api.retry(on=ConnectionError, attempts=3)(broken)
    return guarded


def _hyx_breaker() -> Any:
    return hyx.circuitbreaker.api.consecutive_breaker(failure_threshold=FAILURES, recovery_time_secs=30)


def aiobreaker_breaker(function: Function) -> Function:
    """Breaker of aiobreaker."""
    breaker = aiobreaker.CircuitBreaker(fail_max=FAILURES, timeout_duration=timedelta(seconds=30))
    guarded: Function = breaker(function)
    return guarded


def nopanic_breaker(function: Function) -> Function:
    """Breaker of nopanic."""
    breaker = nopanic.circuit_breaker(failure_threshold=0.5, min_calls=FAILURES, reset_timeout=30.0)
    guarded: Function = breaker(function)
    return guarded


def hyx_breaker(function: Function) -> Function:
    """Breaker of hyx."""
    guarded: Function = _hyx_breaker()(function)
    return guarded


def purgatory_breaker(function: Function) -> Function:
    """Breaker of purgatory, as a decorator."""
    factory = purgatory.AsyncCircuitBreakerFactory(default_threshold=FAILURES, default_ttl=30)
    guarded: Function = factory("peer")(function)
    return guarded


def circuitbreaker_breaker(function: Function) -> Function:
    """Breaker of circuitbreaker."""
    breaker = circuitbreaker.CircuitBreaker(failure_threshold=FAILURES, recovery_timeout=30)
    guarded: Function = breaker(function)
    return guarded


def resilix_breaker(function: Function) -> Function:
    """Breaker of resilix, which counts failures in a row and has no rate."""
    guarded: Function = resilix.CircuitBreaker(FAILURES, 30.0)(function)
    return guarded


def semaphore(function: Function) -> Function:
    """`asyncio.Semaphore`, whose waiters have no time limit."""
    places = asyncio.Semaphore(8)

    async def guarded() -> Any:
        async with places:
            return await function()

    return guarded


def nopanic_bulkhead(function: Function) -> Function:
    """Bulkhead of nopanic."""
    guarded: Function = nopanic.bulkhead(8, max_wait=0.2)(function)
    return guarded


def hyx_bulkhead(function: Function) -> Function:
    """Bulkhead of hyx."""
    guarded: Function = hyx.bulkhead.api.bulkhead(8, 40)(function)
    return guarded


def aiolimiter_limiter(function: Function) -> Function:
    """Limiter of aiolimiter."""
    limiter = aiolimiter.AsyncLimiter(1e6, 1)

    async def guarded() -> Any:
        async with limiter:
            return await function()

    return guarded


def nopanic_limiter(function: Function) -> Function:
    """Limiter of nopanic."""
    guarded: Function = nopanic.rate_limit(1e6, 1.0, burst=1e6)(function)
    return guarded


def hyx_limiter(function: Function) -> Function:
    """Limiter of hyx, whose bucket has no limit after a pause (2 s idle admit 2 s of tokens)."""
    guarded: Function = hyx.ratelimit.api.tokenbucket(1e6, 1.0, 1e6)(function)
    return guarded


def asyncio_timeout(function: Function) -> Function:
    """`asyncio.timeout`."""

    async def guarded() -> Any:
        async with asyncio.timeout(2.0):
            return await function()

    return guarded


def nopanic_timeout(function: Function) -> Function:
    """Timeout of nopanic."""
    guarded: Function = nopanic.timeout(2.0)(function)
    return guarded


def hyx_timeout(function: Function) -> Function:
    """Timeout of hyx."""
    guarded: Function = hyx.timeout.api.timeout(2.0)(function)
    return guarded


def tenacity_retry(function: Function) -> Function:
    """Retry of tenacity."""
    retry = tenacity.retry(
        stop=tenacity.stop_after_attempt(3),
        wait=tenacity.wait_exponential_jitter(0.1),
        retry=tenacity.retry_if_exception_type(ConnectionError),
        reraise=True,
    )
    guarded: Function = retry(function)
    return guarded


def stamina_retry(function: Function) -> Function:
    """Retry of stamina."""
    guarded: Function = stamina.retry(on=ConnectionError, attempts=3)(function)
    return guarded


def nopanic_retry(function: Function) -> Function:
    """Retry of nopanic."""
    guarded: Function = nopanic.retry(3, on=ConnectionError)(function)
    return guarded


def hyx_retry(function: Function) -> Function:
    """Retry of hyx."""
    guarded: Function = hyx.retry.api.retry(on=ConnectionError, attempts=3)(function)
    return guarded


def nopanic_hedge(function: Function) -> Function:
    """Hedge of nopanic."""
    guarded: Function = nopanic.hedge(delay=1.0)(function)
    return guarded


def nopanic_fallback(function: Function) -> Function:
    """Fallback of nopanic."""
    guarded: Function = nopanic.fallback(0, on=ConnectionError)(function)
    return guarded


def hyx_fallback(function: Function) -> Function:
    """Fallback of hyx."""

    async def nothing(error: Exception) -> int:
        return 0

    guarded: Function = hyx.fallback.api.fallback(nothing, on=ConnectionError)(function)
    return guarded


def nopanic_cache(function: Function) -> Function:
    """Cache of nopanic: a fresh hit."""
    guarded: Function = nopanic.cache(3600.0)(function)
    return guarded


def nopanic_full(function: Function) -> Function:
    """Fallback and retry of nopanic round its four other policies: its full stack."""
    guarded: Function = nopanic_fallback(nopanic_stack(function))
    return guarded


STACKS: dict[str, Callable[[Function], Function]] = {
    "assembly": assembly,
    "nopanic": nopanic_stack,
    "hyx": hyx_stack,
}
BREAKERS: dict[str, Callable[[Function], Function]] = {
    "aiobreaker": aiobreaker_breaker,
    "nopanic_breaker": nopanic_breaker,
    "hyx_breaker": hyx_breaker,
    "purgatory": purgatory_breaker,
    "circuitbreaker": circuitbreaker_breaker,
    "resilix": resilix_breaker,
}
OTHERS: dict[str, Callable[[Function], Function]] = {
    "nopanic_full": nopanic_full,
    "semaphore": semaphore,
    "nopanic_bulkhead": nopanic_bulkhead,
    "hyx_bulkhead": hyx_bulkhead,
    "aiolimiter": aiolimiter_limiter,
    "nopanic_limiter": nopanic_limiter,
    "hyx_limiter": hyx_limiter,
    "asyncio_timeout": asyncio_timeout,
    "nopanic_timeout": nopanic_timeout,
    "hyx_timeout": hyx_timeout,
    "tenacity_retry": tenacity_retry,
    "stamina_retry": stamina_retry,
    "nopanic_retry": nopanic_retry,
    "hyx_retry": hyx_retry,
    "nopanic_hedge": nopanic_hedge,
    "nopanic_fallback": nopanic_fallback,
    "hyx_fallback": hyx_fallback,
    "nopanic_cache": nopanic_cache,
}
INSTANCES: dict[str, Callable[[], object]] = {
    "aiobreaker": aiobreaker.CircuitBreaker,
    "nopanic_breaker": nopanic.circuit_breaker,
    "hyx_breaker": _hyx_breaker,
    "circuitbreaker": circuitbreaker.CircuitBreaker,
    "resilix": resilix.CircuitBreaker,
}


async def prove() -> None:
    """Stop the benchmark unless every peer does its job.

    Breakers and stacks open after the failures; stacks and bulkheads bound concurrency; retries run a failing call
    three times; fallbacks answer.
    """
    for name, decorate in {**STACKS, **BREAKERS}.items():
        await _prove_it_opens(name, decorate)
    for name, decorate in {**STACKS, **OTHERS}.items():
        if name in STACKS or name in {"semaphore", "nopanic_bulkhead", "hyx_bulkhead"}:
            await _prove_it_bounds(name, decorate)
        if name.endswith("_retry"):
            await _prove_it_retries(name, decorate)
        if name.endswith("_fallback"):
            await _prove_it_answers(name, decorate)


async def _prove_it_opens(name: str, decorate: Callable[[Function], Function]) -> None:
    called = 0

    async def fail() -> None:
        nonlocal called
        called += 1
        raise ValueError

    guarded = decorate(fail)
    for _ in range(FAILURES + 5):
        try:
            await guarded()
        except Exception:
            continue
    if called > FAILURES + 1:  # hyx opens when the threshold is passed, the others when it is reached
        raise SystemExit(f"{name} let {called} failing calls through instead of {FAILURES}")


async def _prove_it_bounds(name: str, decorate: Callable[[Function], Function]) -> None:
    inside, most = 0, 0

    async def work() -> None:
        nonlocal inside, most
        inside, most = inside + 1, max(most, inside + 1)
        await asyncio.sleep(0)
        inside -= 1

    guarded = decorate(work)
    await asyncio.gather(*(guarded() for _ in range(30)))
    if most != 8:
        raise SystemExit(f"{name} ran {most} calls at once instead of 8")


async def _prove_it_retries(name: str, decorate: Callable[[Function], Function]) -> None:
    called = 0

    async def fail_twice() -> int:
        nonlocal called
        called += 1
        if called < 3:
            raise ConnectionError
        return 1

    if await decorate(fail_twice)() != 1 or called != 3:
        raise SystemExit(f"{name} called {called} times instead of 3")


async def _prove_it_answers(name: str, decorate: Callable[[Function], Function]) -> None:
    async def fail() -> int:
        raise ConnectionError

    if await decorate(fail)() != 0:
        raise SystemExit(f"{name} did not answer")
