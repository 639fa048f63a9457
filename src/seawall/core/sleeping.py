"""How a call sleeps while a guard says "not yet": on asyncio, on trio, or in a plain thread.

Each sleeper has an alarm that any thread may ring while it holds the gate's lock, so ringing must neither
block nor run code of the user's.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Protocol

from seawall.core.timers import Queue, Timers, running_timers

_FOREVER = 1e9  # seconds; the loop can't count much further


class Sleeper(Protocol):
    """Made under the lock; rung by anybody who holds it; slept on without it."""

    def ring(self) -> bool:
        """Wake the sleeper; False if its loop is gone."""

    @property
    def alive(self) -> bool:
        """Whether its loop is still there."""

    def sleep(self, seconds: float, shared: float | None = None) -> Awaitable[None]:
        """Return after `seconds` or when rung. With `shared`, a delay that many have, one timer serves them all."""

    def rise(self) -> None:
        """Awake, or cancelled: forget the timer."""


MakeSleeper = Callable[[], object]


class AsyncioSleeper:
    """Sleeps on a future of the running loop; equal delays share one loop timer."""

    __slots__ = ("_future", "_queue", "_timer", "_timers")

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._future: asyncio.Future[None] = timers.loop.create_future()
        self._queue: Queue | None = None
        self._timer: asyncio.TimerHandle | None = None

    def ring(self) -> bool:
        """Wake the sleeper; False if its loop is gone."""
        if running_timers() is self._timers:
            if not self._future.done():
                self._future.set_result(None)
            return True
        try:
            self._timers.loop.call_soon_threadsafe(self.expire)
        except RuntimeError:  # the loop is closed, and its task with it
            return False
        return True

    @property
    def alive(self) -> bool:
        """Whether its loop is still there."""
        return not self._timers.loop.is_closed()

    def expire(self) -> None:
        """Wake the sleeper; on its own loop."""
        if not self._future.done():
            self._future.set_result(None)

    def sleep(self, seconds: float, shared: float | None = None) -> Awaitable[None]:
        """Return after `seconds` or when rung. With `shared`, a delay that many have, one timer serves them all."""
        if shared is not None and shared < _FOREVER:
            self._queue = self._timers.add(self, shared, self._timers.time())
        elif seconds < _FOREVER:
            self._timer = self._timers.loop.call_later(max(0.0, seconds), self.expire)
        return self._future

    def rise(self) -> None:
        """Awake, or cancelled: forget the timer."""
        if self._queue is not None:
            self._queue.pop(self, None)
        elif self._timer is not None:
            self._timer.cancel()


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

    @property
    def alive(self) -> bool:
        """Whether its loop is still there."""
        import trio

        try:
            self._token.run_sync_soon(_nothing)
        except trio.RunFinishedError:
            return False
        return True

    async def sleep(self, seconds: float, shared: float | None = None) -> None:
        """Return after `seconds` or when rung."""
        import anyio

        with anyio.move_on_after(max(0.0, seconds)):
            await self._event.wait()

    def rise(self) -> None:
        """Awake, or cancelled: nothing to forget."""


class ThreadSleeper:
    """Sleeps in a thread of its own."""

    __slots__ = ("_event",)
    alive = True

    def __init__(self) -> None:
        self._event = threading.Event()

    def ring(self) -> bool:
        """Wake the sleeper."""
        self._event.set()
        return True

    def sleep_sync(self, seconds: float) -> None:
        """Return after `seconds` or when rung."""
        self._event.wait(None if seconds == float("inf") else min(max(0.0, seconds), threading.TIMEOUT_MAX))


def _nothing() -> None: ...


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
    timers = running_timers()
    return TrioSleeper() if timers is None else AsyncioSleeper(timers)


def sync_sleeper() -> ThreadSleeper | None:
    """A sleeper for this thread; None where it would block an event loop."""
    return None if on_asyncio() or on_trio() else ThreadSleeper()


def no_sleeper() -> None:
    """For callers that never sleep."""


async def pause(seconds: float) -> None:
    """Let `seconds` pass, on any event loop."""
    if on_asyncio():
        await asyncio.sleep(seconds)
    else:
        import anyio

        await anyio.sleep(seconds)
