"""What type checkers must see. Checked by mypy --strict and pyright, never run."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import assert_type

import tenacity

from seawall import (
    SLO,
    AdaptiveBulkhead,
    Bulkhead,
    Cache,
    Chaos,
    CircuitBreaker,
    Deadline,
    Fallback,
    Hedge,
    Keyed,
    KeyedAround,
    KeyedRateLimiter,
    LoadShedder,
    Pipeline,
    Quantile,
    RateLimiter,
    Rejected,
    Retry,
    RetryBudget,
    Timeout,
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
    presets,
    rate_limiter,
    retry,
    single_flight,
    slo,
    timeout,
)
from seawall.configuration import Pipelines

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


def is_passing(error: Exception) -> bool:
    return isinstance(error, OSError)


def is_empty(answer: str) -> bool:
    return not answer


def key_of(amount: int) -> int:
    return amount


def breaker_for(amount: int) -> CircuitBreaker:
    return CircuitBreaker(str(amount))


def retrying(amount: int) -> Retry:
    return Retry(str(amount), on=OSError)


budget = RetryBudget("shop", ratio=0.2)
shop = Pipeline(
    Deadline("shop", 10.0),
    Fallback("shop", str, on=(ConnectionError, Rejected)),
    Cache("shop", ttl=60, stale_ttl=timedelta(hours=1), key=key_of),
    Retry("shop", on=is_passing, wait=tenacity.wait_fixed(1), budget=budget),
    Hedge("shop", delay=Quantile(0.95, initial=0.5), budget=budget),
    Keyed("shop", breaker_for, key=key_of),
    KeyedAround("shop", retrying, key=key_of),
    KeyedRateLimiter("shop", rate=10, key=key_of),
    AdaptiveBulkhead("shop"),
    LoadShedder("shop"),
    Chaos("shop"),
)


@shop
async def bought(amount: int) -> str:
    return str(amount)


@retry("answers", on=(ConnectionError, TimeoutError), attempts=None, timeout=timedelta(seconds=10), budget=budget)
@hedge(delay=Quantile(), acceptable=bool, budget=budget)
@fallback((str, repr), value="", on=Exception, on_result=is_empty)
@cache(ttl=60, refresh_ahead=1.0, cache_if=is_empty)
@single_flight(key=key_of)
@keyed(breaker_for, key=key_of)
@adaptive_bulkhead(initial_limit=10)
@load_shedder(failure_rate=0.2)
@chaos(rate=0.1, exception=ConnectionError)
@deadline(5.0)
async def layered(amount: int, /, *, currency: str = "EUR") -> str:
    return f"{amount} {currency}"


@adaptive_bulkhead
@load_shedder
@single_flight
async def bare(amount: int) -> bytes:
    return bytes(amount)


@retry(on=ConnectionError, until_first_item=True)
@fallback(value="nothing")
async def words(count: int) -> AsyncIterator[str]:
    for number in range(count):
        yield str(number)


@presets.http_client("bank", timeout=None)
@retry(on=OSError)
@cache(ttl=1.0)
def looked_up(key: str) -> bytes:
    return key.encode()


@presets.model("model")
async def answered(prompt: str) -> str:
    return prompt


@Pipelines({})["pay"]
async def configured(amount: int) -> float:
    return float(amount)


class Client:
    @cache(ttl=1.0)
    async def cached(self, key: str) -> bytes:
        return key.encode()

    @classmethod
    @retry(on=OSError)
    async def made(cls, key: str) -> "Client":
        return cls()

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
    assert_type(await bought(5), str)
    assert_type(await layered(5, currency="USD"), str)
    assert_type(await bare(5), bytes)
    assert_type(words(5), AsyncIterator[str])
    assert_type(looked_up("key"), bytes)
    assert_type(await answered("why"), str)
    assert_type(await configured(5), float)
    assert_type(await client.cached("key"), bytes)
    assert_type(await Client.made("key"), Client)
    for attempt in Retry("loop", on=OSError).loop():
        with attempt:
            assert_type(attempt.number, int)
    async for attempt in Retry("loop", on=OSError).loop():
        with attempt:
            assert_type(attempt.number, int)
    async with payments:
        pass
    with places.scope():
        pass


async def mistakes(client: Client) -> None:
    await shared("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await stacked()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await client.fetch(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await guard.call(shared, "5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await layered("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bought()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await client.cached(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Retry("r")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Hedge("h")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Cache("c", ttl="60")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    CircuitBreaker("b", 0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def handles(error: Rejected) -> None:
    assert_type(error.policy, str)
    assert_type(error.retry_after, float | None)


as_callable: Callable[[int], Awaitable[str]] = stacked
