"""Calls that are cancelled, and losers of races, leave no connection and no place behind."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import pytest

from seawall.web.outgoing.httpx import AsyncSeawallTransport
from tests.web.outgoing.faulty import serving
from tests.web.outgoing.test_httpx import Async, at, emptied, quick

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("fault", ["wait", "stream 503", "stream"])
@pytest.mark.parametrize("hedge_after", [None, 0.0])
async def test_a_cancelled_call_leaves_no_connection_and_no_place(fault, hedge_after):
    policies = quick(hedge_after=hedge_after)
    async with Async(policies) as calls:
        with serving(*[fault] * 4) as server:
            task = asyncio.create_task(calls.request("GET", server.url))
            await asyncio.to_thread(server.waiting.acquire)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            places = at(policies, server.host, "bulkhead")
            await emptied(places)
            assert calls.transport._pool.connections == []
            if fault != "stream 503":
                assert at(policies, server.host, "breaker").snapshot().failures == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("steps", range(1, 24))
async def test_wherever_a_call_is_cancelled_its_connection_and_place_come_back(steps):
    policies = quick(max_concurrent=1, attempts=4)
    async with Async(policies, limits=httpx.Limits(max_connections=1)) as calls:
        with serving("ok", "status 503", *["stream 503"] * 3) as server:
            server.go_on.set()
            # Connected before: httpcore 1.0.9 itself loses a connection that is cancelled between its first two steps.
            await calls.request("GET", server.url)
            task = asyncio.create_task(calls.request("GET", server.url))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            server.script.clear()
            assert at(policies, server.host, "bulkhead").snapshot().active == 0
            assert (await calls.request("GET", server.url)).content == b"ok"


class Scripted(httpx.AsyncBaseTransport):
    """Answers as the test says, and counts the bodies that were closed to the end."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.closing, self.closed, self.may_close = asyncio.Event(), 0, asyncio.Event()

    async def handle_async_request(self, request):
        return await self.answers.pop(0)()

    def response(self, status):
        return httpx.Response(status, stream=Body(self))


class Body(httpx.AsyncByteStream):
    def __init__(self, transport):
        self.transport = transport

    async def __aiter__(self):
        yield b"piece"

    async def aclose(self):
        self.transport.closing.set()
        await self.transport.may_close.wait()
        self.transport.closed += 1


async def test_a_cancellation_waits_until_what_is_being_closed_is_closed():
    async def refuse():
        return inner.response(503)

    inner = Scripted(refuse, refuse)
    policies = quick()
    task = asyncio.create_task(
        AsyncSeawallTransport(inner, policies=policies).handle_async_request(httpx.Request("GET", "http://host"))
    )
    await inner.closing.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    inner.may_close.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert inner.closed == 1
    assert at(policies, "http://host:80", "bulkhead").snapshot().active == 0


async def test_a_loser_that_answers_when_the_race_is_over_is_closed():
    late = asyncio.Event()

    async def stubborn():
        while not late.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await late.wait()
        return inner.response(200)

    async def quickly():
        return inner.response(200)

    inner = Scripted(stubborn, quickly)
    inner.may_close.set()
    policies = quick(hedge_after=0.001, attempts=1)
    transport = AsyncSeawallTransport(inner, policies=policies)
    response = await transport.handle_async_request(httpx.Request("GET", "http://host"))
    await response.aclose()
    late.set()
    await emptied(at(policies, "http://host:80", "bulkhead"))
    assert inner.closed == 2
