"""The asynchronous transport on the other event loop."""

from __future__ import annotations

import httpx
import trio

from seawall.web.outgoing.httpx import AsyncSeawallTransport
from tests.web.outgoing.faulty import serving
from tests.web.outgoing.test_httpx import quick


def test_all_of_it_runs_on_trio():
    async def ask(url):
        async with httpx.AsyncClient(transport=AsyncSeawallTransport(policies=quick(hedge_after=1.0))) as client:
            return (await client.get(url)).content

    with serving("status 503", "stream 503", "ok") as server:
        server.go_on.set()
        assert trio.run(ask, server.url) == b"ok"
