"""Calls in tasks of their own: who hears how they ended."""

from __future__ import annotations

import asyncio
from contextvars import copy_context

import pytest

from seawall.core.tasks import spawn


def spawned(call, *, taken):
    heard = []

    def ended(result, exc):
        heard.append((result, type(exc)))
        return taken

    async def main():
        await spawn(call, ended, copy_context()).ended()

    return heard, main


async def leaving():
    raise SystemExit(3)


def test_an_exit_that_nobody_takes_ends_the_program():
    heard, main = spawned(leaving, taken=False)
    with pytest.raises(SystemExit):
        asyncio.run(main())
    assert heard == [(None, SystemExit)]


def test_an_exit_that_somebody_takes_is_theirs():
    heard, main = spawned(leaving, taken=True)
    asyncio.run(main())
    assert heard == [(None, SystemExit)]


def test_an_error_that_nobody_takes_is_no_error_of_the_loop():
    async def failing():
        raise ConnectionError

    heard, main = spawned(failing, taken=False)
    asyncio.run(main())
    assert heard == [(None, ConnectionError)]
