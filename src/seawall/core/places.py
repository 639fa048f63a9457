"""Places and the queue for them: what every bulkhead is made of, whoever sets its limit."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias, overload

from seawall.core.ambient import current_priority, deadline
from seawall.core.costing import AtCost, Cost, CostPerCall, costing
from seawall.core.errors import Rejected
from seawall.core.events import Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token, Wait

STRICT = 1e12  # seconds of aging that nobody sees the end of, and a float still tells apart
SWEEP_EVERY = 1.0  # seconds: a refusal must not cost a look at every waiter
Line: TypeAlias = "OrderedDict[_Waiting, None]"  # first come first served, O(1) to leave


class BulkheadFullError(Rejected):
    """Every place is taken and the queue is full, or no place came free within the wait."""

    reason = "is full"


class _Waiting(Wait):
    """A call in the queue."""

    __slots__ = ("begin", "cost", "line", "places", "rank")

    def __init__(self, places: Places, until: float, after: float | None, cost: int, line: Line, rank: float) -> None:
        super().__init__(until, after)
        self.places = places
        self.cost = cost
        self.line = line
        self.rank = rank
        self.begin = None

    def resume(self, now: float) -> Token:
        if self.granted:
            return self.token
        if now < self.until:
            raise self
        self.places._leave_queue(self, now)
        raise self.refuse(now)

    def abandon(self, now: float) -> None:
        if self.granted:
            self.places._give_back(self.cost, now)
        else:
            self.places._leave_queue(self, now)

    def refuse(self, now: float) -> Rejected:
        return self.places._refusal(now)


class Places(GuardPolicy):
    """`limit` places and a queue for `max_queued` calls: base of the bulkheads, which say where the limit comes from.

    Who comes while a place is free and nobody waits has it at once. Else calls are served by priority, each
    `aging` seconds of waiting being worth one level, and within a priority in the order they came. A call that
    ends hands its place over under the lock, so nobody overtakes: not a newcomer, and not a light call while a
    heavy one at the head waits for several places. `resize` changes the limit at any time and never waits.

    For subclasses: the limit is set with `resize`. One whose calls hold more than their cost makes that in `_token`
    and writes `enter` and `exit` anew: `_queue` is the way in when no place is free, `_give_back` the way out.
    `_refusal` makes the error. All of them run with the lock held.
    """

    __slots__ = (
        "_active",
        "_finished",
        "_head_start",
        "_lines",
        "_open",
        "_order",
        "_queued",
        "_swept",
        "aging",
        "limit",
        "max_queued",
        "max_wait",
    )

    def __init__(
        self, name: str, listeners: Iterable[Listener], *, limit: int, max_queued: int, max_wait: float, aging: float
    ) -> None:
        super().__init__(name, listeners)
        self.limit = limit
        self._active = 0  # places taken: the costs of the calls that are in
        self._queued = 0  # calls that wait
        self._open = limit  # the limit for newcomers: 0 while somebody waits, so that none overtakes
        self._finished = 0
        self._lines: dict[int, Line] = {}  # of each priority that ever waited
        self._order: tuple[Line, ...] = ()  # the same, highest priority first
        self._swept = -math.inf
        self._head_start = 0.0
        self._set_queue(max_queued, max_wait, aging)

    def _set_queue(self, max_queued: int, max_wait: float, aging: float) -> None:
        """Settings of the queue; whoever waits already keeps its time, and is served in the new order."""
        self.max_queued = max_queued
        self.max_wait = max_wait
        self.aging = aging
        head_start = aging if aging < STRICT else STRICT  # aging without a clock: a level is worth a head start
        for level, line in self._lines.items():
            for wait in line:
                wait.rank -= level * (head_start - self._head_start)
        self._head_start = head_start

    def enter(self, now: float) -> Token:
        """Take a place, or queue for one, or raise `BulkheadFullError`."""
        if self._active < self._open:
            self._active += 1
            return 1
        return self._queue(now, 1)

    def enter_at(self, now: float, cost: int) -> Token:
        """`enter` for a call that takes `cost` places."""
        if self._active + cost <= self._open or not self._active:  # dearer than a shrunk limit, it runs alone
            self._active += cost
            return self._token(cost, now)
        return self._queue(now, cost)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Hand the call's places to the next in the queue."""
        self._finished += 1
        self._active -= token  # type: ignore[operator]
        if self._queued:
            self._hand_over(now)

    def resize(self, limit: int, now: float) -> None:
        """Change the limit: more places wake waiters, fewer are reached as calls end. With the lock held."""
        self.limit = limit
        self._hand_over(now)

    @overload
    def costing(self, cost: int) -> AtCost: ...
    @overload
    def costing(self, cost: Callable[..., int]) -> CostPerCall: ...
    def costing(self, cost: Cost) -> AtCost | CostPerCall:
        """This bulkhead for calls that take `cost` places each: a number, or a function of the call's arguments.

        Such a call waits until it has all its places, and none overtakes it meanwhile. If the limit has fallen
        below its cost it runs alone.

        Raises:
            ValueError: for a cost above the limit (above `max_limit`, where the limit finds itself); from the call,
                where a function reckons it.

        Examples:
            >>> from seawall import Bulkhead
            >>> gpu = Bulkhead("gpu", max_concurrent=4)
            >>> with gpu.costing(3).scope():
            ...     print(gpu.snapshot().active)
            3
        """
        return costing(self, cost)

    def check_cost(self, cost: int) -> int:
        """`cost`, or ValueError if it is more than all places."""
        if cost > self.limit:
            raise ValueError(f"{self.name!r} has {self.limit} places, so a call can't cost more, got a cost of {cost}")
        return cost

    def _token(self, cost: int, now: float) -> Token:
        """What a call that has got `cost` places holds, for `exit`."""
        return cost

    def _give_back(self, cost: int, now: float) -> None:
        """A call left `cost` places."""
        self._active -= cost
        if self._queued:
            self._hand_over(now)

    def _refusal(self, now: float) -> Rejected:
        """The error of a call that finds no place, counted and reported."""
        return self._refused(BulkheadFullError(self.name), now)

    def _queue(self, now: float, cost: int) -> Token:
        """Wait for `cost` places (raises the wait), or be refused. The token if there are places after all."""
        after: float | None = self.max_wait
        until = now + self.max_wait
        if until > (over := deadline.get()):
            until, after = over, None
        if not self.max_queued or until <= now:
            raise self._refusal(now)
        level = +current_priority.get()  # a plain int, which hashes faster
        rank = now - level * self._head_start
        victim: _Waiting | None = None
        if self._queued >= self.max_queued and not self._room(now):
            victim = self._last()
            if victim.rank <= rank:
                raise self._refusal(now)
        line = self._lines.get(level)
        if line is None:
            line = self._new_line(level)
        wait = _Waiting(self, until, after, cost, line, rank)
        line[wait] = None
        self._queued += 1
        if victim is not None:  # only if this call does wait: one that can't sleep is refused, and had no right to it
            wait.begin = partial(self._displace, victim, now)
        self._open = 0
        if self._active < self.limit:  # it comes before a heavy call that waits, or a finaliser gave a place back
            self._hand_over(now)
            if wait.granted:
                return wait.token
        raise wait

    def _new_line(self, level: int) -> Line:
        line: Line = OrderedDict()
        self._lines[level] = line
        self._order = tuple([self._lines[level] for level in sorted(self._lines, reverse=True)])
        return line

    def _hand_over(self, now: float) -> None:
        """Serve the queue as far as the places reach."""
        while self._queued:
            wait = next(iter(self._order[0])) if len(self._order) == 1 else self._next()
            cost = wait.cost
            if self._active + cost > self.limit and self._active:  # else it runs alone, as in `enter_at`
                return
            del wait.line[wait]
            self._queued -= 1
            self._active += cost
            wait.until, wait.after = now, None  # if it has not lain down yet, it shall not
            wait.token = self._token(cost, now)
            wait.granted = True  # from here on it may run: the gate looks at this without the lock
            if not wait.sleeper.ring():  # its event loop is gone; the next one has it
                wait.granted = False
                self._active -= cost
        self._open = self.limit

    def _next(self) -> _Waiting:
        """The waiter to serve first."""
        first = None
        for line in self._order:
            if line:
                head = next(iter(line))
                if first is None or head.rank < first.rank:
                    first = head
        assert first is not None
        return first

    def _last(self) -> _Waiting:
        """The waiter to serve last."""
        last = None
        for line in self._order:
            if line:
                tail = next(reversed(line))
                if last is None or tail.rank >= last.rank:
                    last = tail
        assert last is not None
        return last

    def _leave_queue(self, wait: _Waiting, now: float) -> None:
        """`wait` gave up, if it is there still. Where it was a heavy one at the head, those behind it may fit."""
        if wait in wait.line:
            self._remove(wait)
            self._hand_over(now)

    def _remove(self, wait: _Waiting) -> None:
        del wait.line[wait]
        self._queued -= 1

    def _room(self, now: float) -> bool:
        """Whether a full queue has room after all, since some waiter's loop is gone."""
        if now - self._swept < SWEEP_EVERY:
            return False
        self._swept = now
        return self._sweep()

    def _displace(self, victim: _Waiting, now: float) -> None:
        """`victim` gives way to one that is to be served before it."""
        if victim in victim.line:
            self._remove(victim)
            victim.until, victim.after = now, None  # awake, it finds that its time is up
            victim.wake()

    def _sweep(self) -> bool:
        """Drop waiters whose event loop is gone; whether there were any."""
        before = self._queued
        for line in self._order:
            for wait in list(line):
                if not getattr(wait.sleeper, "alive", True):
                    self._remove(wait)
        return self._queued < before
