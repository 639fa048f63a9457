"""A FastAPI application behind policies.

`python examples/web_fastapi.py [PORT]`, then `curl localhost:8000/report/7`.
Several workers: `uvicorn --app-dir examples web_fastapi:app --workers 4`.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import Depends, FastAPI, Response
from fastapi.responses import StreamingResponse

from seawall import Bulkhead, CircuitBreaker, KeyedRateLimiter, LoadShedder, time_left
from seawall.web import Health, SeawallMiddleware
from seawall.web.fastapi import guarded

per_client = KeyedRateLimiter("per client", rate=50, burst=100, key=lambda request: request.scope["client"][0])
reports = Bulkhead("reports", max_concurrent=4, max_queued=16)
database = CircuitBreaker("database")
health = Health(critical=[database])

app = FastAPI()
app.add_middleware(SeawallMiddleware, policies=[LoadShedder("front"), per_client], timeout=10.0)


@database
async def rows(number: int) -> list[str]:
    await asyncio.sleep(0.01)  # a query
    return [f"row {row} of report {number}" for row in range(3)]


@app.get("/report/{number}", dependencies=[Depends(guarded(reports))])
async def report(number: int) -> dict[str, object]:
    return {"rows": await rows(number), "seconds_left": round(time_left(), 3)}


@app.get("/stream/{number}", dependencies=[Depends(guarded(reports))])  # holds its place until the last piece is sent
async def stream(number: int) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        for row in await rows(number):
            yield f"data: {row}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


@app.get("/livez")
async def livez() -> dict[str, object]:
    return health.live()[1]


@app.get("/readyz")
async def readyz(response: Response) -> dict[str, object]:
    response.status_code, content = health.ready()
    return content


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if sys.argv[1:] else 8000)
