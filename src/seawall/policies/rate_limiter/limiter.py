"""Rate limiter: so many calls per period, evenly with a burst (GCRA) or counted in windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, overload

from seawall.core import ambient, checks, events
from seawall.core.costing import AtCost, Cost, CostPerCall, costing
from seawall.core.errors import Rejected
from seawall.core.events import Event, Listener
from seawall.core.gate import Row
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token
from seawall.policies.rate_limiter._line import Line, RateLimitedError, Waiting
from seawall.policies.rate_limiter._meters import Algorithm, metered
from seawall.policies.rate_limiter.reservation import Reservation, Reserving

LONGEST = 1e9  # seconds, 30 years: beyond, a float does not tell one call's turn from the next one's
DrainOn = Callable[[object], "bool | float | timedelta | None"]


@dataclass(frozen=True, slots=True)
class LimiterDrained(Event):
    """The callee said that it had enough: no call starts for `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class LimiterSnapshot:
    """A limiter at one moment: `available` calls could start now. Counters only grow."""

    available: int
    waiting: int
    admitted: int
    rejections: int


class _Judged:
    """The token of a call whose outcome `drain_on` looks at, and what it said."""

    __slots__ = ("said",)

    def __init__(self) -> None:
        self.said: bool | float = False


class _Queued(Waiting):
    """A place in the limiter's line; of a call, or of a reservation."""

    def __init__(
        self, limiter: RateLimiter, line: Line, cost: int, since: float, deadline: float, *, reserving: bool
    ) -> None:
        super().__init__(line, cost, since, deadline)
        self.limiter = limiter
        self.reserving = reserving

    def let_in(self, now: float) -> Token:
        return self.limiter._take(now, self.cost, self.reserving)

    def refuse(self, now: float) -> Rejected:
        return self.limiter._refused(RateLimitedError.of(self.limiter, self.seconds(now)), now)


class RateLimiter(GuardPolicy):
    """Lets `rate` calls start per `per` seconds, and up to `burst` of them at once after a pause.

    `gcra`, the generic cell rate algorithm (ITU-T I.371), lets a call start every `per / rate` seconds and may
    run a burst early; it is two floats, however high the rate. `sliding_window` never admits more than `rate` in any
    `per` seconds, wherever one looks; `fixed_window` counts in windows that follow one another, as many callees do,
    so around their edge twice the rate may pass. `retry_after` is exact with all three. Callers may wait up to
    `max_wait` seconds, in order; one that could not be served in time, or before its deadline, is refused at once, and
    one that is cancelled moves everybody behind it up.

    Args:
        name: labels errors, metrics and logs.
        rate: calls per period, or what they cost; may be a fraction with `gcra`.
        per: seconds of the period.
        burst: what may start together after a pause, and so the most a call may cost; the rate, rounded down,
            unless told. For `gcra` only: a window lets `rate` start together.
        algorithm: `gcra`, `sliding_window` or `fixed_window`.
        max_wait: seconds a call may wait for its turn; 0 refuses at once.
        drain_on: asked about each result, or `Exception`, of a call: whether the callee said "too many". True empties
            the limiter; a number of seconds (its Retry-After) lets the next call start then, 0 at once; None and
            False say that it did not.
        max_block: the most seconds that `drain_on` may ask for.
        listeners: called with its `CallRejected` and `LimiterDrained` events.

    Raises:
        RateLimitedError: from a guarded call over the rate.

    Examples:
        >>> search = RateLimiter("search", rate=10, burst=2)
        >>> search.snapshot().available
        2
    """

    __slots__ = (
        "_admitted",
        "_line",
        "_meter",
        "algorithm",
        "burst",
        "drain_on",
        "judges",
        "max_block",
        "max_wait",
        "per",
        "rate",
    )
    kind = "limiter"

    def __init__(
        self,
        name: str,
        *,
        rate: float,
        per: float | timedelta = 1.0,
        burst: float | None = None,
        algorithm: Algorithm = "gcra",
        max_wait: float | timedelta = 0.0,
        drain_on: DrainOn | None = None,
        max_block: float | timedelta = 60.0,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.rate = checks.positive("rate", rate)
        self.per = checks.seconds("per", per)
        self.burst = None if burst is None else checks.positive("burst", burst)
        self.algorithm = algorithm
        self.max_wait = checks.seconds("max_wait", max_wait, zero=True, infinite=True)
        if drain_on is not None and not callable(drain_on):
            raise TypeError(f"drain_on must be a function of a result or an exception, got {drain_on!r}")
        self.drain_on = drain_on
        self.max_block = checks.seconds("max_block", max_block)
        if self.max_block > LONGEST:
            raise ValueError(f"max_block must be at most 1e9 s (30 years), got {max_block!r} s")
        self.judges = drain_on is not None
        self._meter = metered(algorithm, self.rate, self.per, self.burst)
        self._meter.bar(int(self.judges))  # its tokens are made in `_take`
        self._line = Line(self._meter)
        self._admitted = 0
        self._register()

    def enter(self, now: float) -> Token:
        """Take a turn, or queue for one, or raise `RateLimitedError`."""
        meter = self._meter
        arrival = meter.arrival
        if arrival - now <= meter.early:  # `Gcra.opens` and `add` without the calls
            meter.arrival = (arrival if arrival > now else now) + meter.interval
            self._admitted += 1
            return None
        return self._ask(now, 1)

    def enter_at(self, now: float, cost: int) -> Token:
        """`enter` for a call that costs `cost`."""
        return self._ask(now, cost)

    def _ask(self, now: float, cost: int, *, reserving: bool = False) -> Token:
        meter, line = self._meter, self._line
        if cost > meter.capacity:
            raise ValueError(self._too_dear(cost))  # the limit went down after `check_cost`
        seconds = line.starts(now, cost) - now
        if seconds <= meter.tolerance and not line.waiting:
            return self._take(now, cost, reserving)
        if seconds - self.max_wait > meter.tolerance:
            raise self._refused(RateLimitedError.of(self, seconds), now)
        deadline = ambient.deadline.get()
        if seconds - (deadline - now) > meter.tolerance:
            raise self._refused(RateLimitedError.of(self, seconds), now)
        raise line.join(_Queued(self, line, cost, now, deadline, reserving=reserving), now, self.max_wait)

    def _take(self, now: float, cost: int, reserving: bool) -> Token:
        self._meter.add(now, cost)
        self._admitted += 1
        if reserving:
            self._meter.hold(cost)
            return Reservation(self, cost, now)
        return _Judged() if self.judges else None

    def judge(self, token: Token, result: object, exc: BaseException | None) -> None:
        """Ask `drain_on` what the outcome says."""
        if self.drain_on is not None and (exc is None or isinstance(exc, Exception)):
            outcome = result if exc is None else exc
            said: bool | float | timedelta | None = events.ask(self.drain_on, outcome, otherwise=None)
            token.said = _seconds(said, self.max_block)  # type: ignore[attr-defined]

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """A call that started has used its turn, however it ended; one that met "too many" drains the limiter."""
        if token and (said := token.said) is not False:  # type: ignore[attr-defined]
            self._drain(None if said is True else said, now)

    def drain(self, seconds: float | timedelta | None = None) -> None:
        """The callee had enough, as somebody found out elsewhere: nothing is left, or nothing for so many seconds."""
        if seconds is not None:
            seconds = min(checks.seconds("seconds", seconds, zero=True), LONGEST)
        with self._lock:
            self._drain(seconds, self._now())
        events.deliver()

    def _drain(self, seconds: float | None, now: float) -> None:
        self._meter.drain(now, seconds)
        self._line.replan(now)
        self._emit(LimiterDrained, now, self._meter.opens(now, 1) - now)

    @overload
    def costing(self, cost: int) -> AtCost: ...
    @overload
    def costing(self, cost: Callable[..., int]) -> CostPerCall: ...
    def costing(self, cost: Cost) -> AtCost | CostPerCall:
        """This limiter for calls that cost `cost` each: a number, or a function of their arguments.

        Examples:
            >>> tokens = RateLimiter("tokens", rate=90_000, per=60)
            >>> @tokens.costing(lambda prompt: len(prompt) // 4 + 500)
            ... def answer(prompt: str) -> str: ...
        """
        return costing(self, cost)

    def check_cost(self, cost: int) -> int:
        """`cost`, or ValueError if no call could ever pay it."""
        if cost > self._meter.capacity:
            raise ValueError(self._too_dear(cost))
        return cost

    def _too_dear(self, cost: int) -> str:
        most = "burst" if self.algorithm == "gcra" else "rate"
        return (
            f"cost must be at most the {most} of {self.name!r}, {self._meter.capacity:g}, "
            f"or the call could never start; got {cost!r}"
        )

    def reserve(self, cost: int = 1) -> Reservation:
        """Take a turn now and say later what became of it. It waits as a plain function would.

        Raises:
            RateLimitedError: there is none, or it could not come in time.

        Examples:
            >>> tokens = RateLimiter("tokens", rate=1000, per=3600)
            >>> reservation = tokens.reserve(800)
            >>> reservation.settle(150)
            >>> tokens.snapshot().available
            850
        """
        tokens: list[Token] = []
        Row((Reserving(self, cost),)).enter_sync(tokens)
        (token,) = tokens
        assert isinstance(token, Reservation)
        return token

    async def reserve_async(self, cost: int = 1) -> Reservation:
        """The same, waiting as a coroutine function would."""
        tokens: list[Token] = []
        await Row((Reserving(self, cost),)).enter(tokens)
        (token,) = tokens
        assert isinstance(token, Reservation)
        return token

    def _settle(self, at: float, cost: int, actual: int) -> None:
        now = self._now()
        self._meter.settle(at, now, cost, actual)
        if actual != cost:
            self._line.changed(now)

    def _check_change(self, fresh: Self) -> None:
        if fresh.algorithm != self.algorithm or fresh.judges != self.judges:
            what = "its algorithm" if fresh.algorithm != self.algorithm else "whether it has a drain_on"
            raise ValueError(f"{self!r} can't change {what} under way: make a new one")

    def _adopt(self, fresh: Self, now: float) -> None:
        self._meter.adopt(fresh._meter, now)
        self.rate, self.per, self.burst = fresh.rate, fresh.per, fresh.burst
        self.max_wait, self.drain_on, self.max_block = fresh.max_wait, fresh.drain_on, fresh.max_block
        self._line.allow(self.max_wait, now)

    def at_rest(self, now: float) -> bool:
        """Whether it knows nothing that a new one would not: every turn is free and nobody waits."""
        return not self._line.waiting and self._meter.left(now) >= self._meter.capacity

    def snapshot(self) -> LimiterSnapshot:
        """Turns and queue at one moment."""
        with self._lock:
            left = math.floor(self._meter.left(self._now()) + 1e-9)
            return LimiterSnapshot(
                available=0 if self._line.waiting else max(0, left),
                waiting=len(self._line.waiting),
                admitted=self._admitted,
                rejections=self._rejections,
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {"admitted": snapshot.admitted, "rejected": snapshot.rejections}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        return {"available": snapshot.available, "waiting": snapshot.waiting}


def _seconds(said: object, most: float) -> bool | float:
    """What a `drain_on` said: False, True, or for how many seconds."""
    if isinstance(said, timedelta):
        said = said.total_seconds()
    if isinstance(said, bool) or not isinstance(said, (int, float)):
        return bool(said)
    said = max(min(said, most), 0.0)  # NaN stays NaN; and before float(): a whole number may be too big for it
    return True if math.isnan(said) else float(said)
