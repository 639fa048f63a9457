"""A service that Prometheus scrapes: guarded calls, some of which fail, and its metrics on `/metrics`.

    pip install 'seawall[prometheus,otel]'
    python examples/scraped.py 9102

The port may be left out. With `tracing` after it each histogram carries exemplars, which need OpenTelemetry's SDK.
"""

from __future__ import annotations

import asyncio
import sys

from prometheus_client import CollectorRegistry, start_http_server

from seawall import SLO, Bulkhead, CircuitBreaker, Pipeline, Retry, Timeout
from seawall.telemetry import install

calls = 0
guard = Pipeline(
    SLO("checkout", target=0.99, latency=0.2),
    Retry("checkout", on=ConnectionError, wait=0.001),
    CircuitBreaker("payments", failure_rate=0.5, minimum_calls=20),
    Bulkhead("payments", max_concurrent=8),
    Timeout("payments", 1.0),
    name="checkout",
)


@guard
async def checkout() -> str:
    """Ask a bank that is moody: every third call fails, and is made again."""
    global calls
    calls += 1
    await asyncio.sleep(0.002)
    if calls % 3 == 0:
        raise ConnectionError("the bank does not answer")
    return "paid"


async def main() -> None:
    """Serve for ever."""
    registry = CollectorRegistry()
    if "tracing" in sys.argv:
        from opentelemetry.sdk.trace import TracerProvider

        install(registry=registry, tracer_provider=TracerProvider())
    else:
        install(registry=registry)
    server, _ = start_http_server(int(sys.argv[1]) if sys.argv[1:] else 9102, "127.0.0.1", registry)
    print(f"metrics on http://127.0.0.1:{server.server_port}/metrics", flush=True)
    while True:
        await checkout()
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    asyncio.run(main())
