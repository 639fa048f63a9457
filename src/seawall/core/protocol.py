"""What a policy is: a guard or an around. Everything else in seawall is built from these two shapes."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import asyncio

    from seawall.core.ambient import Limit

T = TypeVar("T")
E = TypeVar("E", bound="Callable[[Any, float], object]")
Token = object


@runtime_checkable
class Guard(Protocol):
    """Decides whether a call may start, and hears how it ended.

    A guard is pure and synchronous and is *told* the time (seconds of one monotonic clock), so it can be
    tested with plain numbers. Both methods run with the gate's lock held: they must not block, wait, or
    run code of the user's. All the state of one call is its token.

    Examples:
        >>> class Draining:
        ...     open = False
        ...     def enter(self, now):
        ...         if self.open:
        ...             raise Rejected("drain", retry_after=5.0)
        ...     def exit(self, token, now, exc): ...
        >>> isinstance(Draining(), Guard)
        True
    """

    def enter(self, now: float) -> Token:
        """Let the call in and return what `exit` needs to know; raise `Rejected`, or `Wait` for "not yet"."""

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """The call ended with `exc`, or well with None. May raise to replace the outcome."""


def returns_now(enter: E) -> E:
    """Marks an `enter` that lets every call in and returns `now`, so that compiled frames do without calling it.

    That holds for a guard as long as it does not judge.
    """
    enter.returns_now = True  # type: ignore[attr-defined]
    return enter


@runtime_checkable
class Judge(Protocol):
    """A guard that runs code of the user's on how a call ended, such as a predicate on its result.

    The gate calls `judge` before it takes the lock for `exit`, and only where the class or the instance says
    `judges = True` when it decorates. What it finds goes into the token.
    """

    judges: bool

    def judge(self, token: Token, result: object, exc: BaseException | None) -> None:
        """The call ended with `exc`, or returned `result`. Must not raise; `verdict` runs a predicate that may."""


@runtime_checkable
class Around(Protocol):
    """Owns the call: may run it never, once or many times (retry, hedge, fallback, cache)."""

    def around(self, call: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        """Run `call` as often as the policy wants and return the result to use."""

    def around_sync(self, call: Callable[[], T]) -> T:
        """The same for plain functions."""


@runtime_checkable
class Rescuer(Protocol):
    """An around that only acts when a call failed, so that its frame can run the call without it.

    While `rescues` is true a call that returns needs nothing but to be counted in `passed`, and one that raised an
    exception goes on in `rescue`; while it is false, `around` runs the call. `passed` is counted without the lock: no
    thread switch comes within `+= 1` where there is a GIL, and without one a count may be lost, never more.
    """

    passed: int

    @property
    def rescues(self) -> bool:
        """Whether nothing matters but an exception."""

    def rescue(self, exc: Exception, call: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        """The call failed with `exc`: what it returns in the end, or raises, `exc` as it was if nothing helps."""


@runtime_checkable
class Answering(Protocol):
    """An around per call that may have the answer at once."""

    def answer_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
        """True and the answer, or False and the around of the call with these arguments."""


@runtime_checkable
class GuardPerCall(Protocol):
    """Chooses the guard of one call by its arguments, without the lock: a tenant's limiter, a call's weight."""

    def guard_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Guard:
        """The guard of the call with these arguments. What it raises, the caller gets."""


@runtime_checkable
class AroundPerCall(Protocol):
    """Chooses the around of one call by its arguments: a cache needs its key."""

    def around_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Around:
        """The around of the call with these arguments. What it raises, the caller gets."""


class Awake:
    """The sleeper of a call that has not lain down yet, or never will."""

    def ring(self) -> bool:
        """It is awake."""
        return True


AWAKE = Awake()


class Wait(Exception):
    """Raised by `Guard.enter` to say "not yet": the gate sleeps, then asks again with `resume`.

    It sleeps until the clock shows `until`, or until the guard calls `wake`, whichever comes first; it never
    holds the lock while it sleeps. A guard that sets `granted` and `token` before it wakes the sleeper has let the
    call in, and `resume` is not asked. `after` says that `until` is so many seconds from now, the same for many
    waits: they share one timer. What a waiting call does to others it does in `begin`, which is not called for a
    caller that can't sleep and so is refused. Subclass it with what the waiting call needs. All methods run with the
    gate's lock held, like those of a guard.
    """

    __slots__ = ("after", "granted", "sleeper", "token", "until", "woken")
    begin: Callable[[], object] | None = None

    def __init__(self, until: float = math.inf, after: float | None = None) -> None:
        self.until = until
        self.after = after
        self.granted = False
        self.token: Token = None
        self.woken = False  # maybe before it had a sleeper, by a finaliser
        self.sleeper: Any = AWAKE  # set by the gate before it lets go of the lock

    def wake(self) -> bool:
        """Wake the sleeper; False if it can't be (its event loop is gone), so that somebody else is chosen."""
        self.woken = True
        return bool(self.sleeper.ring())

    def resume(self, now: float) -> Token:
        """Awake: return the token, raise `Rejected`, or raise this same wait again to go on sleeping."""
        raise NotImplementedError

    def abandon(self, now: float) -> None:
        """The call will not come (cancelled while it waited): give back whatever it was promised or granted."""
        raise NotImplementedError

    def refuse(self, now: float) -> Exception:
        """The error for a caller that can't sleep, asked for after `abandon`."""
        raise NotImplementedError


class Expiry:
    """The token of a call that must be over in `after` seconds; `expired` says the gate cancelled it for that.

    A guard whose tokens these are has the class attribute `issues_deadlines = True`.
    """

    __slots__ = ("after", "cancelling", "expired", "queue", "task")
    until: float | None = None

    def __init__(self, after: float) -> None:
        self.after = after
        self.expired = False
        self.task: asyncio.Task[object] | None = None  # set while armed, and so are those below
        self.cancelling: int  # cancellations the task had before, which are not ours to take back
        self.queue: dict[Any, float]

    def left(self, now: float) -> float:
        """Seconds the call may take from `now` on."""
        return self.after

    def expire(self) -> None:
        """Time is up: cancel the call."""
        if self.task is not None:
            self.expired = True
            self.task.cancel()


class SharedExpiry(Expiry):
    """One that everything the call does sees: until a time on the gate's clock, also over the steps of a stream."""

    __slots__ = ("limit", "until")

    def __init__(self, after: float, until: float) -> None:
        super().__init__(after)
        self.until: float = until
        self.limit: Limit | None = None  # while it is seen

    def left(self, now: float) -> float:
        """Seconds the call may take from `now` on."""
        return max(0.0, self.until - now)
