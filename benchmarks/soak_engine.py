"""Mixed traffic at twice an engine's capacity, with faults and random cancellation; the full run takes an hour.

    python benchmarks/soak_engine.py --minutes 60

Calls of four tenants and all priorities arrive at random, twice as many as the engine was measured to finish: short and
long prompts, shared beginnings, several samples, greedy and drawn, with deadlines, with slow readers, some of them
cancelled or left. Meanwhile runs of the model fail, run out of memory, hang and answer with NaN. Every answer, whole
or cut short, must be token for token what the prompt gets alone; every call must end; in the end rows, queue and cache
must be empty, threads gone, and memory beyond the cache as it was after the first quarter. A loss ends it with exit
code 1.
"""

import argparse
import asyncio
import contextlib
import gc
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _harness import print_figures, write_results

from seawall import Deadline, DeadlineExceededError, Engine, Priority, Rejected, priority
from seawall.engine import EngineSnapshot, StepStuckError
from seawall.inference import Decoder, models
from seawall.inference.errors import (
    GenerationCancelledError,
    NotFiniteOutputError,
    RuntimeExhaustedError,
    RuntimeFailure,
)
from seawall.inference.generate.batch import Batch
from seawall.inference.generate.sampling import Greedy, Sampling
from seawall.inference.runtime import ort

NAME = "smollm2-135m"
CONTEXT, ROWS, LONGEST = 512, 8, 40
STEP_TIMEOUT = 5.0  # seconds; a real step takes a few hundredths, unless others use the machine
STUCK = 120.0  # seconds after which a call that has not ended is one that never will
SLOPE = 1.0  # MB a minute that memory may grow by, which is noise: a call that leaked its cache would be 2 MB
_HARBOUR = "The harbour wall keeps the sea out of the town, and the town keeps the wall in repair. "
PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Count to ten.",
    "Who wrote Hamlet?",
    "Explain tides in one sentence.",
    "Write a haiku about ships.",
    _HARBOUR * 4 + "Summarise this.",
    _HARBOUR * 12 + "Summarise this.",
    _HARBOUR * 12 + "Who keeps the wall in repair?",
    "Repeat: one two three four five six seven eight nine ten. " * 8,
)
FAULTS = ("failure", "memory", "hang", "nan")


class LossError(AssertionError):
    """Something was lost, wrong, or never came."""


@dataclass
class Books:
    """What happened so far, and what must have."""

    expected: dict[tuple[str, float, int], list[int]]
    outcomes: Counter[str]
    faults: Counter[str]
    tokens: int = 0

    def check(self, prompt: str, temperature: float, index: int, tokens: list[int]) -> None:
        """Tokens are the beginning of what the prompt gets alone."""
        expected = self.expected[prompt, temperature, index]
        if tokens != expected[: len(tokens)]:
            raise LossError(f"{prompt[:40]!r}, sample {index} at {temperature}: {tokens} is no beginning of {expected}")
        self.tokens += len(tokens)


def alone(decoder: Decoder) -> dict[tuple[str, float, int], list[int]]:
    """The answers that every prompt gets when nobody else is there."""
    found = {}
    for prompt in PROMPTS:
        for temperature, index in ((0.0, 0), (0.8, 0), (0.8, 1), (0.8, 2)):
            rules = Sampling(temperature=temperature, seed=7 + index) if temperature else Greedy()
            with decoder.start(decoder.encode_chat(prompt), max_tokens=LONGEST, sampling=rules) as answer:
                found[prompt, temperature, index] = [step.token for step in answer if step.token is not None]
        for index in (1, 2):
            found[prompt, 0.0, index] = found[prompt, 0.0, 0]
    return found


@contextlib.contextmanager
def broken(chance: random.Random, books: Books, rate: float) -> Iterator[None]:
    """Runs of the model fail, each way at this rate."""
    run, run_rows = ort.run, Batch._run

    def fails(fault: str) -> bool:
        if chance.random() >= rate:
            return False
        books.faults[fault] += 1
        return True

    def running(session: Any, binding: Any, options: Any) -> None:
        if fails("failure"):
            raise RuntimeFailure("running the model", "a fault of this soak")
        if fails("memory"):
            raise RuntimeExhaustedError("running the model", "a fault of this soak")
        if chance.random() < rate / 10:
            books.faults["hang"] += 1
            until = time.monotonic() + 60
            while not options.terminate and time.monotonic() < until:
                time.sleep(0.01)
            raise GenerationCancelledError("stopped")
        run(session, binding, options)

    def rows(batch: Batch, *arguments: Any, **settings: Any) -> Any:
        found = run_rows(batch, *arguments, **settings)
        if fails("nan"):
            found[chance.randrange(len(found))][:] = np.nan
        return found

    with mock.patch.object(ort, "run", running), mock.patch.object(Batch, "_run", rows):
        yield


async def call(engine: Engine, chance: random.Random, books: Books) -> None:
    """One caller, of some sort."""
    prompt, temperature = chance.choice(PROMPTS), chance.choice((0.0, 0.0, 0.8))
    samples, most = chance.choice((1, 1, 1, 1, 2, 3)), chance.randint(1, LONGEST)
    slow = chance.random() < 0.05
    leaves_after = chance.randint(1, 10) if chance.random() < 0.1 else None
    tenant, level = chance.choice("aaabcd"), Priority(chance.randint(0, 4))
    guard = Deadline("page", chance.uniform(0.5, 20.0)) if chance.random() < 0.3 else None
    tokens: dict[int, list[int]] = {index: [] for index in range(samples)}

    async def read() -> None:
        pieces = engine.stream(prompt, max_tokens=most, temperature=temperature, seed=7, n=samples, tenant=tenant)
        came = 0
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if piece.token is not None:
                    tokens[piece.index].append(piece.token)
                came += 1
                if came == leaves_after:
                    books.outcomes["left"] += 1
                    return
                if slow:
                    await asyncio.sleep(0.05)
        books.outcomes["whole"] += 1
        for index, found in tokens.items():
            if len(found) != min(most, len(books.expected[prompt, temperature, index])):
                raise LossError(f"{prompt[:40]!r}: {len(found)} tokens of a whole answer of at most {most}")

    try:
        with priority(level):
            async with asyncio.timeout(STUCK):
                if guard is None:
                    await read()
                else:
                    async with guard.scope():
                        await read()
    except Rejected as error:
        books.outcomes[type(error).__name__] += 1
    except (
        DeadlineExceededError,
        NotFiniteOutputError,
        StepStuckError,
        RuntimeExhaustedError,
        RuntimeFailure,
    ) as error:
        books.outcomes[type(error).__name__] += 1
    except TimeoutError:
        raise LossError(f"{prompt[:40]!r} did not end in {STUCK:g} s") from None
    finally:
        for index, found in tokens.items():
            books.check(prompt, temperature, index, found)


async def capacity(engine: Engine, chance: random.Random, books: Books, seconds: float) -> float:
    """Calls a second that end when there is always one more."""
    ended, until = 0, time.monotonic() + seconds

    async def again() -> None:
        nonlocal ended
        while time.monotonic() < until:
            await call(engine, chance, books)
            ended += 1

    await asyncio.gather(*(again() for _ in range(ROWS)))
    return ended / seconds


async def storm(
    engine: Engine, chance: random.Random, books: Books, rate: float, look: Callable[[], None], until: float
) -> None:
    """Calls that arrive at random, so many a second, and of which every seventh is cancelled at some moment."""
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    while time.monotonic() < until:
        await asyncio.sleep(chance.expovariate(rate))
        task = asyncio.ensure_future(call(engine, chance, books))
        tasks.add(task)
        if chance.random() < 1 / 7:
            loop.call_later(chance.uniform(0.0, 2.0), task.cancel)
        for done in [task for task in tasks if task.done()]:
            tasks.discard(done)
            if done.cancelled():
                books.outcomes["cancelled"] += 1
            else:
                done.result()
        look()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, asyncio.CancelledError):
            books.outcomes["cancelled"] += 1
        elif isinstance(result, BaseException):
            raise result


def resident_mb() -> float:
    """Of this process, now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def slope_of(points: list[tuple[float, float]]) -> float:
    """Of the straight line through them."""
    if len(points) < 3:
        return 0.0
    x, y = np.array(points).T
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def require_nothing_left(snapshot: EngineSnapshot) -> None:
    """Rows, queue and cache are empty."""
    left = (snapshot.running, snapshot.waiting, snapshot.waiting_tokens, snapshot.cache_used_bytes)
    if any(left):
        raise LossError(f"left behind: running, waiting, tokens, bytes of cache = {left}")


async def soak(minutes: float, seed: int, rate: float) -> dict[str, float]:
    """The whole of it."""
    chance = random.Random(seed)
    models.add(NAME)
    decoder = await asyncio.to_thread(lambda: Decoder.load(NAME, precision="int8", kv="int8", context=CONTEXT))
    books = Books(await asyncio.to_thread(alone, decoder), Counter(), Counter())
    engine = Engine(
        lambda: decoder,
        name="soak",
        policies=(),
        rows=ROWS,
        prefix_cache_bytes=16 << 20,
        max_queued=32,
        max_wait=20.0,
        step_timeout=STEP_TIMEOUT,
    )
    memory: list[tuple[float, float]] = []
    begun = time.monotonic()

    def look() -> None:
        now = time.monotonic() - begun
        if not memory or now - memory[-1][0] >= 1.0:
            memory.append((now, resident_mb() - engine.snapshot().cache_committed_bytes / 1e6))
            if int(now) % 30 == 0:
                print(f"{now:6.0f} s {memory[-1][1]:6.0f} MB {engine.snapshot()}", file=sys.stderr, flush=True)

    async with engine:
        pace = await capacity(engine, chance, books, min(20.0, 12 * minutes))
        begun = time.monotonic()
        with broken(chance, books, rate):
            await storm(engine, chance, books, 2 * pace, look, begun + 60 * minutes)
        if not await engine.drain(STUCK):
            raise LossError("the engine does not drain")
        await asyncio.sleep(0.3)  # the thread looks at its memory ten times a second
        snapshot = engine.snapshot()
        require_nothing_left(snapshot)
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("seawall-soak")]
    if threads or decoder.active_sequences:
        raise LossError(f"left behind: threads {threads}, {decoder.active_sequences} sequences")
    gc.collect()
    later = [(at / 60, size) for at, size in memory if at > 15 * minutes]  # the first quarter fills caches
    slope = slope_of(later)
    if minutes >= 5 and slope > SLOPE:
        raise LossError(f"memory grows by {slope:.2f} MB a minute")
    if missing := [fault for fault in FAULTS if not books.faults[fault]]:
        print(f"no fault of these kinds came up: {missing}", file=sys.stderr)
    return {
        "minutes": minutes,
        "capacity_calls_per_s": pace,
        "offered_calls_per_s": 2 * pace,
        "tokens": float(books.tokens),
        "rss_slope_mb_per_min": slope,  # without the cache, which fills as answers come and go
        "rss_mb": resident_mb(),
        **{f"ended_{name}": float(count) for name, count in sorted(books.outcomes.items())},
        **{f"fault_{name}": float(count) for name, count in sorted(books.faults.items())},
        "shed": float(snapshot.shed),
        "stuck_steps": float(snapshot.stuck),
    }


def main() -> None:
    """Parse, soak, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault-rate", type=float, default=0.003, help="share of runs that fail, for each kind")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    figures = asyncio.run(soak(options.minutes, options.seed, options.fault_rate))
    print_figures("soak of the engine", figures)
    if options.json:
        write_results(options.json, figures, {}, ("onnxruntime", "numpy"))


if __name__ == "__main__":
    main()
