"""An aiohttp application behind policies.

`python examples/web_aiohttp.py [PORT]`, then `curl localhost:8000/report/7`.
"""

import asyncio
import sys

from aiohttp import web

from seawall import Bulkhead, CircuitBreaker, KeyedRateLimiter, LoadShedder, time_left
from seawall.web import Health
from seawall.web.aiohttp import health_routes, setup

per_client = KeyedRateLimiter("per client", rate=50, burst=100, key=lambda exchange: exchange.request.remote)
reports = Bulkhead("reports", max_concurrent=4, max_queued=16)
database = CircuitBreaker("database")


@database
async def rows(number: int) -> list[str]:
    await asyncio.sleep(0.01)  # a query
    return [f"row {row} of report {number}" for row in range(3)]


@reports
async def report(request: web.Request) -> web.Response:
    number = int(request.match_info["number"])
    return web.json_response({"rows": await rows(number), "seconds_left": round(time_left(), 3)})


@reports  # holds its place until the last piece is sent
async def stream(request: web.Request) -> web.StreamResponse:
    found = await rows(int(request.match_info["number"]))
    response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-store"})
    await response.prepare(request)
    for row in found:
        await response.write(f"data: {row}\n\n".encode())
    return response


app = web.Application()
setup(app, policies=[LoadShedder("front"), per_client], timeout=10.0)
app.add_routes([web.get(r"/report/{number:\d+}", report), web.get(r"/stream/{number:\d+}", stream)])
app.add_routes(health_routes(Health(critical=[database])))

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]) if sys.argv[1:] else 8000)
