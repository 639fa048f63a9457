"""The load shedder: which share of the calls to refuse, and whose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import ClassVar, Self

from seawall.core import checks, events
from seawall.core.ambient import Priority, current_priority
from seawall.core.counts import RollingWindow
from seawall.core.errors import Rejected
from seawall.core.events import Event, Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token
from seawall.policies.load_shedder.signals import Signal

RECKON_EVERY = 0.1  # seconds: how often the share to refuse is reckoned and signals are sampled
SHORTEST = 0.001  # seconds: slots of a shorter window could not be numbered
STALE = 5.0  # seconds after which a sample says nothing: calls were too rare to take another
CALM = 5.0  # seconds without pressure after which shedding is over, so that its events stay rare
NOBODY = (0.0,) * len(Priority)


class LoadShedError(Rejected):
    """Too much load for now. Nobody knows until when, and a call that is tried again at once only adds to it."""

    reason = "is shedding load"
    sheds = True


@dataclass(frozen=True, slots=True)
class SheddingStarted(Event):
    """A shedder began to refuse calls. `cause` is "failures" or the class of the signal that asks for most."""

    rate: float
    cause: str


@dataclass(frozen=True, slots=True)
class SheddingStopped(Event):
    """A shedder has seen no reason to refuse calls for a while."""


@dataclass(frozen=True, slots=True)
class LoadShedderSnapshot:
    """A shedder at one moment: `rate` is the share of calls it refuses now. The others only grow."""

    successes: int
    failures: int
    neither: int
    rejections: int
    rate: float


@dataclass(frozen=True, slots=True)
class _SampleDue(Event):
    """Queued for the shedder alone, so that its signals are sampled where no lock is held."""

    errand: ClassVar[bool] = True


class LoadShedder(GuardPolicy):
    """Refuses a share of the calls while the callee fails or a signal says that this process is overloaded.

    With `ok` of `n` calls in the window gone well, the share is `(n - ok / (1 - failure_rate)) / (n + 1)`: nothing
    up to the failure rate, then as many as fail beyond it (adaptive throttling, Google's SRE book). Calls it refused
    itself are not among the `n`, so it can't lock itself shut: when the callee is well again, it is open as soon
    as the failures have left the window. Signals ask for a share too; the greatest counts, `max_rejection` at most.

    The share falls on the least important calls first: all of `priority` SHEDDABLE before any of LOW, and so on,
    by how many calls of each came in the window.

    Args:
        name: labels errors, events, metrics and logs.
        failure_rate: share of failures that is normal; None looks at signals only.
        window: seconds looked back, in twenty slots.
        minimum_calls: with fewer in the window, failures say nothing.
        max_rejection: share refused at most; the rest finds out whether things are better.
        signals: such as `CpuSignal()` and `QueueDelaySignal()`; each belongs to one shedder.
        on: exceptions that are failures; refusals by policies further in never are.
        ignore: of those, the ones that are not.
        rng: decides whom it hits; give a seeded one to repeat a run.
        listeners: called with its `CallRejected`, `SheddingStarted` and `SheddingStopped` events.

    Raises:
        LoadShedError: from a call it refuses.

    Examples:
        >>> from seawall import CpuSignal
        >>> front = LoadShedder("front", signals=[CpuSignal(cores=1)])
        >>> with front.scope():
        ...     print(front.snapshot().rate)
        0.0
    """

    kind = "load_shedder"

    def __init__(
        self,
        name: str,
        *,
        failure_rate: float | None = 0.1,
        window: float | timedelta = 60.0,
        minimum_calls: int = 10,
        max_rejection: float = 0.9,
        signals: Iterable[Signal] = (),
        on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        ignore: type[BaseException] | tuple[type[BaseException], ...] = (),
        rng: Random | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.failure_rate = None if failure_rate is None else checks.fraction("failure_rate", failure_rate, one=False)
        self.window = checks.seconds("window", window)
        if self.window < SHORTEST:
            raise ValueError(f"window must be {SHORTEST} s or more, got {window!r} s")
        self.minimum_calls = checks.count("minimum_calls", minimum_calls)
        self.max_rejection = checks.fraction("max_rejection", max_rejection)
        if not isinstance(signals, Iterable):
            raise TypeError(f"signals must be an iterable of signals, got {signals!r}")
        self.signals = tuple(signals)
        for signal in self.signals:
            if not callable(getattr(signal, "sample", None)):
                raise TypeError(f"signals must have a method sample(now), got {signal!r}")
        self.on = checks.exceptions("on", on)
        self.ignore = checks.exceptions("ignore", ignore)
        if not isinstance(rng, Random | None):
            raise TypeError(f"rng must be a random.Random, got {rng!r}")
        self.rng = Random() if rng is None else rng
        self._counts = [0, 0, *(0 for _ in Priority)]  # successes, failures, then calls that came of each priority
        self._neither = 0
        self._window = RollingWindow(self.window, slots=20, width=len(self._counts))
        self._rate = 0.0
        self._rates: Sequence[float] = NOBODY  # of each priority
        self._due = -math.inf  # when to reckon again
        self._pressures: Sequence[float] = ()  # of the signals
        self._sampled_at = -math.inf
        self._sampling = False
        self._pressed_at: float | None = None  # the last pressure, while shedding
        self._register()

    def enter(self, now: float) -> Token:
        """Let the call in, or raise `LoadShedError`."""
        if now >= self._due:
            self._reckon(now)
        level = current_priority.get()
        self._counts[2 + level] += 1
        rate = self._rates[level]
        if rate and self.rng.random() < rate:
            raise self._refused(LoadShedError(self.name), now)
        return None

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Count how the call ended."""
        if now >= self._window.turns_at:
            self._window.turn(now, self._counts)
        if exc is None:
            self._counts[0] += 1
        elif isinstance(exc, self.on) and not isinstance(exc, (Rejected, *self.ignore)):
            self._counts[1] += 1
        else:
            self._neither += 1

    def _reckon(self, now: float) -> None:
        """Find out the share to refuse, ask for new samples, and tell whether shedding began or ended."""
        if now >= self._window.turns_at:
            self._window.turn(now, self._counts)
        ok, failed, *came = self._window.since(now, self._counts)
        pressure, cause = self._failing(ok, ok + failed), "failures"
        if now - self._sampled_at <= STALE:
            for signal, asked in zip(self.signals, self._pressures, strict=False):
                if asked > pressure:
                    pressure, cause = asked, type(signal).__name__
        self._rate = min(pressure, self.max_rejection)
        self._rates = by_priority(self._rate, came) if pressure else NOBODY
        self._due = min(now + RECKON_EVERY, self._window.turns_at)
        if self.signals and not self._sampling:
            self._sampling = True
            events.pending.append(((self._sample,), _SampleDue(self.name, now)))
        self._tell_changes(now, cause)

    def _failing(self, ok: int, calls: int) -> float:
        if self.failure_rate is None or calls < self.minimum_calls:
            return 0.0
        return max(0.0, (calls - ok / (1 - self.failure_rate)) / (calls + 1))

    def _tell_changes(self, now: float, cause: str) -> None:
        if self._rate:
            if self._pressed_at is None:
                self._emit(SheddingStarted, now, self._rate, cause)
            self._pressed_at = now
        elif self._pressed_at is not None and now - self._pressed_at >= CALM:
            self._pressed_at = None
            self._emit(SheddingStopped, now)

    def _sample(self, due: Event) -> None:
        """Sample the signals; delivered like an event, so without the lock."""
        pressures: Sequence[float] = ()
        try:
            pressures = [events.ask(_pressure, signal, due.at, otherwise=0.0) for signal in self.signals]
        finally:
            with self._lock:
                self._pressures, self._sampled_at, self._sampling = pressures, due.at, False

    def _adopt(self, fresh: Self, now: float) -> None:
        """Another window looks back at nothing at first."""
        if fresh.window != self.window:
            self.window, self._window = fresh.window, fresh._window
        self.failure_rate, self.minimum_calls = fresh.failure_rate, fresh.minimum_calls
        self.max_rejection, self.on, self.ignore, self.rng = fresh.max_rejection, fresh.on, fresh.ignore, fresh.rng
        if fresh.signals != self.signals:
            self.signals, self._pressures = fresh.signals, ()
        self._due = now

    def at_rest(self, now: float) -> bool:
        """Whether a new one would do as well: no failure is in the window."""
        with self._lock:
            return not self._window.since(now, self._counts)[1]

    def snapshot(self) -> LoadShedderSnapshot:
        """Counts and the share it refuses, at one moment."""
        with self._lock:
            return LoadShedderSnapshot(
                successes=self._counts[0],
                failures=self._counts[1],
                neither=self._neither,
                rejections=self._rejections,
                rate=self._rate,
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        seen = self.snapshot()
        return {
            "success": seen.successes,
            "failure": seen.failures,
            "neither": seen.neither,
            "rejected": seen.rejections,
        }

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        return {"rejection_rate": self.snapshot().rate}


def by_priority(share: float, came: Sequence[int]) -> list[float]:
    """The share to refuse of each priority, lowest first, so that `share` of all the calls that came is refused.

    Examples:
        >>> by_priority(0.5, [10, 30, 60])
        [1.0, 1.0, 0.16666666666666666]
    """
    left = share * sum(came)
    if not left:
        return [share] * len(came)
    rates = []
    for calls in came:
        rates.append(min(1.0, max(0.0, left) / max(1, calls)))
        left -= calls
    return rates


def _pressure(signal: Signal, now: float) -> float:
    value = signal.sample(now)
    return min(1.0, value) if value > 0 else 0.0  # not a number is no pressure
