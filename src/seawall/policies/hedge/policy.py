"""The hedge itself: its settings, what it counts, and what it tells."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, TypeVar

from seawall.core import checks, gate
from seawall.core.events import Event, Listener, ask
from seawall.core.policy import AroundPolicy
from seawall.policies.hedge.quantile import Delay, Quantile
from seawall.policies.hedge.race import Attempt, Budget, Race

T = TypeVar("T")
_MOST = 10  # attempts; more at once are an attack on the callee


@dataclass(frozen=True, slots=True)
class HedgeStarted(Event):
    """A call got another attempt, `after` seconds from its start: for the delay, or because one failed with `error`."""

    attempt: int
    after: float
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class HedgeWon(Event):
    """A call that had several attempts was answered by number `attempt`, `after` seconds from its start."""

    attempt: int
    after: float


@dataclass(frozen=True, slots=True)
class HedgeLost(Event):
    """An attempt ended when its call was decided already, `after` seconds from its own start. No error: it answered."""

    attempt: int
    after: float
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class HedgeSnapshot:
    """A hedge at one moment: its `delay`, and attempts that lost but have not ended. Counters only grow."""

    delay: float
    losing: int
    first_won: int
    extra_won: int
    failures: int
    cancelled: int
    extras: int
    suppressed: int


class Hedge(AroundPolicy):
    """Makes a call again while it runs, when it takes long or fails, and answers with whichever attempt is good first.

    For calls that are safe to make twice. Each attempt is a task of its own, in a copy of the caller's context; what
    the winner changed there, the caller keeps. The answer returns at once: losers are cancelled, and one that takes
    its time to end does so in the background. If all fail, the caller gets what the first one raised or returned. A
    caller that is cancelled cancels its attempts and waits for their end.

    Args:
        name: labels events, metrics and logs.
        delay: seconds after which another attempt starts, or a `Quantile` of the latencies; 0 starts them all at
            once, infinity only when one has failed.
        attempts: how many a call may have, the first included.
        on: exceptions after which the next attempt starts at once, and which are no answer while another attempt may
            give one. Others are the call's answer, as is a cancellation.
        acceptable: says of a result whether it is good; all are, unless told. Others are treated like `on`.
        budget: a `RetryBudget`, usually shared, that extra attempts must be allowed by.
        listeners: called with its `HedgeStarted`, `HedgeWon` and `HedgeLost` events.

    Raises:
        TypeError: when it decorates a plain function or generator: only an event loop can run two attempts at once
            and cancel one.

    Examples:
        >>> Hedge("search", delay=Quantile(0.95, initial=0.2)).current_delay
        0.2
    """

    kind = "hedge"
    needs_event_loop = True

    def __init__(
        self,
        name: str,
        *,
        delay: float | timedelta | Quantile,
        attempts: int = 2,
        on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        acceptable: Callable[..., bool] | None = None,
        budget: Budget | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.delay: float | Quantile = delay if isinstance(delay, Quantile) else _seconds(delay)
        self.attempts = checks.count("attempts", attempts)
        if self.attempts > _MOST:
            raise ValueError(f"attempts must be {_MOST} or fewer, got {attempts!r}")
        self.on = checks.exceptions("on", on)
        self.acceptable = None if acceptable is None else checks.function("acceptable", acceptable, of="the result")
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"budget must be a RetryBudget or do what one does, got {budget!r}")
        self.budget = budget
        self._set_delay()
        self._first_won = 0
        self._extra_won = 0
        self._failures = 0
        self._cancelled = 0
        self._extras = 0
        self._suppressed = 0
        self._losing = 0
        self._register()

    def _set_delay(self) -> None:
        self._adaptive = Delay(self.delay) if isinstance(self.delay, Quantile) else None
        self._fixed = 0.0 if isinstance(self.delay, Quantile) else self.delay

    @property
    def current_delay(self) -> float:
        """Seconds after which the next call's extra attempt starts."""
        return self._fixed if self._adaptive is None else self._adaptive.seconds

    async def around(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run `call`, and again while it runs, until an attempt is good."""
        race = Race(self, call)
        if race.budget is not None:
            race.budget.call_began(race.began)
        try:
            await race.run()
        except BaseException as exc:
            with self._lock:
                self._cancelled += 1
                self._learn(race)
            await race.call_off(wait=not isinstance(exc, GeneratorExit))
            raise
        finally:
            if race.budget is not None:
                race.budget.call_ended()
        self._count(race)
        return race.decide()

    def _count(self, race: Race[T]) -> None:
        with self._lock:
            if not race.winner or race.error is not None:
                self._failures += 1
            elif race.winner == 1:
                self._first_won += 1
            else:
                self._extra_won += 1
            self._losing += len(race.running)
            self._learn(race)
        if race.attempts > 1 and race.winner and race.error is None:
            self._tell(HedgeWon, race.winner, gate.clock() - race.began)

    def _learn(self, race: Race[T]) -> None:
        """What the first attempt says about latency: it was good after so long, or was not in so long."""
        if self._adaptive is None:
            return
        if race.latency is not None:
            self._adaptive.saw(race.latency, ended=True)
        elif any(attempt.number == 1 for attempt in race.running):
            self._adaptive.saw(gate.clock() - race.began, ended=False)

    def _accepts(self, result: object) -> bool:
        """Whether a result is good."""
        acceptable = self.acceptable
        return acceptable is None or ask(lambda: bool(acceptable(result)), otherwise=True)

    def _tell_started(self, race: Race[T], now: float, error: BaseException | None) -> None:
        """A call got one more attempt."""
        with self._lock:
            self._extras += 1
        self._tell(HedgeStarted, race.attempts, now - race.began, error)

    def _tell_lost(self, attempt: Attempt[T], exc: BaseException | None) -> None:
        """An attempt ended that nobody waited for any longer."""
        if attempt.race.over:
            with self._lock:
                self._losing -= 1
        self._tell(HedgeLost, attempt.number, gate.clock() - attempt.began, exc)

    def _count_suppressed(self) -> None:
        """The budget did not allow an attempt."""
        with self._lock:
            self._suppressed += 1

    def _adopt(self, fresh: Self, now: float) -> None:
        anew = fresh.delay != self.delay
        self.delay, self.attempts, self.on = fresh.delay, fresh.attempts, fresh.on
        self.acceptable, self.budget = fresh.acceptable, fresh.budget
        if anew:
            self._set_delay()

    def snapshot(self) -> HedgeSnapshot:
        """Its delay and counters at one moment."""
        with self._lock:
            return HedgeSnapshot(
                delay=self.current_delay,
                losing=self._losing,
                first_won=self._first_won,
                extra_won=self._extra_won,
                failures=self._failures,
                cancelled=self._cancelled,
                extras=self._extras,
                suppressed=self._suppressed,
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters: each call is in one of the first four."""
        snapshot = self.snapshot()
        return {
            "first_won": snapshot.first_won,
            "extra_won": snapshot.extra_won,
            "failed": snapshot.failures,
            "cancelled": snapshot.cancelled,
            "extra": snapshot.extras,
            "suppressed": snapshot.suppressed,
        }

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        return {"delay": snapshot.delay, "losing": snapshot.losing}


def _seconds(delay: float | timedelta) -> float:
    return checks.seconds("delay", delay, zero=True, infinite=True)
