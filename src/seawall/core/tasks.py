"""A call in a task of its own, on asyncio or trio: it may outlive its caller, but not its event loop.

On trio it is a system task, so it is in none of the caller's nurseries and cancel scopes.
"""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import Awaitable, Callable, Generator
from contextvars import Context
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import trio

T = TypeVar("T")
Ended = Callable[[T | None, BaseException | None], bool]

_kept: dict[asyncio.AbstractEventLoop, set[asyncio.Task[None]]] = {}  # an event loop itself holds its tasks weakly


class Work(Protocol):
    """A call in a task of its own."""

    def cancel(self) -> None:
        """Cancel it where it waits; nothing once it has ended. From any thread."""

    def keep(self) -> None:
        """Hold on to it until it has ended: nobody else does."""

    async def ended(self) -> None:
        """Return when it has ended. A cancellation of the caller goes to the call instead, and is lost.

        So it is for callers on their way out, who raise one already.
        """


def running_loop() -> object:
    """The event loop that runs here, as something to tell it from others by: asyncio's, or the token of trio's."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return loop
    import trio

    return trio.lowlevel.current_trio_token()


def is_closed(loop: object) -> bool:
    """Whether a `running_loop` is gone without having ended its tasks, which trio's never is."""
    return isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed()


def spawn(call: Callable[[], Awaitable[T]], ended: Ended[T], context: Context) -> Work:
    """Run `call` in a task of its own, in `context`.

    `ended(result, exc)` is called there exactly once, however the call ends, even if it was cancelled before it began
    or no task could be made for it. It says whether somebody takes the exception; KeyboardInterrupt and SystemExit that
    nobody takes are raised, others are not. It must not raise itself.
    """
    loop = asyncio._get_running_loop()
    if loop is not None:
        return _AsyncioWork(loop, call, ended, context)
    return _TrioWork(call, ended, context)


async def _run(call: Callable[[], Awaitable[T]], ended: Ended[T], begun: Awaitable[None] | None) -> None:
    try:
        if begun is not None:
            await begun
        result = await call()
    except BaseException as exc:
        if not ended(None, exc) and isinstance(exc, (KeyboardInterrupt, SystemExit)):
            raise
    else:
        ended(result, None)
    finally:
        del call, ended  # an exception's traceback refers to this frame, and they may refer to the exception


@types.coroutine
def _pause() -> Generator[None, None, None]:
    yield


class _AsyncioWork:
    __slots__ = ("_task",)

    def __init__(
        self, loop: asyncio.AbstractEventLoop, call: Callable[[], Awaitable[T]], ended: Ended[T], context: Context
    ) -> None:
        # Stepped into its `try` here: a task that is cancelled before its first step runs nothing of its coroutine.
        run = _run(call, ended, _pause())
        run.send(None)
        try:
            self._task = loop.create_task(run, context=context)
        except BaseException:
            run.close()  # which is how it ended
            raise

    def cancel(self) -> None:
        loop = self._task.get_loop()
        if asyncio._get_running_loop() is loop:
            self._task.cancel()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(self._task.cancel)

    def keep(self) -> None:
        loop = self._task.get_loop()
        tasks = _kept.get(loop)
        if tasks is None:
            for other in list(_kept):
                if other.is_closed():
                    _kept.pop(other, None)
            tasks = _kept[loop] = set()
        tasks.add(self._task)
        self._task.add_done_callback(_let_go)

    async def ended(self) -> None:
        while not self._task.done():
            try:
                await asyncio.wait((self._task,))
            except asyncio.CancelledError:
                self._task.cancel()


def _let_go(task: asyncio.Task[None]) -> None:
    loop = task.get_loop()
    tasks = _kept.get(loop)
    if tasks is not None:
        tasks.discard(task)
        if not tasks:
            del _kept[loop]


class _TrioWork:
    __slots__ = ("_done", "_scope", "_token")

    def __init__(self, call: Callable[[], Awaitable[T]], ended: Ended[T], context: Context) -> None:
        import trio

        self._scope: trio.CancelScope = trio.CancelScope()
        self._done: trio.Event = trio.Event()
        self._token: trio.lowlevel.TrioToken = trio.lowlevel.current_trio_token()
        try:
            trio.lowlevel.spawn_system_task(self._run, call, ended, context=context)
        except BaseException as exc:
            ended(None, exc)
            raise

    async def _run(self, call: Callable[[], Awaitable[T]], ended: Ended[T]) -> None:
        try:
            with self._scope:
                await _run(call, ended, None)
        finally:
            self._done.set()

    def cancel(self) -> None:
        import trio

        if trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self._token:
            self._scope.cancel()
            return
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._scope.cancel)

    def keep(self) -> None: ...

    async def ended(self) -> None:
        import trio

        with trio.CancelScope(shield=True):
            await self._done.wait()
