"""A model in an application of your own, behind OpenAI's API, with its probes and metrics.

    pip install 'seawall[cpu,web,prometheus]' && seawall models add smollm2-135m
    python examples/openai_server.py [PORT]

    curl localhost:8000/v1/chat/completions -H 'content-type: application/json' -d '{
        "model": "smollm2-135m", "messages": [{"role": "user", "content": "Why is the sea salty?"}], "stream": true}'

What needs nothing but a model is shorter: `seawall serve smollm2-135m`.
"""

from __future__ import annotations

import sys

import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from seawall import CircuitBreaker, Engine, KeyedRateLimiter
from seawall.telemetry import install
from seawall.web import Health, Metrics
from seawall.web.openai import OpenAIRouter

engine = Engine.load("smollm2-135m")
router = OpenAIRouter(
    engine,
    policies=[KeyedRateLimiter("client", rate=5, per=1.0, key=lambda request: request.scope["client"][0])],
    timeout=60.0,  # seconds; clients that wait less say so in a header
    temperature=0.2,
    max_tokens=512,
)
health = Health(
    checks={"model": lambda: bool(engine.info())},
    critical=[policy for policy in engine.policies if isinstance(policy, CircuitBreaker)],
)
registry = CollectorRegistry()
registry.register(router.collector)
install(registry=registry)


async def home(request: Request) -> PlainTextResponse:
    """Your own application."""
    return PlainTextResponse("hello")


app = Starlette(
    routes=[
        Route("/", home),
        Mount("/health", health.asgi),
        Mount("/metrics", Metrics(registry).asgi),
        Mount("/v1", router),
    ],
    lifespan=router.lifespan,  # opens the engine, and closes it
)

if __name__ == "__main__":
    port = int(sys.argv[1]) if sys.argv[1:] else 8000
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=30)
