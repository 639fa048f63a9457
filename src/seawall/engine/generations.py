"""Models that come and go while calls are in flight: who still uses one, and how the calls on it ended."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, ParamSpec, TypeVar

from seawall.core import checks
from seawall.core.errors import Rejected
from seawall.core.locking import lock
from seawall.core.sleeping import Sleeper, ThreadSleeper, async_sleeper
from seawall.inference.errors import (
    BatchQueueFullError,
    GenerationCancelledError,
    InvalidInputError,
    InvalidSettingError,
    PromptError,
)

M = TypeVar("M")
P = ParamSpec("P")
_CALLERS = (
    Rejected,
    BatchQueueFullError,  # a refusal, though the inference half knows no policy
    InvalidInputError,
    PromptError,
    InvalidSettingError,
    GenerationCancelledError,
)


def blames(error: BaseException) -> bool:
    """Whether a call that ended so speaks against the model; refusals, cancellations, the caller's faults do not."""
    return isinstance(error, Exception) and not isinstance(error, _CALLERS)


def patience(timeout: float | timedelta | None) -> float:
    """Seconds that a drain may take at most; None is for ever."""
    return math.inf if timeout is None else checks.seconds("timeout", timeout, zero=True, infinite=True)


class Signal:
    """Set once, by any thread; waited for by any task or thread."""

    def __init__(self) -> None:
        self.is_set = False
        self._sleepers: list[Sleeper | ThreadSleeper] = []

    def set(self) -> None:
        """Wake all who wait."""
        with lock:
            self.is_set = True
            for sleeper in self._sleepers:
                sleeper.ring()

    async def wait(self, seconds: float = math.inf) -> bool:
        """Whether it was set within `seconds`."""
        with lock:
            if self.is_set:
                return True
            sleeper = async_sleeper()
            self._sleepers.append(sleeper)
        try:
            await sleeper.sleep(seconds)
        finally:
            sleeper.rise()
            with lock:
                self._sleepers.remove(sleeper)
        return self.is_set

    def wait_sync(self, seconds: float = math.inf) -> bool:
        """The same for a plain thread."""
        sleeper = ThreadSleeper()
        with lock:
            if self.is_set:
                return True
            self._sleepers.append(sleeper)
        try:
            sleeper.sleep_sync(seconds)
        finally:
            with lock:
                self._sleepers.remove(sleeper)
        return self.is_set


@dataclass(slots=True)
class Tally:
    """How calls ended. Only grows."""

    success: int = 0
    failure: int = 0
    neither: int = 0

    def count(self, error: BaseException | None) -> bool:
        """One more; True where it speaks against the model."""
        if error is None:
            self.success += 1
        elif blames(error):
            self.failure += 1
            return True
        else:
            self.neither += 1
        return False

    @property
    def judged(self) -> int:
        """Calls that say something about the model."""
        return self.success + self.failure

    @property
    def rate(self) -> float:
        """Share of failures; 0 before anything is known."""
        return self.failure / self.judged if self.judged else 0.0


class Generation(Generic[M]):
    """One model, from the moment it may serve until it is closed. Changed with the lock held."""

    def __init__(self, model: M, number: int) -> None:
        self.model = model
        self.number = number
        self.calls = 0  # in flight, streams included
        self.tally = Tally()
        self.before: Generation[M] | None = None  # answers in its place, while it is on probation
        self.leaving = False  # takes no new calls
        self.idle = Signal()  # leaving, and the last call has ended
        self.closed = Signal()

    def enter(self) -> None:
        """A call begins on it."""
        self.calls += 1

    def exit(self) -> None:
        """It ended."""
        self.calls -= 1
        if self.leaving and not self.calls:
            self.idle.set()

    def leave(self) -> None:
        """Take no new calls."""
        self.leaving = True
        if not self.calls:
            self.idle.set()

    def stay(self) -> None:
        """Take new calls again."""
        self.leaving = False
        self.idle = Signal()


def start(name: str, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> threading.Thread:
    """Run `work` in a thread of its own."""
    thread = threading.Thread(target=work, args=args, kwargs=kwargs, name=f"seawall {name}"[:200], daemon=True)
    thread.start()
    return thread
