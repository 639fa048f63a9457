"""The usual assembly of peers, which several benchmarks measure."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import aiobreaker
import aiolimiter
import tenacity

Function = Callable[[], Awaitable[Any]]
FAILURES = 20  # that open a breaker


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
