"""The functions a row of guards puts in place of the user's: one frame for the whole row."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, cast

import anyio

from seawall.core import gate
from seawall.core.gate import EndSpan, Row
from seawall.core.protocol import Around, AroundPerCall, Expiry, Token
from seawall.core.sleeping import async_sleeper
from seawall.core.timers import disarm, hide, show
from seawall.core.unrolled import make_frame


def async_frame(fn: Callable[..., Awaitable[Any]], row: Row, name: str | None) -> Callable[..., Awaitable[Any]]:
    """`fn`, a coroutine function, behind `row`."""
    return make_frame(fn, row, name, async_sleeper, expiring)


def _begin(name: str | None) -> EndSpan | None:
    """The span of a call, where somebody records; a frame without a name is a part of a call."""
    return None if gate.tracer is None or name is None else gate.tracer(name)


def _end(span: EndSpan | None, exc: BaseException | None) -> None:
    if span is not None:
        span(exc)


async def expiring(token: Token, call: Awaitable[Any]) -> Any:
    """`call` until its deadline, where asyncio does not run: on trio, through anyio."""
    expiry = cast(Expiry, token)
    show(expiry)
    try:
        with anyio.move_on_after(expiry.left(gate.clock())):
            return await call
    finally:
        hide(expiry)
    expiry.expired = True
    raise asyncio.CancelledError  # what a deadline looks like to the guards, on every event loop


def sync_frame(fn: Callable[..., Any], row: Row, name: str | None) -> Callable[..., Any]:
    """`fn`, a plain function, behind `row`."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        span = _begin(name)
        tokens: list[Token] = []
        try:
            chosen = row.for_call(args, kwargs)
            chosen.enter_sync(tokens)
        except BaseException as exc:
            _end(span, exc)
            raise
        try:
            if chosen.timed:
                show(tokens[-1])
            result = fn(*args, **kwargs)
            if hasattr(type(result), "__await__"):  # the type: a proxy says yes to any attribute
                raise _not_plain(fn, result)
        except BaseException as exc:
            if chosen.timed:
                hide(tokens[-1])
            chosen.fail(tokens, exc, span)
            raise
        if chosen.timed:
            hide(tokens[-1])
        chosen.leave_well(tokens, span, result)
        return result

    return guarded


def _not_plain(fn: Callable[..., Any], result: Any) -> TypeError:
    """A plain function that returns a coroutine: its guards would be gone before the work begins."""
    if hasattr(result, "close"):
        result.close()
    name, given = getattr(fn, "__qualname__", fn), type(result).__name__
    return TypeError(
        f"{name} is a plain function but returned {given}, which nothing guards; "
        "decorate the `async def` itself, or make this function `async`"
    )


def generator_frame(fn: Callable[..., Generator[Any, Any, Any]], row: Row, name: str | None) -> Callable[..., Any]:
    """`fn`, a generator function, behind `row` from its first item to its end."""

    def guarded(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        span = _begin(name)
        tokens: list[Token] = []
        try:
            chosen = row.for_call(args, kwargs)
            chosen.enter_sync(tokens)
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


def stream_frame(fn: Callable[..., AsyncGenerator[Any, Any]], row: Row, name: str | None) -> Callable[..., Any]:
    """`fn`, an async generator function, behind `row` from its first item to its end.

    Deadlines hold per item: they run while the generator works, not while the consumer does, and each item may
    be asked for by another task.
    """

    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        span = _begin(name)
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
    expiry = cast(Expiry, tokens[-1])
    if not row.arm(tokens):
        return await expiring(expiry, step)
    try:
        item = await step
    finally:
        disarm(expiry)
    expiry.expired = False  # swallowed: the item came, and a later cancellation is not ours
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
