"""The peers of the overhead benchmark, each set to do the same job, and a proof that each one does it.

The same settings everywhere: a breaker that opens at 20 failures (or half of at least 20), 8 calls at once, a
rate that never limits, 2 seconds at most. Where seawall's stack has the SLO, a peer's stack has its retry.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import aiobreaker
import aiolimiter
import circuitbreaker
import hyx.bulkhead.api
import hyx.circuitbreaker.api
import hyx.ratelimit.api
import hyx.retry.api
import hyx.timeout.api
import nopanic
import purgatory
import tenacity

Function = Callable[[], Awaitable[Any]]
DISTRIBUTIONS = ("aiobreaker", "aiolimiter", "circuitbreaker", "hyx", "nopanic", "purgatory", "tenacity")
FAILURES = 20


def assembly(function: Function) -> Function:
    """The usual assembly: tenacity > aiobreaker > aiolimiter > Semaphore > timeout."""
    breaker = aiobreaker.CircuitBreaker(fail_max=FAILURES, timeout_duration=timedelta(seconds=30))
    limiter = aiolimiter.AsyncLimiter(1e6, 1)
    semaphore = asyncio.Semaphore(8)
    retry = tenacity.retry(
        stop=tenacity.stop_after_attempt(3),
        wait=tenacity.wait_exponential_jitter(0.1),
        retry=tenacity.retry_if_exception_type(ConnectionError),
        reraise=True,
    )

    async def bounded() -> Any:
        async with limiter, semaphore, asyncio.timeout(2.0):
            return await function()

    guarded: Function = retry(breaker(bounded))
    return guarded


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
}
INSTANCES: dict[str, Callable[[], object]] = {
    "aiobreaker": aiobreaker.CircuitBreaker,
    "nopanic_breaker": nopanic.circuit_breaker,
    "hyx_breaker": _hyx_breaker,
    "circuitbreaker": circuitbreaker.CircuitBreaker,
}


async def prove() -> None:
    """Stop the benchmark unless every peer opens after the failures, and every stack bounds concurrency."""
    for name, decorate in {**STACKS, **BREAKERS}.items():
        await _prove_it_opens(name, decorate)
    for name, decorate in STACKS.items():
        await _prove_it_bounds(name, decorate)


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
