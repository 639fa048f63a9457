"""What the guards cost a call that succeeds, in CPU time beyond the bare await, and what a refusal costs.

five_guards     SLO, breaker, bulkhead, limiter and timeout around `async def f(): return 1`
full_stack      fallback and retry around them: eight policies
breaker ...     one policy alone; a cache's hit, a hedge that needs no second attempt, chaos switched off
reject          a call refused by an open breaker, the whole call with its `except`
bulkhead_1000   1,000 tasks, 10 places, a call that yields twice: calls per second over asyncio.Semaphore's
allocations     heap blocks a call in flight holds beyond those of the bare call
*_bytes         memory of one instance; of one key of a keyed limiter

With --peers also aiobreaker + asyncio.Semaphore + aiolimiter + tenacity + asyncio.timeout ("assembly"), the stacks
of nopanic and of hyx, and single policies, each first proven to do the same job.
"""

import asyncio
import itertools
import statistics
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

from _harness import Call, arguments, compare, print_figures, write_results

from seawall import (
    SLO,
    AdaptiveBulkhead,
    Bulkhead,
    Cache,
    Chaos,
    CircuitBreaker,
    CircuitOpenError,
    Deadline,
    Fallback,
    Hedge,
    KeyedRateLimiter,
    LoadShedder,
    Pipeline,
    RateLimiter,
    Retry,
    Timeout,
)

Figures = dict[str, float]


async def bare() -> int:
    return 1


def breaker(name: str = "b") -> CircuitBreaker:
    return CircuitBreaker(name, failure_rate=0.5, minimum_calls=20, reset_timeout=30.0)


def five_guards() -> Pipeline:
    return Pipeline(
        SLO("answers", target=0.999, latency=0.5),
        breaker(),
        Bulkhead("k", max_concurrent=8, max_queued=32, max_wait=0.2),
        RateLimiter("r", rate=1e6, burst=1e6),
        Timeout("t", 2.0),
    )


def own_cases() -> dict[str, Call]:
    return {
        "five_guards": five_guards()(bare),
        "slo": Pipeline(SLO("s", target=0.999, latency=0.5))(bare),
        "breaker": Pipeline(breaker())(bare),
        "bulkhead": Pipeline(Bulkhead("k", max_concurrent=8, max_queued=32, max_wait=0.2))(bare),
        "limiter": Pipeline(RateLimiter("r", rate=1e6, burst=1e6))(bare),
        "timeout": Pipeline(Timeout("t", 2.0))(bare),
        "full_stack": Pipeline(fallback(), retry(), *five_guards().policies)(bare),
        "deadline": Pipeline(Deadline("d", 2.0))(bare),
        "retry": Pipeline(retry())(bare),
        "fallback": Pipeline(fallback())(bare),
        "hedge": Pipeline(Hedge("h", delay=1.0))(bare),
        "cache": Pipeline(Cache("c", ttl=3600.0))(bare),
        "adaptive_bulkhead": Pipeline(AdaptiveBulkhead("a"))(bare),
        "load_shedder": Pipeline(LoadShedder("l"))(bare),
        "chaos": Pipeline(Chaos("x", exception=ConnectionError))(bare),
        "keyed_limiter": Pipeline(KeyedRateLimiter("kr", rate=1e6, burst=1e6, key=lambda: "tenant"))(bare),
    }


def retry() -> Retry:
    return Retry("r", on=ConnectionError, attempts=3)


def fallback() -> Fallback:
    return Fallback("f", value=0, on=ConnectionError)


def peer_cases() -> dict[str, Call]:
    import _overhead_peers as peers

    return {name: decorate(bare) for name, decorate in {**peers.STACKS, **peers.BREAKERS, **peers.OTHERS}.items()}


def peer_distributions() -> tuple[str, ...]:
    import _overhead_peers

    return _overhead_peers.DISTRIBUTIONS


async def refused() -> Call:
    """A call that an open breaker refuses."""

    async def fail() -> None:
        raise ValueError

    open_breaker = CircuitBreaker("open", failure_rate=0.5, minimum_calls=20, reset_timeout=3600.0)
    failing = Pipeline(open_breaker)(fail)
    for _ in range(20):
        try:
            await failing()
        except ValueError:
            continue

    async def call() -> None:
        try:
            await failing()
        except CircuitOpenError:
            return
        raise SystemExit("the open breaker let a call through")

    return call


async def throughput(guard: Callable[[Call], Call], calls: int = 20) -> float:
    """Calls per second of 1,000 tasks through ten places."""

    async def work() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    guarded = guard(work)

    async def client() -> None:
        for _ in range(calls):
            await guarded()

    start = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(1000):
            tasks.create_task(client())
    return 1000 * calls / (time.perf_counter() - start)


def through_bulkhead(function: Call) -> Call:
    guarded: Call = Pipeline(Bulkhead("crowd", max_concurrent=10, max_queued=1000, max_wait=60.0))(function)
    return guarded


def through_semaphore(function: Call) -> Call:
    semaphore = asyncio.Semaphore(10)

    async def guarded() -> object:
        async with semaphore:
            return await function()

    return guarded


async def contention(rounds: int = 9) -> dict[str, list[float]]:
    """Throughput of both, in alternating order."""
    found: dict[str, list[float]] = {"bulkhead": [], "semaphore": []}
    guards = {"bulkhead": through_bulkhead, "semaphore": through_semaphore}
    for number in range(rounds):
        for name in sorted(guards, reverse=bool(number % 2)):
            found[name].append(await throughput(guards[name]))
    return found


async def allocations() -> float:
    """Heap blocks held inside a call through the five guards, beyond those inside the bare call."""
    held = 0

    async def probe() -> None:
        nonlocal held
        held = sys.getallocatedblocks()

    async def inside(call: Callable[[], Awaitable[Any]]) -> list[int]:
        blocks = []
        for _ in range(200):
            before = sys.getallocatedblocks()
            await call()
            blocks.append(held - before)
        return blocks

    guarded = five_guards()(probe)
    await inside(guarded)
    return statistics.median(await inside(guarded)) - statistics.median(await inside(probe))


def instance_bytes(make: Callable[[], object], count: int = 1000) -> float:
    """Bytes per instance, all it refers to included, shared things left out."""
    kept: list[object] = [make(), *[None] * count]  # the first one pays for what all share
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(1, count + 1):
        kept[number] = make()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / count


def memory(*, peers: bool) -> Figures:
    names = [f"breaker {number}" for number in range(1001)]
    numbers = itertools.count()
    figures = {"breaker_bytes": instance_bytes(map(breaker, names).__next__)}
    tenants = KeyedRateLimiter("tenants", rate=10, burst=5, max_keys=2000, key=str)
    figures["keyed_entry_bytes"] = instance_bytes(lambda: tenants[f"tenant {next(numbers)}"].enter(0.0), 1000)
    if peers:
        import _overhead_peers

        for name, make in _overhead_peers.INSTANCES.items():
            figures[f"{name}_bytes"] = instance_bytes(make)
    return figures


async def measure(*, peers: bool) -> tuple[Figures, dict[str, Any]]:
    if peers:
        import _overhead_peers

        await _overhead_peers.prove()
    cases = {**own_cases(), **(peer_cases() if peers else {}), "reject": await refused()}
    found = await compare(bare, cases)
    figures = {"bare_ns": found.bare.median}
    figures |= {f"{name}_ns": times.median for name, times in found.added.items()}
    figures["reject_ns"] += figures["bare_ns"]  # the bare function never runs, so nothing is subtracted
    for peer in ("assembly", "nopanic", "hyx"):
        if peer in found.added:
            figures[f"five_guards_over_{peer}"] = figures["five_guards_ns"] / figures[f"{peer}_ns"]
    if "nopanic_full" in found.added:
        figures["full_stack_over_nopanic_full"] = figures["full_stack_ns"] / figures["nopanic_full_ns"]
    crowd = await contention()
    ratios = [ours / theirs for ours, theirs in zip(crowd["bulkhead"], crowd["semaphore"], strict=True)]
    figures["bulkhead_1000_over_semaphore"] = statistics.median(ratios)
    figures["allocations_per_call"] = await allocations()
    figures |= memory(peers=peers)
    samples: dict[str, Any] = {"bare": found.bare.as_samples(), "calls_per_second": crowd}
    samples["added"] = {name: times.as_samples() for name, times in found.added.items()}
    return {name: round(value, 4) for name, value in figures.items()}, samples


def main() -> None:
    options = arguments(__doc__)
    figures, samples = asyncio.run(measure(peers=options.peers))
    print_figures("overhead: CPU time added to a bare await", figures)
    if options.json:
        write_results(options.json, figures, samples, peer_distributions() if options.peers else ())


if __name__ == "__main__":
    main()
