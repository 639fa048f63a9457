"""The functions a row of guards puts in place of the user's: one frame for the whole row."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any

import anyio

from seawall.core import events, gate
from seawall.core.gate import EndSpan, Row
from seawall.core.protocol import Around, AroundPerCall, Deadline, Token, Wait
from seawall.core.sleeping import async_sleeper

_acquire, _release = gate.lock.acquire, gate.lock.release
_pending = events.pending


def async_frame(fn: Callable[..., Awaitable[Any]], row: Row, name: str) -> Callable[..., Awaitable[Any]]:
    """`fn`, a coroutine function, behind `row`. The hot path: `Row.enter` and `leave` stand inlined."""
    if row.per_call or row.judging:
        return _choosing_frame(fn, row, name)
    enters, exits, timed = row.enters, row.exits, row.timed

    async def guarded(*args: Any, **kwargs: Any) -> Any:
        tokens: list[Token] = []
        waiting: Wait | None = None
        span = None if gate.tracer is None else gate.tracer(name)
        try:
            _acquire()
            try:
                moment = gate.clock()
                for enter in enters:
                    tokens.append(enter(moment))
            except Wait as wait:
                gate.bed(wait, async_sleeper)
                waiting = wait.with_traceback(None)
            finally:
                _release()
        except BaseException as exc:
            row.fail(tokens, exc, span)
            raise
        try:
            if waiting is not None:
                await row.enter(tokens, waiting)
            elif _pending:
                events.deliver()
        except BaseException as exc:
            row.fail(tokens, exc, span)
            raise
        try:
            if timed and not row.arm(tokens):
                result = await _expiring(row.deadlines(tokens), fn(*args, **kwargs))
            else:
                result = await fn(*args, **kwargs)
        except BaseException as exc:
            if timed:
                row.disarm(tokens)
            row.fail(tokens, exc, span)
            raise
        if timed:
            row.disarm(tokens)
        try:
            _acquire()
            try:
                moment = gate.clock()
                for leave in exits:
                    leave(tokens.pop(), moment, None)
            finally:
                _release()
        except BaseException as exc:
            row.fail(tokens, exc, span)
            raise
        if _pending:
            events.deliver()
        if span is not None:
            span(None)
        return result

    return guarded


def _choosing_frame(fn: Callable[..., Awaitable[Any]], row: Row, name: str) -> Callable[..., Awaitable[Any]]:
    """The same for rows whose guards depend on the arguments, or look at the result."""

    async def guarded(*args: Any, **kwargs: Any) -> Any:
        span = None if gate.tracer is None else gate.tracer(name)
        tokens: list[Token] = []
        try:
            chosen = row.for_call(args, kwargs)
            await chosen.enter(tokens)
        except BaseException as exc:
            _end(span, exc)
            raise
        try:
            if chosen.timed and not chosen.arm(tokens):
                result = await _expiring(chosen.deadlines(tokens), fn(*args, **kwargs))
            else:
                result = await fn(*args, **kwargs)
        except BaseException as exc:
            chosen.disarm(tokens)
            chosen.fail(tokens, exc, span)
            raise
        chosen.disarm(tokens)
        chosen.leave_well(tokens, span, result)
        return result

    return guarded


def _end(span: EndSpan | None, exc: BaseException | None) -> None:
    if span is not None:
        span(exc)


async def _expiring(deadlines: list[Deadline], call: Awaitable[Any]) -> Any:
    """`call` under the earliest of `deadlines`, where asyncio does not run: on trio, through anyio."""
    first = min(deadlines, key=lambda deadline: deadline.after)
    with anyio.move_on_after(first.after):
        return await call
    first.expired = True
    raise asyncio.CancelledError  # what a deadline looks like to the guards, on every event loop


def sync_frame(fn: Callable[..., Any], row: Row, name: str) -> Callable[..., Any]:
    """`fn`, a plain function, behind `row`."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        span = None if gate.tracer is None else gate.tracer(name)
        try:
            chosen = row.for_call(args, kwargs)
            tokens = chosen.enter_sync()
        except BaseException as exc:
            _end(span, exc)
            raise
        try:
            result = fn(*args, **kwargs)
            if hasattr(type(result), "__await__"):  # the type: a proxy says yes to any attribute
                raise _not_plain(name, result)
        except BaseException as exc:
            chosen.fail(tokens, exc, span)
            raise
        chosen.leave_well(tokens, span, result)
        return result

    return guarded


def _not_plain(name: str, result: Any) -> TypeError:
    """A plain function that returns a coroutine: its guards would be gone before the work begins."""
    if hasattr(result, "close"):
        result.close()
    return TypeError(
        f"{name} is a plain function but returned {type(result).__name__}, which nothing guards; "
        "decorate the `async def` itself, or make this function `async`"
    )


def generator_frame(fn: Callable[..., Generator[Any, Any, Any]], row: Row, name: str) -> Callable[..., Any]:
    """`fn`, a generator function, behind `row` from its first item to its end."""

    def guarded(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        span = None if gate.tracer is None else gate.tracer(name)
        try:
            chosen = row.for_call(args, kwargs)
            tokens = chosen.enter_sync()
        except BaseException as exc:
            _end(span, exc)
            raise
        try:
            result = yield from fn(*args, **kwargs)
        except BaseException as exc:
            chosen.fail(tokens, exc, span)
            raise
        chosen.leave_well(tokens, span, result)
        return result

    return guarded


class _Held(list[Token]):
    """The tokens of a stream. One dropped on a closed loop, which finalises nothing, leaves all the same."""

    __slots__ = ("_row",)

    def __init__(self, row: Row) -> None:
        super().__init__()
        self._row = row

    def __del__(self) -> None:
        if self:
            self._row.leave(self, GeneratorExit())


def stream_frame(fn: Callable[..., AsyncGenerator[Any, Any]], row: Row, name: str) -> Callable[..., Any]:
    """`fn`, an async generator function, behind `row` from its first item to its end.

    Deadlines hold per item: they run while the generator works, not while the consumer does, and each item may
    be asked for by another task.
    """

    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        span = None if gate.tracer is None else gate.tracer(name)
        try:
            chosen = row.for_call(args, kwargs)
            tokens = _Held(chosen)
            await chosen.enter(tokens)
        except BaseException as exc:
            _end(span, exc)
            raise
        try:
            stream = fn(*args, **kwargs)
        except BaseException as exc:
            chosen.fail(tokens, exc, span)
            raise
        try:
            item = await _step(chosen, tokens, stream.__anext__())
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    await stream.aclose()
                    raise
                except BaseException as thrown:
                    step = stream.athrow(thrown)
                else:
                    step = stream.asend(sent)
                item = await _step(chosen, tokens, step)
        except StopAsyncIteration:
            chosen.leave_well(tokens, span)
        except BaseException as exc:
            chosen.fail(tokens, exc, span)
            raise

    return guarded


async def _step(row: Row, tokens: list[Token], step: Awaitable[Any]) -> Any:
    """One step of a stream under fresh deadlines."""
    if not row.timed:
        return await step
    deadlines = row.deadlines(tokens)
    if not row.arm(tokens):
        return await _expiring(deadlines, step)
    try:
        item = await step
    finally:
        row.disarm(tokens)
    for deadline in deadlines:
        deadline.expired = False  # swallowed: the item came, and a later cancellation is not ours
    return item


def _chosen(around: Around | AroundPerCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Around:
    return around if isinstance(around, Around) else around.around_for(args, kwargs)


def around_frame(fn: Callable[..., Awaitable[Any]], around: Around | AroundPerCall) -> Callable[..., Awaitable[Any]]:
    """`fn`, a coroutine function, owned by `around`."""
    if isinstance(around, Around):
        run = around.around

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            return await run(lambda: fn(*args, **kwargs))

    else:

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            return await around.around_for(args, kwargs).around(lambda: fn(*args, **kwargs))

    return guarded


def around_sync_frame(fn: Callable[..., Any], around: Around | AroundPerCall) -> Callable[..., Any]:
    """`fn`, a plain function, owned by `around`."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        return _chosen(around, args, kwargs).around_sync(lambda: fn(*args, **kwargs))

    return guarded


def around_stream_frame(fn: Callable[..., AsyncGenerator[Any, Any]], around: Any) -> Callable[..., Any]:
    """`fn`, an async generator function, owned by `around`, which has an `around_stream`."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        return _chosen(around, args, kwargs).around_stream(lambda: fn(*args, **kwargs))  # type: ignore[attr-defined]

    return guarded
