"""What the router costs, what it adds to the engine alone, and what becomes of five times the load it can carry.

What it costs is CPU time in this process, of streams from an engine that has its words ready, without a socket.

Both run the same model with the same settings: the engine in this process, the router as `seawall serve` in one of its
own, asked over loopback by clients that do no more than count. They take turns within a round, so a slow minute of
the machine slows both. No prompt begins like another, so nothing comes out of the prefix cache.
"""

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any, NamedTuple

from seawall import Engine
from seawall.engine import ModelInfo, Piece, Usage
from seawall.web.openai import OpenAIRouter

MODEL = "smollm2-135m"
CLIENTS = (1, 4, 16)
ROUNDS = 7
TOKENS = 32  # of each answer
ROWS = 16

OVERLOAD = 5  # times the capacity
OVERLOAD_ROWS = 2  # more carry little more on two cores, and make every answer slower
OVERLOAD_TOKENS = 16
OVERLOAD_SECONDS = 15.0
_numbers = itertools.count(1000)


class Asked(NamedTuple):
    """One request: seconds to its first token and to its end, its tokens and its status."""

    first: float
    whole: float
    tokens: int
    status: int = 200
    well_formed: bool = True


Ask = Callable[[int], Awaitable[Asked]]


def question() -> list[dict[str, str]]:
    """A prompt that begins like no other, and of the same length as all."""
    return [{"role": "user", "content": f"{next(_numbers)} ships: tell me what they carry, and why."}]


def engine_alone(engine: Engine) -> Ask:
    """Ask without a router."""

    async def ask(tokens: int) -> Asked:
        began = time.perf_counter()
        first, said = 0.0, 0
        async with aclosing(engine.stream(question(), max_tokens=tokens, temperature=1.0, seed=1)) as pieces:
            async for _ in pieces:
                first = first or time.perf_counter() - began
                said += 1
        return Asked(first, time.perf_counter() - began, said)

    return ask


def through_router(port: int) -> Ask:
    """Ask over a connection of its own, and count events."""

    async def ask(tokens: int) -> Asked:
        body = json.dumps(
            {
                "model": MODEL,
                "messages": question(),
                "max_tokens": tokens,
                "seed": 1,
                "temperature": 1.0,
                "stream": True,
            }
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            status = int((await reader.readline()).split()[1])
            if status != 200:
                raw = await reader.read()
                return Asked(0.0, time.perf_counter() - began, 0, status, well_formed(raw))
            first, said = 0.0, 0
            async for line in reader:
                if b'"content":"' in line and b'"role"' not in line:
                    first = first or time.perf_counter() - began
                    said += 1
            return Asked(first, time.perf_counter() - began, said)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    return ask


def well_formed(raw: bytes) -> bool:
    """Whether a refusal says in OpenAI's shape what is wrong, and when to come back."""
    head, _, body = raw.partition(b"\r\n\r\n")
    try:
        named = set(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return False
    return b"retry-after: " in head.lower() and named == {"message", "type", "param", "code"}


@contextlib.contextmanager
def router(*options: str) -> Iterator[int]:
    """The port of a running `seawall serve`."""
    command = [sys.executable, "-m", "seawall", "serve", MODEL, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            yield int(line.rsplit(":", 1)[1].partition("/")[0])
        finally:
            process.terminate()


async def at_once(ask: Ask, clients: int, tokens: int, requests: int) -> tuple[list[Asked], float]:
    """`clients` that ask one request after the other, `requests` together; and tokens a second of all."""

    async def client() -> list[Asked]:
        return [await ask(tokens) for _ in range(requests // clients)]

    began = time.perf_counter()
    told = [one for each in await asyncio.gather(*(client() for _ in range(clients))) for one in each]
    return told, sum(one.tokens for one in told) / (time.perf_counter() - began)


async def compare(engine: Engine, port: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Time to the first token and tokens a second, of both, for each number of clients."""
    ways = {"engine": engine_alone(engine), "router": through_router(port)}
    samples: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for clients in CLIENTS:
        first: dict[str, list[float]] = {name: [] for name in ways}
        speed: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(-1, ROUNDS):  # the first is to warm up
            order = list(ways)
            random.Random(number).shuffle(order)
            for name in order:
                told, rate = await at_once(ways[name], clients, TOKENS, max(4, clients))
                if number >= 0:
                    first[name].append(statistics.median(one.first for one in told))
                    speed[name].append(rate)
        for name in ways:
            figures[f"{name}_ttft_{clients}_ms"] = 1000 * statistics.median(first[name])
            figures[f"{name}_{clients}_tok_s"] = statistics.median(speed[name])
        pairs = list(zip(first["router"], first["engine"], strict=True))
        figures[f"router_ttft_added_{clients}_ms"] = 1000 * statistics.median(one - other for one, other in pairs)
        rates = zip(speed["router"], speed["engine"], strict=True)
        figures[f"router_over_engine_{clients}"] = statistics.median(one / other for one, other in rates)
        samples[f"clients_{clients}"] = {"ttft_s": first, "tok_s": speed}
    figures["router_ttft_added_ms"] = figures["router_ttft_added_1_ms"]
    return figures, samples


async def arrivals(rate: float, seconds: float) -> AsyncIterator[None]:
    """Calls at random (Poisson) times, `rate` a second, whatever becomes of them."""
    rng = random.Random(0)
    due = began = time.perf_counter()
    while due - began < seconds:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        yield


async def overload(port: int) -> tuple[dict[str, float], dict[str, Any]]:
    """What becomes of accepted and refused requests at five times the capacity."""
    ask = through_router(port)
    await at_once(ask, OVERLOAD_ROWS, OVERLOAD_TOKENS, 4 * OVERLOAD_ROWS)  # warm-up
    alone, _ = await at_once(ask, 1, OVERLOAD_TOKENS, 100)
    began = time.perf_counter()
    full, _ = await at_once(ask, OVERLOAD_ROWS, OVERLOAD_TOKENS, 100 * OVERLOAD_ROWS)
    capacity = len(full) / (time.perf_counter() - began)
    began = time.perf_counter()
    tasks = []
    async for _ in arrivals(OVERLOAD * capacity, OVERLOAD_SECONDS):
        tasks.append(asyncio.ensure_future(ask(OVERLOAD_TOKENS)))
    told = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - began
    good = [one for one in told if one.status == 200]
    refused = [one for one in told if one.status != 200]
    figures = {
        "capacity_rps": capacity,
        "goodput_at_5x": len(good) / seconds / capacity,
        "uncontended_p99_ms": 1000 * p99([one.whole for one in alone]),
        "full_p99_ms": 1000 * p99([one.whole for one in full]),
        "accepted_p99_at_5x_ms": 1000 * p99([one.whole for one in good]),
        "refused_p50_ms": 1000 * statistics.median(one.whole for one in refused),
        "refused_p99_ms": 1000 * p99([one.whole for one in refused]),
        "refused_well_formed": sum(one.well_formed and one.status in {429, 503} for one in refused) / len(refused),
    }
    figures["accepted_p99_ratio_at_5x"] = figures["accepted_p99_at_5x_ms"] / figures["uncontended_p99_ms"]
    samples = {
        "offered_rps": OVERLOAD * capacity,
        "statuses": {str(k): n for k, n in Counter(one.status for one in told).items()},
    }
    return figures, samples


class Ready:
    """An engine that has its words ready."""

    name = "ready"

    def info(self) -> ModelInfo:
        """A model of some kind."""
        return ModelInfo(self.name, "int8", "fp32", 2048, 1000)

    async def stream(self, prompt: object, **settings: object) -> AsyncIterator[Piece]:
        """Words."""
        for number in range(TOKENS):
            last = number == TOKENS - 1
            yield Piece("word ", number, "stop" if last else None, usage=Usage(9, 0, TOKENS) if last else None)


async def costs(requests: int = 1000) -> tuple[dict[str, float], dict[str, Any]]:
    """Microseconds of CPU to the first event of a stream, and for each token after it."""
    router = OpenAIRouter(Ready(), timeout=30.0)  # type: ignore[arg-type]
    body = json.dumps({"model": "ready", "messages": question(), "stream": True}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
    scope |= {"headers": [(b"content-type", b"application/json")]}  # type: ignore[dict-item]
    first: list[float] = []
    each: list[float] = []
    marks: list[float] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        marks.append(time.process_time())

    for _ in range(requests):
        marks.clear()
        began = time.process_time()
        await router(scope, receive, send)
        first.append(1e6 * (marks[1] - began))  # after the headers
        each.append(1e6 * (marks[-1] - marks[1]) / (TOKENS - 1))
    figures = {"router_first_byte_us": statistics.median(first), "router_token_us": statistics.median(each)}
    return figures, {"first_byte_us": first, "token_us": each}


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[int(0.99 * (len(values) - 1))]


def measure() -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Figures, raw samples, and what to say about them."""

    async def main() -> tuple[dict[str, float], dict[str, Any]]:
        own, spent = await costs()
        with router("--rows", str(ROWS)) as port:
            async with Engine.load(MODEL, rows=ROWS) as engine:
                figures, samples = await compare(engine, port)
        with router("--rows", str(OVERLOAD_ROWS), "--max-queued", "0") as port:
            more, others = await overload(port)
        return {**own, **figures, **more}, {"costs": spent, **samples, "overload": others}

    figures, samples = asyncio.run(main())
    notes = [
        "router_first_byte_us, router_token_us: CPU of the router alone, for the first event and each token after it.",
        "engine_*, router_*: the engine alone, and through the router, at so many clients, which share its cores here.",
        f"*_at_5x: {OVERLOAD_ROWS} rows, no queue; goodput over the capacity, p99 over that of a lone client.",
    ]
    return figures, samples, notes
