"""A Litestar application behind policies.

`python examples/web_litestar.py [PORT]`, then `curl localhost:8000/report/7`.
Several workers: `uvicorn --app-dir examples web_litestar:app --workers 4`.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import uvicorn
from litestar import Litestar, Response, get
from litestar.response import Stream

from seawall import Bulkhead, CircuitBreaker, KeyedRateLimiter, LoadShedder, time_left
from seawall.web import Health
from seawall.web.litestar import SeawallPlugin, route

per_client = KeyedRateLimiter("per client", rate=50, burst=100, key=lambda request: request.scope["client"][0])
reports = Bulkhead("reports", max_concurrent=4, max_queued=16)
database = CircuitBreaker("database")
health = Health(critical=[database])


@database
async def rows(number: int) -> list[str]:
    await asyncio.sleep(0.01)  # a query
    return [f"row {row} of report {number}" for row in range(3)]


@get("/report/{number:int}")
@reports
async def report(number: int) -> dict[str, object]:
    return {"rows": await rows(number), "seconds_left": round(time_left(), 3)}


@get("/stream/{number:int}", middleware=[route(reports)])  # holds its place until the last piece is sent
async def stream(number: int) -> Stream:
    async def events() -> AsyncIterator[str]:
        for row in await rows(number):
            yield f"data: {row}\n\n"

    return Stream(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


@get("/livez")
async def livez() -> dict[str, object]:
    return health.live()[1]


@get("/readyz")
async def readyz() -> Response[dict[str, object]]:
    status, content = health.ready()
    return Response(content, status_code=status)


plugin = SeawallPlugin(policies=[LoadShedder("front"), per_client], timeout=10.0)
app = Litestar([report, stream, livez, readyz], plugins=[plugin])

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if sys.argv[1:] else 8000)
