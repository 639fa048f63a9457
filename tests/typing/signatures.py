"""What type checkers must see. Checked by mypy --strict and pyright, never run."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import assert_type

from seawall import (
    SLO,
    Bulkhead,
    CircuitBreaker,
    Pipeline,
    RateLimiter,
    Rejected,
    Timeout,
    breaker,
    bulkhead,
    rate_limiter,
    slo,
    timeout,
)

payments = CircuitBreaker("payments")
places = Bulkhead("places", max_concurrent=8)
guard = Pipeline(SLO("answers", target=0.999), payments, places, RateLimiter("rate", rate=10), Timeout("t", 2.0))


@payments
async def shared(amount: int, *, currency: str = "EUR") -> str:
    return f"{amount} {currency}"


@slo("answers", target=0.999, latency=0.5)
@breaker(failure_rate=0.5)
@bulkhead(max_concurrent=8)
@rate_limiter(rate=100)
@timeout(2.0)
async def stacked(amount: int) -> str:
    return str(amount)


@breaker
def plain(amount: int) -> bytes:
    return bytes(amount)


@breaker("named", minimum_calls=5)
async def stream(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


@places
def lines(count: int) -> Iterator[str]:
    yield from map(str, range(count))


@guard
async def piped(amount: int, /) -> float:
    return float(amount)


class Client:
    @payments
    async def fetch(self, key: str) -> bytes:
        return key.encode()

    @staticmethod
    @payments
    async def ping() -> bool:
        return True


async def uses(client: Client) -> None:
    assert_type(await shared(5, currency="USD"), str)
    assert_type(await stacked(5), str)
    assert_type(plain(5), bytes)
    assert_type(stream(5), AsyncIterator[int])
    assert_type(lines(5), Iterator[str])
    assert_type(await piped(5), float)
    assert_type(await client.fetch("key"), bytes)
    assert_type(await Client.ping(), bool)
    assert_type(await guard.call(shared, 5, currency="USD"), str)
    assert_type(guard.call_sync(plain, 5), bytes)
    async with payments:
        pass
    with places.scope():
        pass


async def mistakes(client: Client) -> None:
    await shared("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await stacked()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await client.fetch(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await guard.call(shared, "5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    CircuitBreaker("b", 0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def handles(error: Rejected) -> None:
    assert_type(error.policy, str)
    assert_type(error.retry_after, float | None)


as_callable: Callable[[int], Awaitable[str]] = stacked
