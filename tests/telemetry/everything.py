"""A service with a policy of every kind and a model's answers, for what is to be seen of all: `everything.py 0`.

Calls fail, are refused, retried and answered late, so that no counter stays where it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, start_http_server

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
    LoadShedder,
    Pipeline,
    RateLimiter,
    Retry,
    RetryBudget,
    Timeout,
)
from seawall.core import answering
from seawall.core.answering import Asked
from seawall.engine.deployment import Deployment
from seawall.engine.downgrade import Downgrade
from seawall.engine.metering import EngineMeter
from seawall.engine.replicas import Replicas
from seawall.engine.supervision import Supervised
from seawall.slo.brownout import Adjust, BrownOut, Refuse
from seawall.telemetry import install

budget = RetryBudget("orders", ratio=0.5)
dimmer = BrownOut("orders", [Adjust(budget, ratio=0.02), Refuse()], minimum_calls=100_000)
guard = Pipeline(
    SLO("orders", target=0.99, latency=0.2, percentiles=True, actions=[dimmer]),
    dimmer,
    Deadline("orders", 5.0),
    LoadShedder("orders", failure_rate=0.9),
    Fallback("orders", value="nothing"),
    Retry("orders", on=ConnectionError, attempts=2, wait=0, budget=budget),
    CircuitBreaker("orders", failure_rate=0.9, minimum_calls=5),
    Bulkhead("orders", max_concurrent=2),
    AdaptiveBulkhead("orders"),
    RateLimiter("orders", rate=500, max_wait=0.0),
    Chaos("orders", exception=ConnectionError, rate=0.01, enabled=True),
    Timeout("orders", 0.5),
    name="orders",
)
nothing = SimpleNamespace(close=lambda: None)
models = (
    EngineMeter("tiny"),
    Deployment("tiny", nothing),
    Supervised("tiny", lambda: nothing),
    Replicas("tiny", {"a": nothing, "b": nothing}),
    Downgrade("tiny", nothing, nothing),
)
numbers = itertools.count()


@guard
async def order() -> str:
    number = next(numbers)
    await asyncio.sleep(0.002)
    if number % 3 == 0:
        raise ConnectionError
    return "done"


@Cache("stock", ttl=0.05)
async def stock() -> int:
    return 1


@Keyed("shops", CircuitBreaker, key=str)
async def shop(name: str) -> str:
    return name


@Pipeline(SLO("answers", target=0.9), Hedge("answers", delay=0.001), name="answers")
async def answer(fails: bool) -> None:
    with answering.watched(Asked("tiny", "?", 9)) as told:
        told.read(7)
        for index in range(4):
            await asyncio.sleep(0.001)
            if fails:
                raise RuntimeError
            told.piece("word ", "stop" if index == 3 else None)


async def main() -> None:
    registry = CollectorRegistry()
    install(registry=registry)
    server, _ = start_http_server(int(sys.argv[1]), "127.0.0.1", registry)
    sys.stdout.write(f"metrics on http://127.0.0.1:{server.server_port}/metrics\n")
    sys.stdout.flush()
    for turn in itertools.count():
        work = [order(), order(), order(), stock(), shop("one"), answer(turn % 4 == 0)]
        await asyncio.gather(*work, return_exceptions=True)
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
