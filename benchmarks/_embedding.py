"""What `backend.py` measures on a real model: the encoder of sentences, alone, batched, and swapped under load."""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
from _harness import Samples

from seawall.engine import Deployment, Probation
from seawall.inference import Backend, MicroBatcher, Padding, models

CALLERS, ROUNDS, EACH = 16, 6, 12
ALONE, ARRIVALS, SWAPS = 300, 400, 3
BUCKETS = (8, 16, 24, 32, 48)
MAX_DELAY = 0.002
ENCODER, OUTPUT = "all-minilm-l6-v2", "sentence_embedding"

Feed = dict[str, np.ndarray]
Ask = Callable[[Feed], Awaitable[object]]


def texts(count: int, seed: int) -> list[Feed]:
    """Tokens of `count` made-up texts of 4 to 40 tokens, each padded to its bucket, as the batcher would."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        length = rng.randint(4, 40)
        padded = next(size for size in BUCKETS if size >= length)
        ids = np.zeros((1, padded), np.int64)
        mask = np.zeros((1, padded), np.int64)
        ids[0, :length] = [101, *(rng.randint(2000, 20_000) for _ in range(length - 2)), 102]
        mask[0, :length] = 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def loaded() -> Backend:
    """The encoder, as a server of its vectors alone loads it."""
    models.add(ENCODER)  # the first time
    folder: Path = models.prepare(ENCODER).folder
    return Backend.load(folder, outputs=(OUTPUT,))


def batched(backend: Backend) -> MicroBatcher:
    padding = Padding({"input_ids": 0}, buckets=BUCKETS, mask="attention_mask")
    samples = [{name: array[:, :8] for name, array in feed.items()} for feed in texts(1, 0)]
    return MicroBatcher(backend, max_size=CALLERS, max_delay=MAX_DELAY, padding=padding, samples=samples, owns=True)


async def timed(ask: Ask, feed: Feed) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    await ask(feed)
    return (time.perf_counter() - start) * 1e3


async def throughput(ask: Ask, feeds: list[Feed]) -> float:
    """Calls per second of `CALLERS` callers, each of which asks again once it is answered."""
    queue = iter(feeds)

    async def caller() -> None:
        for feed in queue:
            await ask(feed)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(caller())
    return len(feeds) / (time.perf_counter() - start)


async def arriving(ask: Ask, feeds: list[Feed], rate: float) -> list[float]:
    """Milliseconds of calls that arrive at random, `rate` a second, whoever is still being answered."""
    rng = random.Random(1)
    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        calls = []
        for feed in feeds:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            calls.append(group.create_task(timed(ask, feed)))
    return [call.result() for call in calls]


async def lags(stop: asyncio.Event) -> list[float]:
    """Milliseconds by which the loop wakes a task late that sleeps a millisecond, again and again."""
    found = []
    while not stop.is_set():
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        found.append((time.perf_counter() - start) * 1e3 - 1)
    return found


async def batching() -> tuple[dict[str, float], Samples]:
    """Batched against one by one: throughput, and what a call alone waits longer."""
    backend = loaded()
    async with batched(backend) as batcher:
        alone: dict[str, list[float]] = {"single_ms": [], "batched_ms": []}
        for feed in texts(ALONE, 2):  # by turns
            alone["single_ms"].append(await timed(backend.run, feed))
            alone["batched_ms"].append(await timed(batcher.run, feed))
        rates: dict[str, list[float]] = {"single_per_s": [], "batched_per_s": []}
        stop = asyncio.Event()
        watch = asyncio.create_task(lags(stop))
        for number in range(ROUNDS):
            feeds = texts(CALLERS * EACH, number)
            rates["single_per_s"].append(await throughput(backend.run, feeds))
            rates["batched_per_s"].append(await throughput(batcher.run, feeds))
        stop.set()
        late = await watch
        rate = 0.5 * statistics.median(rates["single_per_s"])
        some = texts(ARRIVALS, 3)
        half = {"single_half_ms": await arriving(backend.run, some, rate),
                "batched_half_ms": await arriving(batcher.run, some, rate)}  # fmt: skip
    single, several = statistics.median(rates["single_per_s"]), statistics.median(rates["batched_per_s"])
    figures = {
        "embedding_ms": statistics.median(alone["single_ms"]),
        "embedding_single_per_s": single,
        "embedding_batched_per_s": several,
        "batching_over_single": several / single,
        "batching_p50_added_ms": p(alone["batched_ms"], 0.5) - p(alone["single_ms"], 0.5),
        "batching_p99_added_ms": p(alone["batched_ms"], 0.99) - p(alone["single_ms"], 0.99),
        "batching_half_load_p99_ms": p(half["batched_half_ms"], 0.99),
        "single_half_load_p99_ms": p(half["single_half_ms"], 0.99),
        "loop_lag_p50_ms": p(late, 0.5),
        "loop_lag_p99_ms": p(late, 0.99),
    }
    return figures, {**alone, **rates, **half, "lag_ms": late}


async def swapping() -> tuple[dict[str, float], Samples]:
    """The encoder replaced by another copy of itself, `SWAPS` times, while callers ask without a pause."""
    took: list[float] = []
    failed, swaps, quiet = 0, [], 0
    known = texts(1, 5)[0]
    async with Deployment("encoder", batched(loaded())) as deployed:
        done = False

        async def caller(number: int) -> None:
            nonlocal failed
            for feed in itertools.cycle(texts(100, number)):
                if done:
                    return
                try:
                    took.append(await timed(deployed.run, feed))
                except Exception:
                    failed += 1

        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(caller(number))
            await asyncio.sleep(1.0)
            quiet = len(took)
            for _ in range(SWAPS):
                start = time.perf_counter()
                await deployed.swap(
                    lambda: batched(loaded()),
                    self_test=lambda model: model.run_sync(known),
                    probation=Probation(seconds=0.2),
                )
                swaps.append(time.perf_counter() - start)
            done = True
    before, during = took[:quiet], took[quiet:]
    figures = {
        "swap_failed_requests": float(failed),
        "swap_requests": float(len(during)),
        "swap_s": statistics.median(swaps),
        "swap_p99_ms": p(during, 0.99),
        "no_swap_p99_ms": p(before, 0.99),
    }
    return figures, {"before_swap_ms": before, "during_swap_ms": during, "swap_s": swaps}


def p(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
