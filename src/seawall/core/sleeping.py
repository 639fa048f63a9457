"""How a call sleeps while a guard says "not yet": on asyncio, on trio, or in a plain thread.

Each sleeper has an alarm that any thread may ring while it holds the gate's lock, so ringing must neither
block nor run code of the user's.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from seawall.core.timers import timers_of


class Sleeper(Protocol):
    """Made under the lock; rung by anybody who holds it; slept on without it."""

    def ring(self) -> bool:
        """Wake the sleeper; False if its loop is gone."""

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds` or when rung."""


MakeSleeper = Callable[[], object]


class AsyncioSleeper:
    """Sleeps on a future of the running loop; equal delays share one loop timer."""

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()

    def ring(self) -> bool:
        """Wake the sleeper; False if its loop is gone."""
        if asyncio._get_running_loop() is self._loop:
            self.expire()
            return True
        try:
            self._loop.call_soon_threadsafe(self.expire)
        except RuntimeError:  # the loop is closed, and its task with it
            return False
        return True

    def expire(self) -> None:
        """Wake the sleeper; on its own loop."""
        if not self._future.done():
            self._future.set_result(None)

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds` or when rung."""
        if seconds == float("inf"):
            await self._future
            return
        queue = timers_of(self._loop).add(self, max(0.0, seconds))
        try:
            await self._future
        finally:
            queue.pop(self, None)


class TrioSleeper:
    """Sleeps on a trio event."""

    __slots__ = ("_event", "_token")

    def __init__(self) -> None:
        import trio

        self._event = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def ring(self) -> bool:
        """Wake the sleeper; False if its loop is gone."""
        import trio

        try:
            self._token.run_sync_soon(self._event.set)
        except trio.RunFinishedError:
            return False
        return True

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds` or when rung."""
        import anyio

        with anyio.move_on_after(max(0.0, seconds)):
            await self._event.wait()


class ThreadSleeper:
    """Sleeps in a thread of its own."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def ring(self) -> bool:
        """Wake the sleeper; False if its loop is gone."""
        self._event.set()
        return True

    def sleep_sync(self, seconds: float) -> None:
        """Return after `seconds` or when rung."""
        self._event.wait(None if seconds == float("inf") else min(max(0.0, seconds), threading.TIMEOUT_MAX))


def on_asyncio() -> bool:
    """Whether the caller runs on an asyncio loop."""
    return asyncio._get_running_loop() is not None


def on_trio() -> bool:
    """Whether the caller runs on trio."""
    if "trio" not in sys.modules:
        return False
    import trio

    return bool(trio.lowlevel.in_trio_run())


def async_sleeper() -> Sleeper:
    """A sleeper for the event loop that is running."""
    return AsyncioSleeper() if on_asyncio() else TrioSleeper()


async def pause(seconds: float) -> None:
    """Let `seconds` pass, on any event loop."""
    if on_asyncio():
        await asyncio.sleep(seconds)
    else:
        import anyio

        await anyio.sleep(seconds)
