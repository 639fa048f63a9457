"""The same transport for httpx2, httpx's successor, which the OpenAI SDK brings along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import asyncio
import httpx2
httpx2.alias_httpx()
from openai import AsyncOpenAI
from seawall.web.outgoing.httpx import AsyncSeawallTransport
from tests.web.outgoing.faulty import serving

async def ask(url):
    async with httpx2.AsyncClient(transport=AsyncSeawallTransport()) as client:
        print((await client.get(url)).text)
        sdk = AsyncOpenAI(base_url=url, api_key="x", max_retries=0, http_client=client)
        response = await sdk.models.with_raw_response.list()
        print(response.http_response.text)

with serving("status 503 0", "ok", "reset", "ok") as server:
    asyncio.run(ask(server.url))
    print(len(server.seen))
"""


def test_httpx2_and_the_openai_sdk_call_through_the_transport():
    command = [sys.executable, "-W", "error", "-c", CODE]
    done = subprocess.run(command, check=False, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.stdout.split() == ["ok", "ok", "4"], done.stderr
