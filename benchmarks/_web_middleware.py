"""What the ASGI middleware adds to a request: in the process, where nothing else is in the way, and over a socket.

In the process each request is timed on its own. Blocks of requests to the bare application and to each case alternate
in random order; what is added is the difference of the medians, and of the 99th percentiles, over all blocks. Over a
socket uvicorn runs in a process of its own, and clients keep their connections open. slowapi limits the same route of
the same application (--peers), so it is compared with a middleware that limits by client too.

Run alone: python benchmarks/_web_middleware.py [--json FILE] [--peers]
"""

import asyncio
import importlib
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvicorn
from _harness import arguments, print_figures, write_results
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from seawall import CircuitBreaker, KeyedRateLimiter, LoadShedder
from seawall.web import SeawallMiddleware

Figures = dict[str, float]
Samples = dict[str, Any]
Rounds = dict[str, list[float]]
BLOCKS, REQUESTS = 60, 500  # in the process
WARM_UP = 500
ROUNDS, SECONDS, CLIENTS = 8, 1.0, 8  # over a socket
EVENTS = 150  # first bytes of server-sent events, each case
HEADERS = [(b"host", b"shop"), (b"user-agent", b"bench"), (b"accept", b"*/*"), (b"authorization", b"token")]


async def plain(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


async def events(request: Request) -> StreamingResponse:
    async def pieces() -> Any:
        yield b"data: first\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


def bare() -> Starlette:
    return Starlette(routes=[Route("/", plain), Route("/events", events)])


def middleware() -> Starlette:
    """Deadlines, a shedder and a breaker: what an application would have."""
    app = bare()
    app.add_middleware(SeawallMiddleware, policies=[LoadShedder("front"), CircuitBreaker("front")], timeout=10.0)
    return app


def empty() -> Starlette:
    """No policy: answers, deadlines and the watch for clients that leave."""
    app = bare()
    app.add_middleware(SeawallMiddleware)
    return app


def limiter() -> Starlette:
    app = bare()
    policy = KeyedRateLimiter("clients", rate=1e9, burst=10**6, key=lambda request: request.scope["client"][0])
    app.add_middleware(SeawallMiddleware, policies=[policy])
    return app


def slowapi() -> Starlette:
    peer: Any = importlib.import_module("slowapi")
    address = importlib.import_module("slowapi.util").get_remote_address
    limits = peer.Limiter(key_func=address)
    app = Starlette(routes=[Route("/", limits.limit("1000000000/second")(plain)), Route("/events", events)])
    app.state.limiter = limits
    return app


APPS: dict[str, Callable[[], Starlette]] = {
    "bare": bare,
    "middleware": middleware,
    "empty": empty,
    "limiter": limiter,
    "slowapi": slowapi,
}


async def in_process(names: list[str], path: str, requests: int) -> dict[str, list[int]]:
    """Nanoseconds of each request; of an event stream, until its first byte."""
    apps = {name: APPS[name]() for name in names}
    found: dict[str, list[int]] = {name: [] for name in names}
    for app in apps.values():
        await block(app, path, WARM_UP)
    for number in range(BLOCKS):
        order = list(apps)
        random.Random(number).shuffle(order)
        for name in order:
            found[name] += await block(apps[name], path, requests)
    return found


async def block(app: Starlette, path: str, requests: int) -> list[int]:
    clock = time.perf_counter_ns
    first, asked = 0, False

    async def receive() -> Any:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()  # the client stays
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal first
        if message["type"] == "http.response.body" and not first:
            first = clock()

    found = []
    for _ in range(requests):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": HEADERS,
            "client": ("10.0.0.1", 40000),
            "server": ("10.0.0.2", 80),
        }
        first, asked = 0, False
        began = clock()
        await app(scope, receive, send)
        found.append((first if path == "/events" else clock()) - began)
    return found


class Server(NamedTuple):
    """uvicorn with one of the applications, in a process of its own."""

    port: int
    process: psutil.Process

    def cpu(self) -> float:
        """Seconds of processor time so far: what other processes of the machine disturb least."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def serving(name: str) -> Iterator[Server]:
    """A running server."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__)), "--serve", name], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            yield Server(int(server.stdout.readline()), psutil.Process(server.pid))
        finally:
            server.terminate()


def serve(name: str) -> None:
    config = uvicorn.Config(APPS[name](), port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)

    async def run() -> None:
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - it has no event to wait for
            await asyncio.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await task

    asyncio.run(run())


class Client:
    """One connection that is kept open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connected(cls, port: int) -> "Client":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def first_bytes(self, path: str) -> float:
        """Seconds until the first byte of the body; reads it to its end."""
        began = time.perf_counter()
        self.writer.write(f"GET {path} HTTP/1.1\r\nhost: shop\r\n\r\n".encode())
        head = await self.reader.readuntil(b"\r\n\r\n")
        if b"chunked" not in head:
            await self.reader.readexactly(2)  # "ok"
            return time.perf_counter() - began
        await self.reader.readuntil(b"\r\n")
        took = time.perf_counter() - began
        await self.reader.readuntil(b"0\r\n\r\n")
        return took

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def rate(server: Server) -> tuple[float, float]:
    """Requests a second of `CLIENTS` clients that each wait for their answer; and processor seconds of a request."""
    clients = [await Client.connected(server.port) for _ in range(CLIENTS)]
    until = time.perf_counter() + SECONDS

    async def ask(client: Client) -> int:
        done = 0
        while time.perf_counter() < until:
            await client.first_bytes("/")
            done += 1
        await client.close()
        return done

    began, cpu = time.perf_counter(), server.cpu()
    done = sum(await asyncio.gather(*map(ask, clients)))
    return done / (time.perf_counter() - began), (server.cpu() - cpu) / done


async def over_a_socket(servers: dict[str, Server]) -> tuple[Rounds, Rounds, Rounds]:
    """Requests a second, processor seconds of a request, and seconds to the first byte of an event stream."""
    rates: Rounds = {name: [] for name in servers}
    cpu: Rounds = {name: [] for name in servers}
    for number in range(ROUNDS + 1):
        order = list(servers)
        random.Random(number).shuffle(order)
        for name in order:
            measured, seconds = await rate(servers[name])
            if number:  # the first warms up
                rates[name].append(measured)
                cpu[name].append(seconds)
    first: Rounds = {name: [] for name in servers}
    clients = {name: await Client.connected(server.port) for name, server in servers.items()}
    for _ in range(EVENTS):
        for name, client in clients.items():
            first[name].append(await client.first_bytes("/events"))
    for client in clients.values():
        await client.close()
    return rates, cpu, first


def measure(*, peers: bool) -> tuple[Figures, Samples, list[str]]:
    """Figures, raw samples and remarks."""
    names = [name for name in APPS if peers or name != "slowapi"]
    took = asyncio.run(in_process(names, "/", REQUESTS))
    begun = asyncio.run(in_process(["bare", "middleware"], "/events", REQUESTS // 5))
    sockets = [name for name in names if name != "empty"]
    with _all_serving(sockets) as servers:
        rates, cpu, first = asyncio.run(over_a_socket(servers))

    def added(name: str, percent: float) -> float:
        return (percentile(took[name], percent) - percentile(took["bare"], percent)) / 1000

    figures: Figures = {"bare_request_p50_us": percentile(took["bare"], 50) / 1000}
    for name in names[1:]:
        figures |= {f"{name}_p50_us": added(name, 50), f"{name}_p99_us": added(name, 99)}
    figures |= {f"{name}_requests_s": statistics.median(rates[name]) for name in sockets}
    figures |= {f"{name}_server_cpu_us": statistics.median(cpu[name]) * 1e6 for name in sockets}
    figures["requests_over_bare"] = _ratio(rates["middleware"], rates["bare"])
    paired = [with_it - without for with_it, without in zip(first["middleware"], first["bare"], strict=True)]
    figures["sse_first_byte_added_ms"] = statistics.median(paired) * 1000
    median = {name: statistics.median(values) for name, values in begun.items()}
    figures["sse_first_byte_in_process_us"] = (median["middleware"] - median["bare"]) / 1000
    notes = [
        "p50 and p99 are added to the bare request, in the process; the rest is over a socket, of a uvicorn of its own."
    ]
    if peers:
        figures["over_slowapi"] = added("limiter", 50) / added("slowapi", 50)
        figures["requests_over_slowapi"] = _ratio(rates["limiter"], rates["slowapi"])
        notes.append(
            "over_slowapi: what a limit by client adds at the median, over what slowapi's adds (less is better)."
        )
    samples: Samples = {f"{name}_block_ns": _blocks(found, REQUESTS) for name, found in took.items()}
    samples |= {f"{name}_first_byte_block_ns": _blocks(found, REQUESTS // 5) for name, found in begun.items()}
    samples |= {f"{name}_requests_s": found for name, found in rates.items()}
    samples |= {f"{name}_server_cpu_s": found for name, found in cpu.items()}
    samples |= {f"{name}_first_byte_s": found for name, found in first.items()}
    return figures, samples, notes


@contextmanager
def _all_serving(names: list[str]) -> Iterator[dict[str, Server]]:
    if not names:
        yield {}
        return
    with serving(names[0]) as server, _all_serving(names[1:]) as others:
        yield {names[0]: server, **others}


def _blocks(found: list[int], size: int) -> dict[str, list[float]]:
    """Median and 99th percentile of each block: each request's own number would fill megabytes."""
    blocks = [found[begin : begin + size] for begin in range(0, len(found), size)]
    return {f"p{percent}": [percentile(block, percent) for block in blocks] for percent in (50, 99)}


def percentile(values: list[int], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def _ratio(some: list[float], others: list[float]) -> float:
    """Of medians of rounds that ran side by side."""
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def main() -> None:
    options = arguments(__doc__)
    figures, samples, notes = measure(peers=options.peers)
    print_figures("What the middleware adds", figures, notes)
    if options.json:
        write_results(options.json, figures, samples, ("slowapi", "starlette", "uvicorn"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main()
