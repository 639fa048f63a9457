"""The functions a row of guards puts in place of the user's: one frame for the whole row."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import AsyncGeneratorType
from typing import Any, cast

import anyio

from seawall.core import gate
from seawall.core.gate import EndSpan, Row
from seawall.core.protocol import Answering, Around, AroundPerCall, Expiry, Rescuer, Token
from seawall.core.sleeping import async_sleeper
from seawall.core.timers import disarm, hide, show
from seawall.core.unrolled import make_frame, make_rescue_frame


def async_frame(fn: Callable[..., Awaitable[Any]], row: Row, name: str | None) -> Callable[..., Awaitable[Any]]:
    """`fn`, a coroutine function, behind `row`."""
    return make_frame(fn, row, name, async_sleeper, expiring)


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
        span = gate.begin_span(name)
        tokens: list[Token] = []
        try:
            chosen = row.for_call(args, kwargs)
            chosen.enter_sync(tokens)
        except BaseException as exc:
            gate.end_span(span, exc)
            raise
        try:
            if chosen.timed:
                show(tokens[-1])
            result = fn(*args, **kwargs)
            if _runs_later(result):
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


def _runs_later(result: Any) -> bool:
    kind = type(result)  # a proxy says yes to any attribute
    return hasattr(kind, "__await__") or kind is AsyncGeneratorType


def _not_plain(fn: Callable[..., Any], result: Any) -> TypeError:
    """A plain function that returns a coroutine or stream: its guards would be gone before the work begins."""
    if inspect.iscoroutine(result):
        result.close()
    name, given = getattr(fn, "__qualname__", fn), type(result).__name__
    return TypeError(
        f"{name} is a plain function but returned {given}, which nothing guards; "
        "decorate the `async def` itself, or make this function `async`"
    )


def generator_frame(fn: Callable[..., Generator[Any, Any, Any]], row: Row, name: str | None) -> Callable[..., Any]:
    """`fn`, a generator function, behind `row` from its first item to its end."""

    def guarded(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        span = gate.begin_span(name)
        tokens: list[Token] = []
        try:
            chosen = row.for_call(args, kwargs)
            chosen.enter_sync(tokens)
        except BaseException as exc:
            gate.end_span(span, exc)
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

    __slots__ = ("_row", "_span")

    def __init__(self, row: Row, span: EndSpan | None) -> None:
        super().__init__()
        self._row = row
        self._span = span

    def __del__(self) -> None:
        if self:
            gate.end_span(self._span, self._row.leave(self, GeneratorExit()))


def stream_frame(fn: Callable[..., AsyncGenerator[Any, Any]], row: Row, name: str | None) -> Callable[..., Any]:
    """`fn`, an async generator function, behind `row` from its first item to its end.

    Deadlines hold per item: they run while the generator works, not while the consumer does, and each item may
    be asked for by another task.
    """

    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        span = gate.begin_span(name)
        try:
            chosen = row.for_call(args, kwargs)
            tokens = _Held(chosen, span)
            await chosen.enter(tokens)
        except BaseException as exc:
            gate.end_span(span, exc)
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


Choose = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def _chooser(around: Around | AroundPerCall) -> Choose | None:
    """How to find the around of a call; None where it is always this one. Asked once: the check takes 3 µs."""
    return None if isinstance(around, Around) else around.around_for


def around_frame(fn: Callable[..., Awaitable[Any]], around: Any) -> Callable[..., Awaitable[Any]]:
    """`fn`, a coroutine function, owned by `around`."""
    if isinstance(around, Rescuer):
        return make_rescue_frame(fn, around)
    choose = _chooser(around)
    if choose is None:
        run = around.around

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            return await run(lambda: fn(*args, **kwargs))

    elif isinstance(around, Answering):
        answer_for = around.answer_for

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            known, answer = answer_for(args, kwargs)
            return answer if known else await answer.around(lambda: fn(*args, **kwargs))

    else:

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            return await choose(args, kwargs).around(lambda: fn(*args, **kwargs))

    return guarded


def around_sync_frame(fn: Callable[..., Any], around: Any) -> Callable[..., Any]:
    """`fn`, a plain function, owned by `around`."""
    choose = _chooser(around)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            result = fn(*args, **kwargs)
            if _runs_later(result):
                raise _not_plain(fn, result)
            return result

        return (around if choose is None else choose(args, kwargs)).around_sync(call)

    return guarded


def around_stream_frame(fn: Callable[..., AsyncGenerator[Any, Any]], around: Any) -> Callable[..., Any]:
    """`fn`, an async generator function, whose start `around` owns, by an `open_stream`."""
    choose = _chooser(around)

    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        owner = around if choose is None else choose(args, kwargs)
        stream, items = await owner.open_stream(lambda: fn(*args, **kwargs))
        if stream is None:
            for item in items:
                yield item
            return
        try:
            item = items[0] if items else await stream.__anext__()
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    await stream.aclose()
                    raise
                except BaseException as thrown:
                    item = await stream.athrow(thrown)
                else:
                    item = await stream.asend(sent)
        except StopAsyncIteration:
            return

    return guarded
