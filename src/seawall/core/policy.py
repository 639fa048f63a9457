"""What every policy of ours can do beyond its rules: decorate, guard blocks, be listened to, be found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import ClassVar, ParamSpec, TypeVar

from seawall.core import checks, events, gate, registry
from seawall.core.decorate import decorate
from seawall.core.errors import Rejected
from seawall.core.events import CallRejected, Event, Listener
from seawall.core.gate import Row
from seawall.core.protocol import Guard, Token
from seawall.core.scope import Permit, Scope, pop, push

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Rejected)


class GuardPolicy:
    """Base of our guards: give it `kind`, `enter`, `exit`, `counters` and `gauges`.

    An instance is a decorator (`@payments`), a context manager (`async with payments:`), gives scopes for blocks
    (`payments.scope()`) and permits for calls that begin here and end there (`payments.admit()`). It may serve
    several event loops and threads at once.
    """

    kind: ClassVar[str] = "guard"
    needs_event_loop: ClassVar[bool] = False
    _lock = gate.lock

    def __init__(self, name: str, listeners: Iterable[Listener] = ()) -> None:
        self.name = checks.name(type(self).__name__, name)
        self._listeners = tuple(listeners)
        self._rejections = 0

    def _register(self) -> None:
        """Last step of construction: one that failed must not be found."""
        registry.register(self)

    def enter(self, now: float) -> Token:
        """Let the call in; see `Guard.enter`."""
        raise NotImplementedError

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """The call ended; see `Guard.exit`."""
        raise NotImplementedError

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        raise NotImplementedError

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        raise NotImplementedError

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """`fn` behind this policy."""
        return decorate(fn, (self,))

    def listen(self, listener: Listener) -> None:
        """Hear this policy's events; see `seawall.listen`."""
        self._listeners = (*self._listeners, listener)

    def scope(self) -> Scope:
        """Guard one block: `async with policy.scope():` or `with policy.scope():`."""
        return Scope(Row((self,)))

    def admit(self) -> Permit:
        """Let one call in by hand, without waiting, and say later how it ended."""
        return admit((self,))

    def __enter__(self) -> None:
        scope = self.scope()
        scope.__enter__()
        push(self, scope)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        pop(self).__exit__(kind, exc, trace)

    async def __aenter__(self) -> None:
        scope = self.scope()
        await scope.__aenter__()
        push(self, scope)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await pop(self).__aexit__(kind, exc, trace)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def _emit(self, event: Callable[..., Event], now: float, *details: object) -> None:
        listeners = events.audience(self._listeners)
        if listeners:
            events.pending.append((listeners, event(self.name, now, *details)))

    def _refused(self, error: R, now: float) -> R:
        """Count and report a refusal; the caller raises it."""
        self._rejections += 1
        self._emit(CallRejected, now, error)
        return error

    @staticmethod
    def _now() -> float:
        return gate.clock()


def admit(guards: tuple[Guard, ...]) -> Permit:
    """A permit for one call past `guards`."""
    for guard in guards:
        if getattr(guard, "needs_event_loop", False):
            raise TypeError(f"{type(guard).__name__} can't cancel a call that is let in by hand; use scope()")
    return Permit(Row(guards))
