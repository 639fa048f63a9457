"""What an engine adds around the model, and how soon it lets go. Times are of the wall clock.

Figures:
    loop_idle_p50/p99_ms      how late a sleep of 1 ms on the event loop is while nothing runs
    loop_p50/p99_ms           the same while 8 answers decode and new prompts of 300 tokens are read all the while
    step_p50/p99_ms           between two pieces of one of those answers
    cancel_p50/p99_ms         from closing one of 8 streams to its row being free
    cancel_over_step          cancel_p99_ms by step_p99_ms: at most one step, so at most about 1
    refusal_us                a call that is refused by a full queue, its prompt read by the tokenizer before
    engine_over_batch         tokens/s of 8 streams by those of `ContinuousBatch` alone, the same prompts, interleaved
"""

import asyncio
import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from _harness import arguments, print_figures, write_results

from seawall import Engine
from seawall.engine import Piece, QueueFullError
from seawall.inference import Decoder, models
from seawall.inference.generate.rows.continuous import ContinuousBatch
from seawall.inference.generate.rows.request import Request

NAME = "smollm2-135m"
ROWS, NEW_TOKENS, ROUNDS = 8, 48, 5
PROMPTS = [f"Write a few sentences about the number {number}." for number in range(ROWS)]
LONG = "The harbour wall keeps the sea out of the town. " * 30

Samples = defaultdict[str, list[float]]


@contextlib.asynccontextmanager
async def lateness(late: list[float]) -> AsyncIterator[None]:
    """Milliseconds that a sleep of 1 ms returns too late, as long as the block runs."""

    async def tick() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append((time.perf_counter() - begun - 0.001) * 1e3)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.wait([ticking])


async def decode_and_read(engine: Engine, samples: Samples, number: int) -> None:
    """8 rows: 6 of them decode, and prompts come one after the other for the last two."""
    done = asyncio.Event()

    async def decode(prompt: str) -> None:
        last = None  # the first piece comes after its prompt was read
        async with contextlib.aclosing(engine.stream(prompt, max_tokens=NEW_TOKENS)) as pieces:
            async for _ in pieces:
                now = time.perf_counter()
                if last is not None:
                    samples["step_ms"].append((now - last) * 1e3)
                last = now

    async def read(which: int) -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            await engine.generate(f"{number}-{which}-{turn} {LONG}", max_tokens=1)

    async with asyncio.TaskGroup() as tasks:
        for which in range(2):
            tasks.create_task(read(which))
        await asyncio.gather(*(decode(prompt) for prompt in PROMPTS[: ROWS - 2]))
        done.set()


async def cancel(engine: Engine, samples: Samples) -> None:
    """Leave one of 8 streams in the middle, and see when its row is free."""
    streams = [engine.stream(prompt, max_tokens=NEW_TOKENS) for prompt in PROMPTS]
    for stream in streams:
        await anext(stream)
    others = [asyncio.create_task(_read_all(stream)) for stream in streams[1:]]
    while engine.snapshot().running < ROWS:  # noqa: ASYNC110 - a thread decides it, here and below
        await asyncio.sleep(0)
    begun = time.perf_counter()
    await streams[0].aclose()
    while engine.snapshot().running == ROWS:  # noqa: ASYNC110
        await asyncio.sleep(0)
    samples["cancel_ms"].append((time.perf_counter() - begun) * 1e3)
    for task in others:
        task.cancel()
    await asyncio.wait(others)
    while engine.snapshot().running:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def _read_all(stream: AsyncGenerator[Piece, None]) -> None:
    async with contextlib.aclosing(stream):
        async for _ in stream:
            pass


async def refusals(samples: Samples, decoder: Decoder) -> None:
    """A queue of no places behind one row that is busy."""
    kept: Any = _Kept(decoder)
    async with Engine(lambda: kept, policies=(), rows=1, max_queued=0) as engine:
        busy = asyncio.create_task(engine.generate(PROMPTS[0], max_tokens=200))
        while not engine.snapshot().running:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        for _ in range(100):
            begun = time.perf_counter()
            with contextlib.suppress(QueueFullError):
                await engine.generate(PROMPTS[1])
            samples["refusal_us"].append((time.perf_counter() - begun) * 1e6)
        busy.cancel()
        await asyncio.wait([busy])


class _Kept:
    """A decoder that stays open; engines take it for one without rows, and it need not be more here."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __getattr__(self, name: str) -> object:
        return getattr(self._decoder, name)

    def close(self) -> None:
        """Not yet."""


def batch_alone(decoder: Decoder) -> float:
    """Tokens per second of 8 rows with nothing around them."""
    with ContinuousBatch(decoder, rows=ROWS, prefix_cache_bytes=0) as batch:
        for prompt in PROMPTS:
            batch.join(Request(prompt=tuple(decoder.encode_chat(prompt)), max_tokens=NEW_TOKENS))
        begun, tokens = time.perf_counter(), 0
        while batch.rows_in_use:
            tokens += sum(step.token is not None for advance in batch.step() for step in advance.steps)
        return tokens / (time.perf_counter() - begun)


async def through_engine(engine: Engine) -> float:
    """The same, as 8 callers get them."""
    begun = time.perf_counter()
    answers = await asyncio.gather(*(engine.generate(prompt, max_tokens=NEW_TOKENS) for prompt in PROMPTS))
    return sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - begun)


async def measure() -> Samples:
    """All of it."""
    samples: Samples = defaultdict(list)
    decoder = Decoder.load(NAME, precision="int8", kv="int8")
    await refusals(samples, decoder)
    async with Engine(lambda: decoder, policies=(), rows=ROWS, prefix_cache_bytes=0) as engine:
        await engine.warm_up()
        for number in range(ROUNDS):
            async with lateness(samples["loop_idle_ms"]):
                await asyncio.sleep(0.5)
            async with lateness(samples["loop_ms"]):
                await decode_and_read(engine, samples, number)
            for _ in range(4):
                await cancel(engine, samples)
            samples["batch_tok_s"].append(await asyncio.to_thread(batch_alone, decoder))
            samples["engine_tok_s"].append(await through_engine(engine))
    return samples


def percentile(values: list[float], percent: int) -> float:
    """Of the samples, the value that so many percent do not exceed."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__)
    models.add(NAME)
    samples = asyncio.run(measure())
    figures = {}
    for name in ("loop_idle_ms", "loop_ms", "step_ms", "cancel_ms"):
        for percent in (50, 99):
            figures[name.replace("_ms", f"_p{percent}_ms")] = percentile(samples[name], percent)
    figures["cancel_over_step"] = figures["cancel_p99_ms"] / figures["step_p99_ms"]
    figures["refusal_us"] = statistics.median(samples["refusal_us"])
    pairs = zip(samples["engine_tok_s"], samples["batch_tok_s"], strict=True)
    figures["engine_over_batch"] = statistics.median(one / other for one, other in pairs)
    figures["engine_tok_s"] = statistics.median(samples["engine_tok_s"])
    print_figures("engine: smollm2-135m, int8, 8 rows", figures)
    if options.json:
        write_results(options.json, figures, dict(samples), ("onnxruntime", "numpy"))


if __name__ == "__main__":
    main()
