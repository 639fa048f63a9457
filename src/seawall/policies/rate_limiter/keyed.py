"""A rate limit per key, such as a tenant or a host, for about one dict entry each."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, Self, TypeVar

from seawall.core import ambient, checks
from seawall.core.costing import Cost
from seawall.core.decorate import decorate
from seawall.core.errors import Rejected
from seawall.core.events import CallRejected, Listener
from seawall.core.gate import Row
from seawall.core.policy import PolicyBase
from seawall.core.protocol import Token
from seawall.core.scope import Permit, Scope
from seawall.policies.rate_limiter._line import Line, RateLimitedError, Waiting
from seawall.policies.rate_limiter._meters import Gcra

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class KeyedLimiterSnapshot:
    """A keyed limiter at one moment. Counters only grow.

    Attributes:
        keys: that are not at their full burst, and some that were not a moment ago.
        waiting: calls in line, of all keys.
        admitted: calls let in.
        rejections: calls refused.
        forgotten: keys dropped early, since there were more than `max_keys`: each may have got a burst too many.
    """

    keys: int
    waiting: int
    admitted: int
    rejections: int
    forgotten: int


class _KeyWaiting(Waiting):
    """A place in the line of one key."""

    def __init__(
        self, limiter: KeyedRateLimiter, key: Hashable, line: Line, cost: int, since: float, deadline: float
    ) -> None:
        super().__init__(line, cost, since, deadline)
        self.limiter = limiter
        self.key = key

    def let_in(self, now: float) -> Token:
        self.line.meter.add(now, self.cost)
        self.limiter._admitted += 1
        return None

    def resume(self, now: float) -> Token:
        self.line = self.limiter._line_of(self.key)  # if it came too late, another one
        try:
            return super().resume(now)
        finally:
            self.limiter._close_line(self.key)

    def abandon(self, now: float) -> None:
        super().abandon(now)
        self.limiter._close_line(self.key)

    def refuse(self, now: float) -> Rejected:
        self.line = self.limiter._line_of(self.key)
        seconds = self.seconds(now)
        self.limiter._close_line(self.key)
        return self.limiter._refused(self.key, seconds, now)


class AtKey:
    """A keyed limiter as the guard of one key: for blocks, for decorating, and to choose by hand."""

    __slots__ = ("cost", "key", "limiter")

    def __init__(self, limiter: KeyedRateLimiter, key: Hashable, cost: int) -> None:
        self.limiter = limiter
        self.key = key
        self.cost = cost

    @property
    def available(self) -> int:
        """Calls of this key, at a cost of 1, that could start now."""
        return self.limiter._available(self.key)

    def enter(self, now: float) -> Token:
        """Take a turn of this key, or queue for one, or raise `RateLimitedError`."""
        return self.limiter._ask(self.key, now, self.cost)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Nothing: a call that started has used its turn, however it ended."""

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """`fn` behind the limit of this key."""
        return decorate(fn, (self,))

    def scope(self) -> Scope:
        """Guard one block."""
        return Scope(Row((self,)))

    def admit(self) -> Permit:
        """Let one call in by hand, without waiting."""
        return Permit(Row((self,)))

    def __repr__(self) -> str:
        return f"<{self.limiter!r} at {self.key!r}>"


class KeyedRateLimiter(PolicyBase):
    """A rate limit per key: each tenant, user or host has a `RateLimiter` of its own, for one float each.

    Keys that are back at their full burst are forgotten, which changes nothing, so it remembers only those that
    called within the last two refills of the burst. One exhausted key delays no other.

    Args:
        name: labels errors, metrics and logs. There is no metric per key.
        key: takes the call's arguments and returns whose call it is: a string, number or tuple of them.
        rate: calls per period, of each key; may be a fraction.
        per: seconds of the period.
        burst: calls of one key that may start together; the rate, rounded down, unless told.
        max_wait: seconds a call may wait for its turn; 0 refuses at once. Each key has its own line.
        cost: what each call costs: a number, or a function of its arguments.
        max_keys: the most it remembers. Under more, the keys that called least recently start anew.
        listeners: called with its `CallRejected` events.

    Raises:
        RateLimitedError: from a guarded call over its key's rate; `key` says whose.

    Examples:
        >>> tenants = KeyedRateLimiter("tenants", key=lambda tenant, query: tenant, rate=10, burst=2)
        >>> @tenants
        ... def search(tenant: str, query: str) -> str: ...
        >>> search("a", "sea"), tenants["a"].available, tenants["b"].available
        (None, 1, 2)
    """

    kind = "limiter"

    def __init__(
        self,
        name: str,
        *,
        key: Callable[..., Hashable],
        rate: float,
        per: float | timedelta = 1.0,
        burst: float | None = None,
        max_wait: float | timedelta = 0.0,
        cost: Cost = 1,
        max_keys: int = 65_536,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.key = checks.function("key", key, of="a call's arguments")
        self.rate = checks.positive("rate", rate)
        self.per = checks.seconds("per", per)
        self.burst = None if burst is None else checks.positive("burst", burst)
        self.max_wait = checks.seconds("max_wait", max_wait, zero=True, infinite=True)
        self.max_keys = checks.count("max_keys", max_keys, least=2)
        self._meter = Gcra.checked(self.rate, self.per, self.burst)  # of the key that is being asked about
        self.cost = checks.function("cost", cost, of="a call's arguments") if callable(cost) else self._check_cost(cost)
        self._young: dict[Hashable, float] = {}  # by key, when its bucket would be full: those that called lately
        self._old: dict[Hashable, float] = {}  # and those that did before
        self._turns = -math.inf  # when the old ones are full again
        self._lines: dict[Hashable, Line] = {}  # of keys for which somebody waits
        self._admitted = 0
        self._rejections = 0
        self._forgotten = 0
        self._register()

    def guard_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AtKey:
        """The guard of the key whose call this is, at its cost."""
        key = self._hashed(self.key(*args, **kwargs))
        return AtKey(self, key, self.cost(*args, **kwargs) if callable(self.cost) else self.cost)

    def __getitem__(self, key: Hashable) -> AtKey:
        """The guard of one key, for a block: `async with tenants["a"].scope():`."""
        return AtKey(self, self._hashed(key), 1 if callable(self.cost) else self.cost)

    def _hashed(self, key: Hashable) -> Hashable:
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(
                f"a key of {self.name!r} must be hashable (a string, number or tuple), got {key!r}"
            ) from error
        return key

    def _check_cost(self, cost: int) -> int:
        if checks.count("cost", cost) > self._meter.capacity:
            raise ValueError(
                f"cost must be at most the burst of {self.name!r}, {self._meter.capacity:g}, "
                f"or the call could never start; got {cost!r}"
            )
        return cost

    def _ask(self, key: Hashable, now: float, cost: int) -> Token:
        self._check_cost(cost)
        line, start = self._lines.get(key), now
        if line is not None:
            start = line.starts(now, cost)
            self._close_line(key)  # if none of those who waited is left
        if key not in self._lines:
            meter = self._meter
            meter.arrival = self._arrival(key)
            start = meter.opens(now, cost)
            if start - now <= meter.tolerance:
                meter.add(now, cost)
                self._remember(key, meter.arrival, now)
                self._admitted += 1
                return None
        deadline = ambient.deadline.get()
        if start - now - min(self.max_wait, deadline - now) > self._meter.tolerance:
            raise self._refused(key, start - now, now)
        line = self._line_of(key)
        raise line.join(_KeyWaiting(self, key, line, cost, now, deadline), now, self.max_wait)

    def _arrival(self, key: Hashable) -> float:
        found = self._young.get(key)
        return self._old.get(key, -math.inf) if found is None else found

    def _remember(self, key: Hashable, arrival: float, now: float) -> None:
        self._young[key] = arrival
        if self._old:
            self._old.pop(key, None)
        if now >= self._turns or len(self._young) > self.max_keys // 2:
            self._turn_over(now)

    def _turn_over(self, now: float) -> None:
        """Forget the keys that did not call since the last time: by now their buckets are full."""
        if now < self._turns:
            self._forgotten += len(self._old)
        self._old, self._young = self._young, {}
        self._turns = now + self._meter.capacity * self._meter.interval
        for key, line in list(self._lines.items()):
            line.starts(now, 1)  # whose callers may all be gone
            self._close_line(key)

    def _line_of(self, key: Hashable) -> Line:
        """The line of a key, which keeps its bucket while it is there."""
        line = self._lines.get(key)
        if line is None:
            meter = self._meter.copy()
            meter.arrival = self._arrival(key)
            self._young.pop(key, None)
            self._old.pop(key, None)
            line = self._lines[key] = Line(meter)
        return line

    def _close_line(self, key: Hashable) -> None:
        line = self._lines.get(key)
        if line is not None and not line.waiting:
            del self._lines[key]
            self._young[key] = line.meter.arrival

    def _refused(self, key: Hashable, seconds: float | None, now: float) -> RateLimitedError:
        error = RateLimitedError.of(self, seconds, key)
        self._rejections += 1
        self._emit(CallRejected, now, error)
        return error

    def _available(self, key: Hashable) -> int:
        with self._lock:
            line = self._lines.get(key)
            if line is not None and line.waiting:
                return 0
            self._meter.arrival = self._arrival(key) if line is None else line.meter.arrival
            return max(0, math.floor(self._meter.left(self._now()) + 1e-9))

    def _adopt(self, fresh: Self, now: float) -> None:
        before, self._meter = self._meter, fresh._meter
        self.key, self.cost, self.max_keys = fresh.key, fresh.cost, fresh.max_keys
        self.rate, self.per, self.burst, self.max_wait = fresh.rate, fresh.per, fresh.burst, fresh.max_wait
        for arrivals in (self._young, self._old):
            for key, arrival in arrivals.items():
                arrivals[key] = before.converted(arrival, self._meter, now)
        for key, line in list(self._lines.items()):
            line.meter.adopt(self._meter, now)
            line.allow(self.max_wait, now)
            self._close_line(key)
        self._turns = now + self._meter.capacity * self._meter.interval

    def snapshot(self) -> KeyedLimiterSnapshot:
        """Keys and queues at one moment."""
        with self._lock:
            return KeyedLimiterSnapshot(
                keys=len(self._young) + len(self._old) + len(self._lines),
                waiting=sum(len(line.waiting) for line in self._lines.values()),
                admitted=self._admitted,
                rejections=self._rejections,
                forgotten=self._forgotten,
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {"admitted": snapshot.admitted, "rejected": snapshot.rejections}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        return {"keys": snapshot.keys, "waiting": snapshot.waiting}
