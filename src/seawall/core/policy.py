"""What every policy of ours can do beyond its rules: decorate, guard blocks, be listened to, be found."""

from __future__ import annotations

import inspect
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

from seawall.core import checks, events, gate, registry
from seawall.core.decorate import decorate
from seawall.core.errors import Rejected
from seawall.core.events import CallRejected, Event, Listener
from seawall.core.gate import Row
from seawall.core.protocol import Guard, Token
from seawall.core.scope import Permit, Scope, frame_of_block, pop, push

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Rejected)
_updating = threading.RLock()  # one change at a time, and not under the gate's lock: constructors may run predicates


def apply(changes: Iterable[tuple[PolicyBase, PolicyBase]]) -> None:
    """Let each policy adopt the one prepared for it, all in one moment."""
    with gate.lock:
        now = gate.clock()
        for policy, fresh in changes:
            policy._adopt(fresh, now)
    events.deliver()


class PolicyBase:
    """What guards and arounds of ours share: a name, listeners, counters, a place in the registry."""

    __slots__ = ("__weakref__", "_listeners", "name")
    kind: ClassVar[str] = "policy"
    needs_event_loop: ClassVar[bool] = False
    _lock = gate.lock

    def __init__(self, name: str, listeners: Iterable[Listener] = ()) -> None:
        self.name = checks.name(type(self).__name__, name)
        self._listeners = checks.listeners(listeners)

    def _register(self) -> None:
        """Last step of construction: one that failed must not be found."""
        registry.register(self)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        raise NotImplementedError

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        raise NotImplementedError

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """`fn` behind this policy."""
        return decorate(fn, (self,))  # type: ignore[arg-type]

    def listen(self, listener: Listener) -> None:
        """Hear this policy's events, for as long as it lives. For a while only: `seawall.listen`."""
        with self._lock:
            self._listeners = (*self._listeners, *checks.listeners((listener,)))

    def update(self, **settings: object) -> None:
        """Change settings while calls are in flight: all of them or, if one is wrong, none.

        Takes the constructor's settings by name. Nothing is dropped: calls in flight and waiting go on, under the
        new settings. Whoever holds the policy keeps it, and so do the functions it decorates.

        Raises:
            TypeError, ValueError: as the constructor would; the policy stays as it was.
        """
        with _updating:
            apply([(self, self._prepare(settings))])

    def _prepare(self, settings: Mapping[str, object]) -> Self:
        """A policy like this one, unused, with other settings: to adopt."""
        parameters = list(inspect.signature(type(self)).parameters)[1:]  # without the name
        known = {setting: getattr(self, setting) for setting in parameters if setting != "listeners"}
        unknown = settings.keys() - known.keys()
        if unknown:
            raise TypeError(
                f"{type(self).__name__} {self.name!r} has no setting {', '.join(sorted(unknown))} to change; "
                f"it has {', '.join(known)}"
            )
        with registry.unlisted():
            fresh = type(self)(self.name, **{**known, **settings})
        self._check_change(fresh)
        return fresh

    def _check_change(self, fresh: Self) -> None:
        """ValueError if the settings of `fresh` can't be taken over while in use."""

    def _adopt(self, fresh: Self, now: float) -> None:
        """Take over the settings of `fresh`, which is of the same class and unused; with the lock held. Never raises.

        Every setting of the constructor is an attribute of the same name, in a form the constructor takes.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def _emit(self, event: Callable[..., Event], now: float, *details: object) -> None:
        """Queue an event; with the lock held. The gate delivers it."""
        listeners = events.audience(self._listeners)
        if listeners:
            events.pending.append((listeners, event(self.name, now, *details)))

    @staticmethod
    def _now() -> float:
        return gate.clock()


class GuardPolicy(PolicyBase):
    """Base of our guards: give it `kind`, `enter`, `exit`, `counters` and `gauges`.

    An instance is a decorator (`@payments`), a context manager (`async with payments:`), gives scopes for blocks
    (`payments.scope()`) and permits for calls that begin here and end there (`payments.admit()`). It may serve
    several event loops and threads at once.
    """

    __slots__ = ("_rejections",)
    kind: ClassVar[str] = "guard"

    def __init__(self, name: str, listeners: Iterable[Listener] = ()) -> None:
        super().__init__(name, listeners)
        self._rejections = 0

    def enter(self, now: float) -> Token:
        """Let the call in; see `Guard.enter`."""
        raise NotImplementedError

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """The call ended; see `Guard.exit`."""
        raise NotImplementedError

    def scope(self) -> Scope:
        """Guard one block: `async with policy.scope():` or `with policy.scope():`."""
        return Scope(Row((self,)))

    def admit(self) -> Permit:
        """Let one call in by hand, without waiting, and say later how it ended."""
        return admit((self,))

    def __enter__(self) -> None:
        scope = self.scope()
        scope.__enter__()
        push(self, frame_of_block(), scope)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        pop(self, frame_of_block()).__exit__(kind, exc, trace)

    def __aenter__(self) -> Awaitable[None]:
        return self._enter_block(frame_of_block())

    def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> Awaitable[None]:
        return pop(self, frame_of_block()).__aexit__(kind, exc, trace)

    async def _enter_block(self, frame: int) -> None:
        scope = self.scope()
        await scope.__aenter__()
        push(self, frame, scope)

    def _refused(self, error: R, now: float) -> R:
        """Count and report a refusal; the caller raises it."""
        self._rejections += 1
        self._emit(CallRejected, now, error)
        return error


class AroundPolicy(PolicyBase):
    """Base of our arounds: give it `kind`, `around`, `around_sync`, `counters` and `gauges`.

    Its methods run in the caller's task or thread without the lock; what several calls share, change under
    `self._lock`, never across an await.
    """

    __slots__ = ()
    kind: ClassVar[str] = "around"
    streams: bool = False  # True: `open_stream` serves async generators

    async def around(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run `call`; see `Around.around`."""
        raise NotImplementedError

    def around_sync(self, call: Callable[[], T]) -> T:
        """Run `call`; see `Around.around_sync`."""
        raise NotImplementedError

    async def open_stream(
        self, call: Callable[[], AsyncGenerator[T, Any]]
    ) -> tuple[AsyncGenerator[T, Any] | None, list[T]]:
        """Open the stream, where `streams` says so: it, and its first item if that was taken; or None and all items."""
        raise NotImplementedError

    def _tell(self, event: Callable[..., Event], *details: object) -> None:
        """Report an event now; without the lock."""
        if events.audience(self._listeners):
            with self._lock:
                self._emit(event, gate.clock(), *details)
            events.deliver()


def admit(guards: tuple[Guard, ...]) -> Permit:
    """A permit for one call past `guards`."""
    for guard in guards:
        if getattr(guard, "issues_deadlines", False):
            raise TypeError(f"{type(guard).__name__} can't cancel a call that is let in by hand; use scope()")
    return Permit(Row(guards))
