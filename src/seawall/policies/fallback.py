"""Fallback: when a call fails, somebody else answers."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar, cast

from seawall.core import checks
from seawall.core.checks import NOTHING
from seawall.core.decorate import Kind, kind_of, label
from seawall.core.events import Event, Listener, ask
from seawall.core.policy import AroundPolicy

P = ParamSpec("P")
T = TypeVar("T")
Step: TypeAlias = Callable[..., object]  # of one argument: what it replaces
On: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[..., bool]


@dataclass(frozen=True, slots=True)
class FallbackUsed(Event):
    """Step `index` (from 0), called `step`, answered instead of a call. No error: the call's result was replaced."""

    index: int
    step: str
    error: Exception | None


@dataclass(frozen=True, slots=True)
class FallbackFailed(Event):
    """Step `index` (from 0), called `step`, was asked instead of a call and failed with `error`."""

    index: int
    step: str
    error: Exception


@dataclass(frozen=True, slots=True)
class FallbackSnapshot:
    """A fallback's counters, which only grow. `used` has one for each step. Cancelled calls are nowhere."""

    succeeded: int
    replaced: int
    failed: int
    used: tuple[int, ...]


class Fallback(AroundPolicy):
    """Answers in place of a call that failed: with what the first of its steps that works returns.

    A step is a function of one argument, what it replaces: the exception, or the result that `on_result` refused. It
    may be `async`. The last step may be a plain `value`, which is given out as it is, the same object each time. If
    every step fails the caller gets the call's own exception, as it was, with a note of what failed after it.
    A cancellation is never replaced.

    An async generator is replaced until its first item has come: by all the items of a step that is an async
    generator function, or by the one item that any other step or the value gives.

    Args:
        name: labels errors, metrics and logs.
        steps: a function, or a tuple of functions that are tried in order.
        value: the answer where no step gives one.
        on: which exceptions to replace, refusals of policies further in included: classes, or a function of the
            exception.
        on_result: which results to replace, as a function of the result.
        listeners: called with its `FallbackUsed` and `FallbackFailed` events.

    Raises:
        TypeError: when it decorates a plain function though a step is `async`.

    Examples:
        >>> @Fallback("rates", lambda error: f"yesterday's, for {error}", on=ConnectionError)
        ... def rates():
        ...     raise ConnectionError("no route to the bank")
        >>> rates()
        "yesterday's, for no route to the bank"
    """

    kind = "fallback"
    streams = True

    def __init__(
        self,
        name: str,
        steps: Step | tuple[Step, ...] = (),
        *,
        value: object = NOTHING,
        on: On = Exception,
        on_result: Callable[..., bool] | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.steps = steps
        self.value = value
        self.on = on
        self.on_result = on_result
        functions = steps if isinstance(steps, tuple) else (steps,)
        self._steps = tuple(map(_step, functions)) + (() if value is NOTHING else (_given(value),))
        if not self._steps:
            raise TypeError(f"Fallback {name!r} has nothing to fall back to: give it steps or a value")
        self._classes = _classes(on)
        if self._classes is None:
            checks.function("on", on)
        if on_result is not None:
            checks.function("on_result", on_result)
        # what a row of plain functions can't have
        self.needs_event_loop = any(step.kind is Kind.ASYNC for step in self._steps)  # type: ignore[misc]
        self.passed = 0
        self._replaced = 0
        self._failed = 0
        self._register()

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """`fn` behind this fallback. TypeError where one of its steps can't answer for it."""
        target = getattr(fn, "__func__", fn)
        kind = kind_of(target)
        for step in self._steps:
            if step.kind is Kind.ASYNC and kind is Kind.PLAIN:
                raise TypeError(f"{step.name} is async, and {label(target)}, a plain function, can't await it")
            if step.kind is Kind.STREAM and kind is not Kind.STREAM:
                raise TypeError(f"{step.name} is an async generator, which can't answer for {label(target)}")
        return super().__call__(fn)

    @property
    def rescues(self) -> bool:
        """Whether nothing matters but an exception; see `Rescuer`."""
        return self.on_result is None

    async def around(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run `call`; if it fails, the steps."""
        try:
            result = await call()
        except Exception as exc:
            error = exc
        else:
            if self.on_result is None or not ask(self.on_result, result, otherwise=False):
                self.passed += 1
                return result
            answer = await self._replace(result, None)
            return result if answer is NOTHING else cast(T, answer)
        try:
            return await self.rescue(error, call)
        finally:
            del error  # or it, its traceback and this frame would be a cycle

    async def rescue(self, exc: Exception, call: Callable[[], Awaitable[T]]) -> T:
        """The call failed with `exc`: ask the steps."""
        try:
            raise exc  # so that the steps run while it is being handled, which `logging.exception` goes by
        except Exception:
            answer = await self._replace(exc, exc) if self._replaces(exc) else self._fail()
            if answer is NOTHING:
                raise
            return cast(T, answer)
        finally:
            del exc

    async def _replace(self, replaced: object, error: Exception | None) -> object:
        """What the first step that works answers; NOTHING if none does."""
        for index, step in enumerate(self._steps):
            try:
                answer = _single(step, replaced)
                if hasattr(type(answer), "__await__"):
                    answer = await cast(Awaitable[object], answer)
            except Exception as exc:
                self._step_failed(index, step, error, exc)
            else:
                return self._answered(index, step, error, answer)
        return self._fail()

    def around_sync(self, call: Callable[[], T]) -> T:
        """The same for plain functions."""
        try:
            result = call()
        except Exception as exc:
            answer = self._replace_sync(exc, exc) if self._replaces(exc) else self._fail()
            if answer is NOTHING:
                raise
            return cast(T, answer)
        if self.on_result is None or not ask(self.on_result, result, otherwise=False):
            self.passed += 1
            return result
        answer = self._replace_sync(result, None)
        return result if answer is NOTHING else cast(T, answer)

    def _replace_sync(self, replaced: object, error: Exception | None) -> object:
        for index, step in enumerate(self._steps):
            try:
                answer = _single(step, replaced)
                if hasattr(type(answer), "__await__"):
                    raise _no_loop(step, answer)
            except Exception as exc:
                self._step_failed(index, step, error, exc)
            else:
                return self._answered(index, step, error, answer)
        return self._fail()

    async def open_stream(
        self, call: Callable[[], AsyncGenerator[T, Any]]
    ) -> tuple[AsyncGenerator[T, Any] | None, list[T]]:
        """The stream that `call` opens; if it fails before its first item, what the steps give."""
        stream = call()
        try:
            item = await stream.__anext__()
        except StopAsyncIteration:
            self._succeed()
            return None, []
        except Exception as exc:
            opened = await self._open(exc) if self._replaces(exc) else self._fail()
            if opened is NOTHING:
                raise
            return cast(tuple[AsyncGenerator[T, Any] | None, list[T]], opened)
        self._succeed()
        return stream, [item]

    async def _open(self, error: Exception) -> object:
        """The stream and the first items of the first step that works; NOTHING if none does."""
        for index, step in enumerate(self._steps):
            stream = None
            items: list[object] = []
            try:
                answer = step.ask(error)
                if step.kind is Kind.STREAM:
                    stream = cast(AsyncGenerator[object, Any], answer)
                    items = [await stream.__anext__()]
                else:
                    items = [await cast(Awaitable[object], answer) if hasattr(type(answer), "__await__") else answer]
            except StopAsyncIteration:
                return self._answered(index, step, error, (None, []))
            except Exception as exc:
                self._step_failed(index, step, error, exc)
            else:
                return self._answered(index, step, error, (stream, items))
        return self._fail()

    def _replaces(self, error: Exception) -> bool:
        if self._classes is None:
            return bool(ask(cast(Callable[[Exception], bool], self.on), error, otherwise=False))
        return isinstance(error, self._classes)

    def _succeed(self) -> None:
        with self._lock:
            self.passed += 1

    def _fail(self) -> object:
        with self._lock:
            self._failed += 1
        return NOTHING

    def _answered(self, index: int, step: _Step, error: Exception | None, answer: object) -> object:
        with self._lock:
            step.used += 1
            self._replaced += 1
        self._tell(FallbackUsed, index, step.name, error)
        return answer

    def _step_failed(self, index: int, step: _Step, error: Exception | None, failure: Exception) -> None:
        """Say that a step failed too, and go on."""
        self._tell(FallbackFailed, index, step.name, failure)
        note = f"fallback {self.name!r}: {step.name} failed too: {_described(failure)}"
        if error is not None and note not in getattr(error, "__notes__", ()):  # one error may be raised many times
            error.add_note(note)

    def _adopt(self, fresh: Self, now: float) -> None:
        kept = {"passed": self.passed, "_replaced": self._replaced, "_failed": self._failed}
        for step, before in zip(fresh._steps, self._steps, strict=False):
            if step.name == before.name:
                step.used = before.used
        vars(self).update(vars(fresh) | kept)

    def snapshot(self) -> FallbackSnapshot:
        """The counters at one moment."""
        with self._lock:
            used = tuple(step.used for step in self._steps)
            return FallbackSnapshot(self.passed, self._replaced, self._failed, used)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        with self._lock:
            return {"succeeded": self.passed, "replaced": self._replaced, "failed": self._failed}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters: nothing."""
        return {}


class _Step:
    """A function that answers, or a value; and how often it did."""

    __slots__ = ("ask", "kind", "name", "used")

    def __init__(self, ask: Step, name: str, kind: Kind = Kind.PLAIN) -> None:
        self.ask = ask
        self.name = name
        self.kind = kind
        self.used = 0


def _step(function: Step) -> _Step:
    """`function` as a step, if it can be one."""
    if isinstance(function, type) or not callable(function):
        raise TypeError(f"a step must be a function of what it replaces, got {function!r}; a constant goes in value=")
    name, kind = label(function), kind_of(function)
    if kind is Kind.GENERATOR:
        raise TypeError(f"{name} is a generator, which answers nothing; make it a function or an async generator")
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise TypeError(f"{name} must take one argument: the exception or result that it replaces") from None
    except ValueError:  # a builtin that does not tell
        pass
    return _Step(function, name, kind)


def _described(failure: Exception) -> str:
    """Class and message of `failure`, without its notes; also where its own `str` fails."""
    described = traceback.TracebackException(type(failure), failure, None, compact=True)
    described.__notes__ = None
    return list(described.format_exception_only())[-1].strip()


def _given(value: object) -> _Step:
    return _Step(lambda _: value, "value")


def _single(step: _Step, replaced: object) -> object:
    """The answer of a step to a call that is no stream."""
    if step.kind is Kind.STREAM:
        raise TypeError(f"{step.name} is an async generator, which can only answer for another")
    return step.ask(replaced)


def _no_loop(step: _Step, answer: object) -> TypeError:
    if hasattr(answer, "close"):
        answer.close()
    return TypeError(f"{step.name} returned {type(answer).__name__}, which a plain function can't await")


def _classes(on: On) -> tuple[type[BaseException], ...] | None:
    """`on` as classes; None if it is a function."""
    if not isinstance(on, (type, tuple)):
        return None
    classes = checks.exceptions("on", on)
    for one in classes:
        if not issubclass(one, Exception):
            raise TypeError(f"on must be exceptions, and {one.__name__} ends a program or a task: nothing replaces it")
    return classes
