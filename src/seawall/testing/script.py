"""Functions that do what a list says: doubles for what policies guard."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeAlias, TypeVar

from seawall.core import checks, gate
from seawall.core.sleeping import pause

T = TypeVar("T")


class ScriptRanOut(BaseException):
    """A script was called once more than it has outcomes.

    No `Exception`, so that no policy and no handler of the code under test takes it for a failure of what the
    script stands for.
    """


@dataclass(frozen=True, slots=True)
class After(Generic[T]):
    """An outcome that takes time; made by `after`."""

    seconds: float
    outcome: T | BaseException | type[BaseException]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a script: its arguments, and when it came on the gate's clock."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    at: float


Outcome: TypeAlias = T | BaseException | type[BaseException] | After[T]
_NOTHING: Any = object()


def after(seconds: float | timedelta, outcome: T | BaseException | type[BaseException]) -> After[T]:
    """`outcome`, but only when `seconds` have passed."""
    return After(checks.seconds("seconds", seconds, zero=True), outcome)


class _Scripted(Generic[T]):
    def __init__(self, *outcomes: Outcome[T], then: Outcome[T] = _NOTHING) -> None:
        self._outcomes = deque(outcomes)
        self._then = then
        self._lock = threading.Lock()
        self.calls: list[Call] = []
        self.running = 0
        self.most_running = 0

    @property
    def left(self) -> int:
        """Outcomes that no call has had yet."""
        return len(self._outcomes)

    @contextmanager
    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[After[T]]:
        with self._lock:
            self.calls.append(Call(args, kwargs, gate.now()))
            outcome = self._outcomes.popleft() if self._outcomes else self._then
            if outcome is _NOTHING:
                calls = len(self.calls)
                raise ScriptRanOut(
                    f"call {calls} of a script of {calls - 1} outcomes, with {_shown(args, kwargs)}; "
                    "give it one more, or say what comes `then`"
                )
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            yield outcome if isinstance(outcome, After) else After(0.0, outcome)
        finally:
            with self._lock:
                self.running -= 1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} called {len(self.calls)} times, {self.left} outcomes left>"


class Script(_Scripted[T]):
    """A plain function that does what a list says: returns values, raises exceptions, takes its time.

    Each call has the next outcome: an exception, or a class of them, is raised; `after(seconds, outcome)` lets time
    pass first (on a `VirtualClock` it takes none); all else is returned. Safe to call from several threads.

    Args:
        outcomes: one for each call, in order.
        then: for all calls after those; without it they raise `ScriptRanOut`.

    Attributes:
        calls: every call so far: `args`, `kwargs` and `at`.
        left: outcomes that no call has had yet.
        running: calls in flight; `most_running` is the most there ever were at once.

    Examples:
        >>> from seawall import CircuitBreaker
        >>> backend = Script(ConnectionError("down"), then="up")
        >>> fetch = CircuitBreaker("bank", consecutive_failures=2)(backend)
        >>> try: fetch("/balance")
        ... except ConnectionError as error: print(error)
        down
        >>> fetch("/balance"), len(backend.calls), backend.calls[0].args
        ('up', 2, ('/balance',))
    """

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        """The next outcome."""
        with self._called(args, kwargs) as outcome:
            if outcome.seconds and not gate.pause_sync(outcome.seconds):
                raise RuntimeError("a Script can't let time pass on a thread that runs an event loop; use AsyncScript")
            return _end(outcome)


class AsyncScript(_Scripted[T]):
    """`Script` as a coroutine function.

    Examples:
        >>> from seawall import Timeout
        >>> from seawall.testing import run
        >>> backend = AsyncScript(after(60, "late"))
        >>> async def main() -> str:
        ...     try: return await Timeout("bank", 2.0)(backend)()
        ...     except TimeoutError: return f"gave up, {backend.running} running"
        >>> run(main())
        'gave up, 0 running'
    """

    async def __call__(self, *args: Any, **kwargs: Any) -> T:
        """The next outcome."""
        with self._called(args, kwargs) as outcome:
            if outcome.seconds:
                await pause(outcome.seconds)
            return _end(outcome)


def _end(after: After[T]) -> T:
    outcome = after.outcome
    if isinstance(outcome, BaseException):
        raise outcome.with_traceback(None)  # one that is raised again and again would keep every traceback
    if isinstance(outcome, type) and issubclass(outcome, BaseException):
        raise outcome
    return outcome  # type: ignore[return-value]  # a class that is returned is no exception


def _shown(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return f"({', '.join([*map(repr, args), *(f'{name}={value!r}' for name, value in kwargs.items())])})"
