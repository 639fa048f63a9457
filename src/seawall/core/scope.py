"""Guarding a block instead of a function, and calls that begin in one place and end in another."""

from __future__ import annotations

import asyncio
import warnings
from contextvars import ContextVar
from types import TracebackType
from typing import Self

import anyio

from seawall.core.gate import Row
from seawall.core.protocol import Token


class Scope:
    """One guarded block: `async with policy.scope():`, or `with` where no timeout is in the row. Good for one use."""

    __slots__ = ("_cancel", "_row", "_tokens")

    def __init__(self, row: Row) -> None:
        self._row = row
        self._tokens: list[Token] | None = None
        self._cancel: anyio.CancelScope | None = None

    def _begin(self) -> list[Token]:
        if self._tokens is not None:
            raise RuntimeError("a scope guards one block once; call scope() again for the next")
        self._tokens = []
        return self._tokens

    def __enter__(self) -> Self:
        if self._row.timed:
            raise TypeError("Timeout needs an event loop to cancel a call; use `async with`")
        self._begin()
        self._tokens = self._row.enter_sync()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        tokens, self._tokens = self._tokens or [], []
        if exc is None:
            self._row.leave_well(tokens)
        else:
            self._row.fail(tokens, exc)

    async def __aenter__(self) -> Self:
        tokens = self._begin()
        await self._row.enter(tokens)
        try:
            if self._row.timed and not self._row.arm(tokens):
                first = min(deadline.after for deadline in self._row.deadlines(tokens))
                self._cancel = anyio.move_on_after(first).__enter__()
        except BaseException as exc:
            self._row.disarm(tokens)
            self._row.fail(tokens, exc)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        tokens, self._tokens = self._tokens or [], []
        if self._cancel is not None:
            try:
                self._cancel.__exit__(kind, exc, trace)
            except BaseException as rest:  # of a group of errors, without the cancellations
                self._row.fail(tokens, rest)
                raise
            if self._cancel.cancelled_caught:  # trio's __exit__ also says True where all went well
                min(self._row.deadlines(tokens), key=lambda deadline: deadline.after).expired = True
                exc = asyncio.CancelledError()
        self._row.disarm(tokens)
        if exc is not None:
            self._row.fail(tokens, exc)
            return
        self._row.leave_well(tokens)


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


_open: ContextVar[tuple[tuple[object, Scope], ...]] = ContextVar("seawall_open", default=())


def push(owner: object, scope: Scope) -> None:
    """Remember the scope that `with owner:` opened, in this task or thread."""
    _open.set((*_open.get(), (owner, scope)))


def pop(owner: object) -> Scope:
    """The scope that this task or thread opened last for `owner`."""
    stack = _open.get()
    for index in range(len(stack) - 1, -1, -1):
        if stack[index][0] is owner:
            _open.set(stack[:index] + stack[index + 1 :])
            return stack[index][1]
    raise RuntimeError(f"{owner!r} was entered in another context; hold on to `scope()` instead")
