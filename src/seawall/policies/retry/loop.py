"""Retrying a block instead of a function."""

from __future__ import annotations

import math
from types import TracebackType
from typing import TYPE_CHECKING, Self

from seawall.core import gate
from seawall.core.sleeping import pause
from seawall.policies.retry.run import LONGEST, Run, TimeLimit

if TYPE_CHECKING:
    from seawall.policies.retry.policy import Retry


class Loop:
    """The attempts of one block, for `for` or `async for`. Good for one use.

    Ends after an attempt that went well, or by the error of the last one.
    """

    __slots__ = ("_asynchronous", "_over", "_policy", "_run", "_timed_out")

    def __init__(self, policy: Retry) -> None:
        self._policy = policy
        self._run: Run | None = None
        self._asynchronous = False
        self._over = False
        self._timed_out = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Try:
        run = self._next(blocks=True)
        if run is None:
            raise StopIteration
        if run.pause is not None:
            try:
                gate.pause_sync(min(run.pause, LONGEST))
                self._resume(run)
            except BaseException:
                self._end()
                raise
        return Try(self, run, run.number)

    def __aiter__(self) -> Self:
        self._asynchronous = True
        return self

    async def __anext__(self) -> Try:
        run = self._next(blocks=False)
        if run is None:
            raise StopAsyncIteration
        if run.pause is not None:
            try:
                await pause(run.pause)
                self._resume(run)
            except BaseException:
                self._end()
                raise
        return Try(self, run, run.number)

    def _next(self, *, blocks: bool) -> Run | None:
        """The run, if another attempt follows."""
        if self._timed_out and self._run is not None:
            try:
                self._run.last()
            finally:
                self._end()
        if self._run is None and not self._over:
            self._over = True  # unless the attempt says that another follows
            self._run = Run(self._policy, blocks=blocks)
            return self._run
        return None if self._over else self._run

    def _resume(self, run: Run) -> None:
        self._over = True
        if not run.resume():
            run.last()

    def _end(self) -> None:
        self._over = True
        run, self._run = self._run, None
        if run is not None:
            run.close()

    def __del__(self) -> None:
        self._end()  # left by `break` after an attempt that failed


class Try:
    """One attempt of a block: `with attempt:` around what may fail. `number` counts from 1."""

    __slots__ = ("_limit", "_loop", "_run", "number")

    def __init__(self, loop: Loop, run: Run, number: int) -> None:
        self._loop = loop
        self._run = run
        self._limit: TimeLimit | None = None
        self.number = number

    def __enter__(self) -> Self:
        run = self._run
        if run.limit < math.inf:
            left = max(0.0, run.limit - gate.now())
            self._limit = TimeLimit(run, after=left, cancels=self._loop._asynchronous)
            self._limit.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> bool:
        loop, run = self._loop, self._run
        follows = False
        try:
            if self._limit is not None and self._limit.__exit__(kind, exc, trace):
                loop._timed_out = follows = True
            elif exc is None or isinstance(exc, Exception):
                follows = run.after(exc, None) is not None
                loop._over = not follows
        finally:
            if not follows:
                loop._end()
        return follows
