"""The adaptive bulkhead: places whose number follows from how long calls take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Literal, Self, TypeAlias

from seawall.core import checks
from seawall.core.ambient import current_priority
from seawall.core.events import Event, Listener
from seawall.core.places import Places
from seawall.core.protocol import Token
from seawall.policies.adaptive_bulkhead.limits import MOST, AIMDLimit, GradientLimit, Limit, VegasLimit

Algorithm: TypeAlias = Literal["gradient", "vegas", "aimd"] | Callable[[int, int, int], Limit]
ALGORITHMS: Mapping[str, Callable[[int, int, int], Limit]] = {
    "gradient": GradientLimit,
    "vegas": VegasLimit,
    "aimd": AIMDLimit,
}


@dataclass(frozen=True, slots=True)
class LimitChanged(Event):
    """An adaptive bulkhead found another limit."""

    before: int
    after: int


@dataclass(frozen=True, slots=True)
class AdaptiveBulkheadSnapshot:
    """An adaptive bulkhead at one moment. Counters only grow; `dropped` calls are among the `finished`."""

    active: int
    waiting: int
    limit: int
    finished: int
    dropped: int
    rejections: int


class AdaptiveBulkhead(Places):
    """Lets as many calls run at once as the callee serves without queueing, and finds out by itself how many that is.

    It watches how long calls take: while they are as fast as with fewer beside them there is room for more, and
    when they slow down they stand in somebody's queue. Calls beyond the limit wait here instead, where they can be
    told apart: the queue grows with the limit, newcomers are refused with growing probability as it does, and those
    of low `priority` first, because for each call only those count that would be served before it.

    A success tells its latency. A timeout is a drop, and tells that there is too much. Cancelled, refused and
    otherwise failed calls tell nothing: how fast a callee says no is no measure of its load. So put the `Timeout`
    inside; one outside cancels the call, and a cancelled call tells nothing.

    Args:
        name: labels errors, events, metrics and logs.
        algorithm: `"gradient"`, `"vegas"`, `"aimd"`, or a function that makes a `Limit` from the next three
            settings, such as `functools.partial(AIMDLimit, max_latency=0.5)`.
        initial_limit: where the limit starts.
        min_limit: never below.
        max_limit: never above.
        ramp_start: multiple of the limit; with fewer calls waiting, none is refused.
        ramp_end: multiple of the limit; with more waiting, all are. 0 (and `ramp_start` 0) queues none.
        max_wait: seconds a call waits at most; `math.inf` for ever. Never past the caller's deadline.
        aging: seconds of waiting that are worth one level of priority.
        drops: exceptions that mean overload, like a timeout; add your client's "503" and "429".
        rng: decides who is refused on the ramp; give a seeded one to repeat a run.
        listeners: called with its `CallRejected` and `LimitChanged` events.

    Raises:
        BulkheadFullError: from a guarded call that finds no place. A plain function on a thread that runs an
            event loop never waits (it would block the loop): it is refused at once.

    Examples:
        >>> database = AdaptiveBulkhead("database", initial_limit=10)
        >>> with database.scope():
        ...     print(database.snapshot().active, database.snapshot().limit)
        1 7
    """

    kind = "adaptive_bulkhead"

    def __init__(
        self,
        name: str,
        *,
        algorithm: Algorithm = "gradient",
        initial_limit: int = 20,
        min_limit: int = 1,
        max_limit: int = 1000,
        ramp_start: float = 2.0,
        ramp_end: float = 3.0,
        max_wait: float | timedelta = 1.0,
        aging: float | timedelta = 1.0,
        drops: type[BaseException] | tuple[type[BaseException], ...] = TimeoutError,
        rng: Random | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        self._estimator = _estimator(algorithm, initial_limit, min_limit, max_limit)
        self.ramp_start, self.ramp_end = _ramp(ramp_start, ramp_end)
        super().__init__(
            name,
            listeners,
            limit=self._estimator.limit,
            max_queued=int(self._estimator.limit * self.ramp_end),
            max_wait=checks.seconds("max_wait", max_wait, zero=True, infinite=True),
            aging=checks.seconds("aging", aging, zero=True, infinite=True),
        )
        self.algorithm = algorithm
        self.initial_limit, self.min_limit, self.max_limit = initial_limit, min_limit, max_limit
        self.drops = checks.exceptions("drops", drops)
        if not isinstance(rng, Random | None):
            raise TypeError(f"rng must be a random.Random, got {rng!r}")
        self.rng = Random() if rng is None else rng
        self._dropped = 0
        self._register()

    def enter(self, now: float) -> Token:
        """Take a place, or queue for one, or raise `BulkheadFullError`."""
        active = self._active
        if active < self._open:
            self._active = active = active + 1
            return now, active, 1
        return self._queue(now, 1)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Tell the algorithm what the call says about the callee, and hand its place over."""
        began: float
        inflight: int
        cost: int
        began, inflight, cost = token  # type: ignore[misc]
        self._finished += 1
        self._active -= cost
        try:
            if exc is None:
                self._estimator.observe(now, now - began, inflight, False)
            elif isinstance(exc, self.drops):
                self._dropped += 1
                self._estimator.observe(now, now - began, inflight, True)
            if (limit := self._estimator.limit) != self.limit:
                checks.count("the algorithm's limit", limit)  # at 0 no call would ever end and raise it
        except BaseException:  # from an algorithm of the user's; the place goes on all the same
            self._hand_over(now)
            raise
        if limit != self.limit:
            self._emit(LimitChanged, now, self.limit, limit)
            self.resize(limit, now)
        elif self._queued:
            self._hand_over(now)

    def check_cost(self, cost: int) -> int:
        """`cost`, or ValueError if it is more than the limit may ever be. Above the limit of now it runs alone."""
        if cost > self.max_limit:
            raise ValueError(
                f"{self.name!r} never has more than max_limit={self.max_limit} places, so a call can't cost more, "
                f"got a cost of {cost}"
            )
        return cost

    def resize(self, limit: int, now: float) -> None:
        """Change the limit, and the longest queue with it. With the lock held."""
        self.max_queued = int(limit * self.ramp_end)
        super().resize(limit, now)

    def _token(self, cost: int, now: float) -> Token:
        return now, self._active, cost

    def _queue(self, now: float, cost: int) -> Token:
        if self._queued and self._refuses(+current_priority.get()):
            raise self._refusal(now)
        return super()._queue(now, cost)

    def _refuses(self, level: int) -> bool:
        """Whether the ramp refuses a call of this priority, going by the calls that would be served before it."""
        ahead = sum(len(line) for known, line in self._lines.items() if known >= level)
        start = self.limit * self.ramp_start
        if ahead < start:
            return False
        end = self.limit * self.ramp_end
        return ahead >= end or self.rng.random() * (end - start) < ahead - start

    def _adopt(self, fresh: Self, now: float) -> None:
        """A change of the algorithm or of its bounds starts it afresh; else it keeps what it knows."""
        anew = (fresh.algorithm, fresh.initial_limit, fresh.min_limit, fresh.max_limit)
        if anew != (self.algorithm, self.initial_limit, self.min_limit, self.max_limit):
            self._estimator = fresh._estimator
            self.algorithm, self.initial_limit, self.min_limit, self.max_limit = anew
        self.drops, self.rng = fresh.drops, fresh.rng
        self.ramp_start, self.ramp_end = fresh.ramp_start, fresh.ramp_end
        self._set_queue(fresh.max_queued, fresh.max_wait, fresh.aging)
        self.resize(self._estimator.limit, now)

    def snapshot(self) -> AdaptiveBulkheadSnapshot:
        """Places and queue at one moment."""
        with self._lock:
            return AdaptiveBulkheadSnapshot(
                active=self._active,
                waiting=self._queued,
                limit=self.limit,
                finished=self._finished,
                dropped=self._dropped,
                rejections=self._rejections,
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        seen = self.snapshot()
        return {"finished": seen.finished - seen.dropped, "dropped": seen.dropped, "rejected": seen.rejections}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        seen = self.snapshot()
        return {"active": seen.active, "waiting": seen.waiting, "limit": seen.limit}


def _estimator(algorithm: Algorithm, initial_limit: int, min_limit: int, max_limit: int) -> Limit:
    if isinstance(algorithm, str) and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)} or make a Limit, got {algorithm!r}")
    make = ALGORITHMS[algorithm] if isinstance(algorithm, str) else algorithm
    if not callable(make):
        raise TypeError(f"algorithm must be one of {', '.join(ALGORITHMS)} or make a Limit, got {algorithm!r}")
    made = make(
        checks.count("initial_limit", initial_limit),
        checks.count("min_limit", min_limit),
        checks.count("max_limit", max_limit),
    )
    if not (hasattr(made, "limit") and callable(getattr(made, "observe", None))):
        raise TypeError(f"algorithm must make a Limit (limit, observe), but {algorithm!r} made {made!r}")
    checks.count("the algorithm's limit", made.limit)
    return made


def _ramp(start: float, end: float) -> tuple[float, float]:
    for setting, value in (("ramp_start", start), ("ramp_end", end)):
        if (value != 0 or isinstance(value, bool)) and checks.positive(setting, value) > MOST:
            raise ValueError(f"{setting} must be {MOST} or less, got {value!r}")
    if start > end:
        raise ValueError(f"ramp_start must be ramp_end or less, got {start!r} > {end!r}")
    return float(start), float(end)
