"""The functions a row of guards puts in place of the user's: one frame for the whole row."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import AsyncGeneratorType
from typing import Any, TypeVar, cast

import anyio

from seawall.core import gate, watching
from seawall.core.gate import Row
from seawall.core.protocol import Answering, Around, AroundPerCall, Expiry, Rescuer, Token
from seawall.core.sleeping import async_sleeper
from seawall.core.timers import disarm, hide, show
from seawall.core.unrolled import make_frame, make_rescue_frame
from seawall.core.watching import Site, Watch

T = TypeVar("T")


def async_frame(fn: Callable[..., Awaitable[Any]], row: Row, site: Site | None) -> Callable[..., Awaitable[Any]]:
    """`fn`, a coroutine function, behind `row`. The outermost frame of a call has the site of all calls of its name."""
    return make_frame(fn, row, site, async_sleeper, expiring)


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


def sync_frame(fn: Callable[..., Any], row: Row, site: Site | None) -> Callable[..., Any]:
    """`fn`, a plain function, behind `row`."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        watch = watching.begin(site)
        tokens: list[Token] = []
        try:
            chosen = row.for_call(args, kwargs)
            chosen.enter_sync(tokens)
        except BaseException as exc:
            watching.end(watch, exc)
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
            chosen.fail(tokens, exc, watch)
            raise
        if chosen.timed:
            hide(tokens[-1])
        chosen.leave_well(tokens, watch, result)
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


def generator_frame(fn: Callable[..., Generator[Any, Any, Any]], row: Row, site: Site | None) -> Callable[..., Any]:
    """`fn`, a generator function, behind `row` from its first item to its end."""

    def guarded(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        watch = watching.begin(site)
        tokens: list[Token] = []
        try:
            chosen = row.for_call(args, kwargs)
            chosen.enter_sync(tokens)
        except BaseException as exc:
            watching.end(watch, exc)
            raise
        try:
            items = fn(*args, **kwargs)
            result = yield from (items if watch is None else _current_at_work(items, watch))
        except BaseException as exc:
            chosen.fail(tokens, exc, watch)
            raise
        chosen.leave_well(tokens, watch, result)
        return result

    return guarded


def _current_at_work(items: Generator[Any, Any, Any], watch: Watch) -> Generator[Any, Any, Any]:
    """`items`, with the call's span current while they are made, and not while the consumer has them."""
    step, value = items.send, None
    while True:
        watch.enter()
        try:
            item = step(value)
        except StopIteration as stop:
            return stop.value
        finally:
            watch.leave()
        try:
            step, value = items.send, (yield item)
        except GeneratorExit:
            items.close()
            raise
        except BaseException as thrown:
            step, value = items.throw, thrown


class _Held(list[Token]):
    """The tokens of a stream. One dropped on a closed loop, which finalises nothing, leaves all the same."""

    __slots__ = ("_row", "_watch")

    def __init__(self, row: Row, watch: Watch | None) -> None:
        super().__init__()
        self._row = row
        self._watch = watch

    def __del__(self) -> None:
        if self:
            watching.end(self._watch, self._row.leave(self, GeneratorExit()))


def stream_frame(fn: Callable[..., AsyncGenerator[Any, Any]], row: Row, site: Site | None) -> Callable[..., Any]:
    """`fn`, an async generator function, behind `row` from its first item to its end.

    Deadlines hold per item: they run while the generator works, not while the consumer does, and each item may
    be asked for by another task.
    """

    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        watch = watching.begin(site)
        try:
            chosen = row.for_call(args, kwargs)
            tokens = _Held(chosen, watch)
            await chosen.enter(tokens)
        except BaseException as exc:
            watching.end(watch, exc)
            raise
        try:
            stream = fn(*args, **kwargs)
        except BaseException as exc:
            chosen.fail(tokens, exc, watch)
            raise
        try:
            item = await _step(chosen, tokens, stream.__anext__(), watch)
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
                item = await _step(chosen, tokens, step, watch)
        except StopAsyncIteration:
            chosen.leave_well(tokens, watch)
        except BaseException as exc:
            chosen.fail(tokens, exc, watch)
            raise

    return guarded


async def _step(row: Row, tokens: list[Token], step: Awaitable[Any], watch: Watch | None) -> Any:
    """One step of a stream under fresh deadlines; its span is current for so long, and never across a `yield`."""
    if watch is not None:
        return await _at_work(_step(row, tokens, step, None), watch)
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


async def _at_work(step: Awaitable[T], watch: Watch | None) -> T:
    if watch is None:
        return await step
    watch.enter()
    try:
        return await step
    finally:
        watch.leave()


Choose = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def _chooser(around: Around | AroundPerCall) -> Choose | None:
    """How to find the around of a call; None where it is always this one. Asked once: the check takes 3 µs."""
    return None if isinstance(around, Around) else around.around_for


def around_frame(fn: Callable[..., Awaitable[Any]], around: Any, site: Site | None) -> Callable[..., Awaitable[Any]]:
    """`fn`, a coroutine function, owned by `around`."""
    if isinstance(around, Rescuer):
        return make_rescue_frame(fn, around, site)
    choose = _chooser(around)
    if choose is None:
        run = around.around

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            if watching.hooked or watching.timing:
                return await _watched(site, run(lambda: fn(*args, **kwargs)))
            return await run(lambda: fn(*args, **kwargs))

    elif isinstance(around, Answering):
        answer_for = around.answer_for

        async def answered(args: Any, kwargs: Any) -> Any:
            known, answer = answer_for(args, kwargs)
            return answer if known else await answer.around(lambda: fn(*args, **kwargs))

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            if watching.hooked or watching.timing:
                return await _watched(site, answered(args, kwargs))
            known, answer = answer_for(args, kwargs)
            return answer if known else await answer.around(lambda: fn(*args, **kwargs))

    else:

        async def owned(args: Any, kwargs: Any) -> Any:
            return await choose(args, kwargs).around(lambda: fn(*args, **kwargs))

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            if watching.hooked or watching.timing:
                return await _watched(site, owned(args, kwargs))
            return await choose(args, kwargs).around(lambda: fn(*args, **kwargs))

    return guarded


async def _watched(site: Site | None, call: Awaitable[T]) -> T:
    """`call`, watched from before its first step."""
    watch = watching.begin(site)
    if watch is None:
        return await call
    try:
        result = await call
    except BaseException as exc:
        watch.end(exc)
        raise
    watch.end(None)
    return result


def around_sync_frame(fn: Callable[..., Any], around: Any, site: Site | None) -> Callable[..., Any]:
    """`fn`, a plain function, owned by `around`."""
    choose = _chooser(around)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            result = fn(*args, **kwargs)
            if _runs_later(result):
                raise _not_plain(fn, result)
            return result

        watch = watching.begin(site)
        try:
            result = (around if choose is None else choose(args, kwargs)).around_sync(call)
        except BaseException as exc:
            watching.end(watch, exc)
            raise
        watching.end(watch, None)
        return result

    return guarded


def around_stream_frame(
    fn: Callable[..., AsyncGenerator[Any, Any]], around: Any, site: Site | None
) -> Callable[..., Any]:
    """`fn`, an async generator function, whose start `around` owns, by an `open_stream`."""
    choose = _chooser(around)

    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        watch = watching.begin(site)
        try:
            owner = around if choose is None else choose(args, kwargs)
            stream, items = await _at_work(owner.open_stream(lambda: fn(*args, **kwargs)), watch)
            if stream is None:
                for item in items:
                    yield item
            else:
                try:
                    item = items[0] if items else await _at_work(stream.__anext__(), watch)
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
                        item = await (step if watch is None else _at_work(step, watch))
                except StopAsyncIteration:
                    pass
        except BaseException as exc:
            watching.end(watch, exc)
            raise
        watching.end(watch, None)

    return guarded
