"""Guarding a block instead of a function, and calls that begin in one place and end in another."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import warnings
from types import TracebackType
from typing import Self, cast

import anyio

from seawall.core import gate
from seawall.core.gate import Row, lock
from seawall.core.protocol import Expiry, Token
from seawall.core.sleeping import on_trio
from seawall.core.timers import current_task, disarm, running_timers, show


class Scope:
    """One guarded block: `async with policy.scope():`, or `with` where no timeout is in the row. Good for one use."""

    __slots__ = ("__weakref__", "_cancel", "_inner", "_row", "_tokens")

    def __init__(self, *rows: Row) -> None:
        self._row = rows[0] if rows else Row(())
        self._inner = Scope(*rows[1:]) if len(rows) > 1 else None
        self._tokens: list[Token] | None = None
        self._cancel: anyio.CancelScope | None = None

    def _begin(self) -> list[Token]:
        if self._tokens is not None:
            raise RuntimeError("a scope guards one block once; call scope() again for the next")
        self._tokens = []
        return self._tokens

    def _check_plain(self) -> None:
        """TypeError if a guard of any row can't do without an event loop."""
        for guard in self._row.guards:
            if getattr(guard, "needs_event_loop", False):
                raise TypeError(f"{type(guard).__name__} needs an event loop to cancel a call; use `async with`")
        if self._inner is not None:
            self._inner._check_plain()

    def __enter__(self) -> Self:
        self._check_plain()
        tokens = self._begin()
        self._row.enter_sync(tokens)
        if self._row.timed:
            show(tokens[-1])
        if self._inner is not None:
            try:
                self._inner.__enter__()
            except BaseException as exc:
                self._leave(exc)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._inner is not None:
            try:
                self._inner.__exit__(kind, exc, trace)
            except BaseException as replacement:
                self._leave(replacement)
                raise
        self._leave(exc)

    def _leave(self, exc: BaseException | None) -> None:
        tokens, self._tokens = self._tokens or [], []
        if self._row.timed and tokens:
            disarm(tokens[-1])
        if exc is None:
            self._row.leave_well(tokens)
        else:
            self._row.fail(tokens, exc)

    async def __aenter__(self) -> Self:
        tokens = self._begin()
        await self._row.enter(tokens)
        try:
            if self._row.timed and not self._row.arm(tokens):
                expiry = cast(Expiry, tokens[-1])
                show(expiry)
                self._cancel = anyio.move_on_after(expiry.left(gate.now())).__enter__()
            if self._inner is not None:
                await self._inner.__aenter__()
        except BaseException as exc:
            self._leave_or_raise(exc)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._inner is not None:
            try:
                await self._inner.__aexit__(kind, exc, trace)
            except BaseException as replacement:
                self._leave_or_raise(replacement)
                raise
        self._leave_or_raise(exc)

    def _leave_or_raise(self, exc: BaseException | None) -> None:
        """Leave with `exc`, or raise what came in its place."""
        caught = self._caught(exc)
        try:
            self._leave(caught)
            if caught is not None and caught is not exc:
                raise caught
        finally:
            del caught, exc  # or this frame, its traceback and the error would be a cycle

    def _caught(self, exc: BaseException | None) -> BaseException | None:
        """End the block's cancel scope, on trio. What is left of `exc` then, or what stands for our deadline."""
        cancel, self._cancel = self._cancel, None
        if cancel is None:
            return exc
        try:
            cancel.__exit__(type(exc) if exc else None, exc, exc.__traceback__ if exc else None)
        except BaseException as rest:  # of a group of errors, without the cancellations
            return rest
        if cancel.cancelled_caught and self._tokens:  # trio's __exit__ also says True where all went well
            cast(Expiry, self._tokens[-1]).expired = True
            return asyncio.CancelledError()
        return exc


class Permit:
    """A call let in by hand: say how it ended, once. Dropped without a word, it counts as abandoned.

    For code that cannot be wrapped: callbacks, message brokers, C extensions.
    """

    __slots__ = ("__weakref__", "_row", "_tokens")

    def __init__(self, row: Row) -> None:
        self._row = row
        self._tokens: list[Token] | None = row.enter_now()

    def success(self, result: object = None) -> None:
        """The call went well and returned `result`, which matters to policies that judge results."""
        self._end(None, result)

    def failure(self, exc: BaseException) -> None:
        """The call failed with `exc`."""
        self._end(exc)

    def cancel(self) -> None:
        """The call was given up: neither success nor failure."""
        self._end(asyncio.CancelledError())

    def _end(self, exc: BaseException | None, result: object = None) -> None:
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            raise RuntimeError("this permit has ended already; each admitted call ends once")
        self._row.leave(tokens, exc, result)

    def __del__(self) -> None:
        if getattr(self, "_tokens", None) is not None:
            self.cancel()  # first: the warning may be raised
            warnings.warn("a permit was dropped without success, failure or cancel", ResourceWarning, stacklevel=2)


# The scopes of `with policy:` blocks, by policy and by the frame that holds the block: a generator's frame stays
# the same wherever it goes on. Blocks of an ExitStack have no frame (0), and are told apart by who opened them.
_opened: dict[tuple[int, int], list[tuple[object, Scope]]] = {}


def frame_of_block(depth: int = 2) -> int:
    """Which frame holds the `with` statement that called the caller; 0 for an ExitStack's."""
    frame = sys._getframe(depth)
    return 0 if frame.f_code.co_filename == contextlib.__file__ else id(frame)


def _opener() -> object:
    """The task or thread that runs this."""
    timers = running_timers()
    if timers is not None:
        return id(current_task(timers.loop))
    if on_trio():
        import trio

        return id(trio.lowlevel.current_task())
    return threading.get_ident()


def push(owner: object, frame: int, scope: Scope) -> None:
    """Remember the scope that `with owner:` opened."""
    with lock:
        _opened.setdefault((id(owner), frame), []).append((_opener(), scope))


def pop(owner: object, frame: int) -> Scope:
    """The scope that the same block opened."""
    with lock:
        key = (id(owner), frame)
        keys = [key] if frame and key in _opened else []
        if not keys:  # of an ExitStack, a hand-written one, or compiled code, which has no frames
            keys = [one for one in reversed(_opened) if one[0] == id(owner)]
        if not keys:
            raise RuntimeError(f"{owner!r} was not entered; each block exits once")
        me = _opener()
        candidates = [(one, entry) for one in keys for entry in reversed(_opened[one])]
        key, entry = next((pair for pair in candidates if pair[1][0] == me), candidates[0])
        _opened[key].remove(entry)
        if not _opened[key]:
            del _opened[key]
        return entry[1]
