"""What wakes one who waits for another thread: a task of asyncio, a task of trio, or a thread."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any


class AsyncioBell:
    """Wakes a task of an asyncio loop, from any thread."""

    __slots__ = ("_future", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] = loop.create_future()

    def ring(self) -> None:
        """Wake the task; nothing where its loop is gone."""
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed, and its task with it
            return

    def _wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def wait(self) -> asyncio.Future[None]:
        """To be awaited."""
        return self._future


class TrioBell:
    """Wakes a task of a trio run, from any thread."""

    __slots__ = ("_event", "_token")

    def __init__(self) -> None:
        import trio

        self._event = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def ring(self) -> None:
        """Wake the task; nothing where its run is over."""
        import trio

        try:
            self._token.run_sync_soon(self._event.set)
        except trio.RunFinishedError:
            return

    def wait(self) -> Any:
        """To be awaited."""
        return self._event.wait()


class ThreadBell:
    """Wakes a thread, from any other."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def ring(self) -> None:
        """Wake the thread."""
        self._event.set()

    def wait(self) -> None:
        """Block until it rings; Ctrl-C ends it in the main thread."""
        self._event.wait()


def task_bell() -> AsyncioBell | TrioBell:
    """A bell for the task that runs here."""
    loop = asyncio._get_running_loop()
    if loop is None and "trio" in sys.modules:
        return TrioBell()
    return AsyncioBell(loop or asyncio.get_running_loop())
