"""`seawall serve`: a model behind OpenAI's API, for a first try and as a replica behind a gateway.

The one module that imports `uvicorn`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Self

import anyio
import anyio.to_thread

from seawall.cli.generate import KV
from seawall.cli.progress import Progress
from seawall.inference.errors import InvalidSettingError

if TYPE_CHECKING:
    import uvicorn

    from seawall import Engine
    from seawall.web.asgi import App, Receive, Scope, Send
    from seawall.web.openai import OpenAIRouter

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_LOOPBACK = ("127.", "localhost", "::1")


def add_parser(commands: Commands) -> None:
    """Add `serve`."""
    parser = commands.add_parser("serve", help="serve a model over OpenAI's API, with /livez, /readyz and /metrics")
    parser.add_argument("model", help="a name that `seawall models list` shows, a .gguf file, or a prepared folder")
    parser.add_argument("--embedder", metavar="MODEL", help="a sentence encoder for /v1/embeddings as well")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for any (default: %(default)s)")
    parser.add_argument("--api-key-env", metavar="NAME", help="variable that holds the API keys, separated by commas")
    model = parser.add_argument_group("the model")
    model.add_argument("--precision", help="of the weights (default: the model's usual one)")
    model.add_argument("--kv", help=KV)
    model.add_argument(
        "--context", type=_positive(int), default=2048, help="most tokens of a sequence (default: %(default)s)"
    )
    model.add_argument("--threads", type=_positive(int), help="of a step (default: what affinity and CPU quota allow)")
    model.add_argument(
        "--rows", type=_positive(int), default=8, help="answers that advance together (default: %(default)s)"
    )
    model.add_argument(
        "--max-queued",
        type=_positive(int, or_zero=True),
        default=64,
        help="answers that may wait (default: %(default)s)",
    )
    model.add_argument("--speculation", action="store_true", help="draft tokens; answers stay the same")
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--temperature",
        type=_positive(float, or_zero=True),
        default=1.0,
        help="where none is asked for (default: %(default)s)",
    )
    answers.add_argument(
        "--max-tokens", type=_positive(int), help="most that a request may ask for (default: the context)"
    )
    answers.add_argument("--timeout", type=_positive(float), metavar="SECONDS", help="most that a request may take")
    ending = parser.add_argument_group("the end, on SIGTERM")
    ending.add_argument(
        "--drain-delay",
        type=_positive(float, or_zero=True),
        default=0.0,
        metavar="SECONDS",
        help="go on serving, while /readyz says 503",
    )
    ending.add_argument(
        "--drain-timeout",
        type=_positive(float, or_zero=True),
        default=30.0,
        metavar="SECONDS",
        help="then let answers in flight end",
    )
    parser.set_defaults(run=_serve)


def _positive(kind: type[int | float], *, or_zero: bool = False) -> Callable[[str], float]:
    """A number that is finite and positive, as argparse wants to be told."""
    rule = f"a {'whole ' if kind is int else ''}number {'of 0 or more' if or_zero else 'above 0'}"

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            number = kind(text)
            if 0 < number < math.inf or (or_zero and number == 0):
                return number
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")

    return read


def _serve(options: argparse.Namespace) -> int:
    keys = _keys(options.api_key_env)
    with listen(options.host, options.port) as listener:
        if keys is None and not options.host.startswith(_LOOPBACK):
            sys.stderr.write("seawall: no --api-key-env: whoever can reach this address may ask\n")
        asyncio.run(_run(options, keys, listener))
    return 0


async def _run(options: argparse.Namespace, keys: list[str] | None, listener: socket.socket) -> None:
    from seawall import Engine
    from seawall.inference import Embedder
    from seawall.telemetry import embeddings
    from seawall.web.openai import OpenAIRouter

    progress = Progress()
    with contextlib.ExitStack() as closing:
        embedder = None
        if options.embedder is not None:
            load = partial(Embedder.load, options.embedder, watch=embeddings)
            embedder = closing.enter_context(await anyio.to_thread.run_sync(load))
        engine = Engine.load(
            options.model,
            precision=options.precision,
            kv=options.kv,
            speculation="auto" if options.speculation else None,
            context=options.context,
            threads=options.threads,
            rows=options.rows,
            max_queued=options.max_queued,
            progress=progress,
        )
        router = OpenAIRouter(
            engine,
            embedder=embedder,
            api_keys=keys,
            timeout=options.timeout,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
        )
        replica = closing.enter_context(Replica(router, engine))
        await _serving(replica, listener, progress, delay=options.drain_delay, patience=options.drain_timeout)


class Replica:
    """What one process serves: a router, its health and its metrics; an ASGI application.

    `/metrics` is there where the extra `prometheus` is installed.
    """

    def __init__(self, router: OpenAIRouter, engine: Engine) -> None:
        from seawall import CircuitBreaker
        from seawall.web import Health

        self.router = router
        self.engine = engine
        self.warm = False
        breakers = [policy for policy in engine.policies if isinstance(policy, CircuitBreaker)]
        self.health = Health(checks={"model": lambda: self.warm and bool(engine.info())}, critical=breakers)
        self._metrics: App | None = None
        self._uninstall: Callable[[], None] = _nothing

    def __enter__(self) -> Self:
        from seawall.telemetry import install
        from seawall.web import Metrics

        with contextlib.suppress(ImportError):
            from prometheus_client import CollectorRegistry

            registry = CollectorRegistry()
            registry.register(self.router.collector)
            self._uninstall = install(registry=registry)
            self._metrics = Metrics(registry).asgi
        return self

    def __exit__(self, *_: object) -> None:
        self._uninstall()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        path = scope.get("path")
        if path in ("/livez", "/readyz"):
            await self.health.asgi(scope, receive, send)
        elif path == "/metrics" and self._metrics is not None:
            await self._metrics(scope, receive, send)
        else:
            await self.router(scope, receive, send)

    def drain(self) -> None:
        """Be ready no more, and let each connection end with its answer."""
        self.health.drain()
        self.router.draining = True


async def _serving(
    replica: Replica, listener: socket.socket, progress: Progress, *, delay: float, patience: float
) -> None:
    """Serve while the model loads, from then on, and until a signal; then let answers in flight end."""
    server = _server(replica, delay, patience)
    failed: list[BaseException] = []

    async def hold() -> None:
        try:
            async with contextlib.AsyncExitStack() as opened:
                with progress:
                    await opened.enter_async_context(replica.router.lifespan())
                    await replica.engine.warm_up()
                replica.warm = True
                host, port = listener.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                models = ", ".join(replica.router.models)
                sys.stdout.write(f"seawall: {models} on http://{shown}:{port}/v1\n")
                sys.stdout.flush()
                await anyio.sleep_forever()
        except Exception as error:
            failed.append(error)
            server.should_exit = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hold)
        await server.serve(sockets=[listener])
        if not replica.warm and not failed:
            os._exit(0)  # told to stop while the model loads or is converted, which nothing else ends for minutes
        tasks.cancel_scope.cancel()
    if failed:
        raise failed[0]


def _server(replica: Replica, delay: float, patience: float) -> uvicorn.Server:
    """A server that, told to stop, first says so and goes on for `delay` seconds, then waits `patience` for answers.

    It cancels none that are left: the engine that is closed after it ends each with an error that the client reads.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("seawall serve needs uvicorn: pip install 'seawall[web]'") from error

    class Server(uvicorn.Server):
        stop_at = math.inf

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not replica.health.draining:
                replica.drain()
                self.stop_at = time.monotonic() + delay
            elif not self.should_exit:
                self.should_exit = True  # told twice: no delay
            else:
                self.force_exit = True

        async def on_tick(self, counter: int) -> bool:
            self.should_exit = self.should_exit or time.monotonic() >= self.stop_at
            return await super().on_tick(counter)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            late = asyncio.get_running_loop().call_later(patience, setattr, self, "force_exit", True)
            try:
                await super().shutdown(sockets)
            finally:
                late.cancel()

    config = uvicorn.Config(replica, lifespan="off", log_level="warning", access_log=False, server_header=False)
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens before the model is loaded, so that a taken port is known at once."""
    if not 0 <= port <= 65_535:
        raise InvalidSettingError(f"--port must be from 0 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        rule = "must be an address of this machine and a port that is free (0 for any)"
        raise InvalidSettingError(f"--host and --port {rule}: {error.strerror}") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it on sockets of its own making alone
    return listener


def _keys(variable: str | None) -> list[str] | None:
    if variable is None:
        return None
    keys = [key.strip() for key in os.environ.get(variable, "").split(",")]
    if not all(keys):
        raise InvalidSettingError(f"--api-key-env: ${variable} must hold API keys, separated by commas")
    return keys


def _nothing() -> None:
    pass
