"""From a function and its policies to one guarded function of the same kind."""

from __future__ import annotations

import enum
import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

from seawall.core import frames, watching
from seawall.core.gate import Row
from seawall.core.protocol import Around, AroundPerCall, Guard, GuardPerCall

P = ParamSpec("P")
T = TypeVar("T")
Policy: TypeAlias = Guard | Around | GuardPerCall | AroundPerCall
POLICY_TYPES = (Guard, Around, GuardPerCall, AroundPerCall)


class Kind(enum.Enum):
    """What a function is, by what calling it gives."""

    ASYNC = "an `async def` function"
    PLAIN = "a plain function"
    GENERATOR = "a generator"
    STREAM = "an async generator"


@dataclass(frozen=True, slots=True)
class Guarded:
    """What hangs on a decorated function, as `__seawall__`."""

    fn: Callable[..., Any]  # without any policy
    policies: tuple[Policy, ...]  # outermost first
    wrapper: Callable[[], object]  # weak: tells our own wrapper from somebody's copy of its attributes


def policies_of(fn: object) -> tuple[Policy, ...]:
    """The policies around a decorated function, outermost first; none for any other object.

    Examples:
        >>> from seawall import breaker, bulkhead
        >>> @breaker
        ... @bulkhead(max_concurrent=8)
        ... def pay(): ...
        >>> [type(policy).__name__ for policy in policies_of(pay)]
        ['CircuitBreaker', 'Bulkhead']
    """
    guarded = _guarded(getattr(fn, "__func__", fn))  # a method's are those of its function
    return guarded.policies if guarded else ()


def decorate(fn: Callable[P, T], policies: tuple[Policy, ...], name: str | None = None) -> Callable[P, T]:
    """`fn` behind `policies`, outermost first. Decorating a decorated function makes one longer row."""
    if isinstance(fn, (staticmethod, classmethod)):
        return cast(Callable[P, T], type(fn)(decorate(fn.__func__, policies, name)))
    inner = _guarded(fn)
    target = inner.fn if inner else fn
    row = policies + (inner.policies if inner else ())
    kind = kind_of(target)
    for policy in policies:
        _refuse_misfit(policy, kind, target)
        claim = getattr(policy, "claim", None)
        if claim is not None:  # it serves one function only, and says so if that is another
            claim(target)
    wrapper = _compose(target, row, kind, name or label(target))
    # A callable object's own attributes are none of the wrapper's business.
    updated = functools.WRAPPER_UPDATES if inspect.isroutine(target) else ()
    functools.update_wrapper(wrapper, target, updated=updated)
    wrapper.__seawall__ = Guarded(target, row, weakref.ref(wrapper))  # type: ignore[attr-defined]
    return cast(Callable[P, T], wrapper)


def label(fn: Callable[..., Any]) -> str:
    """The name of a function, for policies that were given none: its module and qualified name."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(fn, (staticmethod, classmethod)):
        fn = fn.__func__
    owner = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{getattr(owner, '__module__', None) or 'builtins'}.{owner.__qualname__}"[-200:]  # as long as names may be


def kind_of(fn: Callable[..., Any]) -> Kind:
    """What calling `fn` gives; TypeError for what can't be guarded."""
    if isinstance(fn, type) or not callable(fn):
        raise TypeError(f"policies guard functions, methods and callable objects, not {fn!r}")
    while isinstance(fn, functools.partial):
        fn = fn.func
    for candidate in (fn, type(fn).__call__):
        if inspect.isasyncgenfunction(candidate):
            return Kind.STREAM
        if inspect.iscoroutinefunction(candidate) or _is_iterable_coroutine(candidate):
            return Kind.ASYNC
        if inspect.isgeneratorfunction(candidate):
            return Kind.GENERATOR
    return Kind.PLAIN


def _is_iterable_coroutine(fn: object) -> bool:
    """Whether `fn` is a generator function that `types.coroutine` made awaitable."""
    code = getattr(fn, "__code__", None)
    return code is not None and bool(code.co_flags & inspect.CO_ITERABLE_COROUTINE)


def _guarded(fn: object) -> Guarded | None:
    found = getattr(fn, "__seawall__", None)
    # functools.wraps copies our mark to other people's wrappers, whose work must not be skipped.
    return found if isinstance(found, Guarded) and found.wrapper() is fn else None


def check_policy(policy: object) -> None:
    """TypeError for what is no policy."""
    if isinstance(policy, type):
        raise TypeError(f"{policy!r} is a class of policies; make one: {policy.__name__}(...)")
    if not isinstance(policy, POLICY_TYPES):
        raise TypeError(f"{policy!r} is no policy: it has neither enter and exit nor around and around_sync")


def _refuse_misfit(policy: Policy, kind: Kind, fn: Callable[..., Any]) -> None:
    policy_type = type(policy).__name__
    check_policy(policy)
    if kind in (Kind.PLAIN, Kind.GENERATOR) and getattr(policy, "needs_event_loop", False):
        raise TypeError(f"{policy_type} needs an event loop; {label(fn)} is {kind.value}, which runs without")
    if kind is Kind.GENERATOR and getattr(policy, "issues_deadlines", False):
        raise TypeError(f"{policy_type} can't hold for {label(fn)}: its consumer's own time would count")
    if kind in (Kind.STREAM, Kind.GENERATOR) and not isinstance(policy, (Guard, GuardPerCall)):
        if kind is Kind.STREAM and getattr(policy, "streams", False):
            return
        raise TypeError(f"{policy_type} runs whole calls; {label(fn)} is {kind.value}, which can't be run again")


def rows(policies: tuple[Policy, ...]) -> list[Row | Around | AroundPerCall]:
    """`policies` with neighbouring guards joined in rows; one that issues deadlines ends its row."""
    parts: list[Row | Around | AroundPerCall] = []
    guards: list[Guard | GuardPerCall] = []

    def end_row() -> None:
        if guards:
            parts.append(Row(tuple(guards)))
            guards.clear()

    for policy in policies:
        if isinstance(policy, (Guard, GuardPerCall)):
            guards.append(policy)
            if getattr(policy, "issues_deadlines", False):
                end_row()
        else:
            end_row()
            parts.append(policy)
    end_row()
    return parts


_FRAMES: dict[Kind, Callable[..., Callable[..., Any]]] = {
    Kind.ASYNC: frames.async_frame,
    Kind.PLAIN: frames.sync_frame,
    Kind.GENERATOR: frames.generator_frame,
    Kind.STREAM: frames.stream_frame,
}

_AROUND_FRAMES: dict[Kind, Callable[..., Callable[..., Any]]] = {
    Kind.ASYNC: frames.around_frame,
    Kind.PLAIN: frames.around_sync_frame,
    Kind.STREAM: frames.around_stream_frame,
}


def _compose(fn: Callable[..., Any], policies: tuple[Policy, ...], kind: Kind, name: str) -> Callable[..., Any]:
    wrapper = fn
    parts = rows(policies) or [Row(())]
    outermost = watching.site(name, policies)
    for index in reversed(range(len(parts))):
        part = parts[index]
        make = _FRAMES[kind] if isinstance(part, Row) else _AROUND_FRAMES[kind]
        wrapper = make(wrapper, part, None if index else outermost)
    return wrapper
