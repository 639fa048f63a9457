"""Scripted servers in virtual time: what a bulkhead's limit does to them, event by event, without a clock or a loop.

A server has so many workers and one queue; a call takes a worker for a log-normal time. Both change with the
time as the script says. Calls come at random (Poisson) and enter through the real policy's `enter` and `exit`.
"""

import functools
import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from seawall import Bulkhead, Rejected, Wait

Script = Callable[[float], float]


class Server(NamedTuple):
    """How many workers it has, how long a call takes one (mean seconds), and calls a second, each at a time."""

    workers: Script
    service: Script
    load: Script
    spread: float = 0.5
    """Standard deviation of the service time over its mean."""


def always(value: float) -> Script:
    """A script in which nothing happens."""
    return lambda _: value


STEADY = Server(always(20), always(0.1), always(300))
SCENES = {
    "steady": STEADY,
    "step in latency": STEADY._replace(service=lambda t: 0.2 if 60 <= t < 120 else 0.1),
    "step in capacity": STEADY._replace(workers=lambda t: 10 if 60 <= t < 120 else 20),
    "step in load": STEADY._replace(load=lambda t: 300 if 60 <= t < 120 else 120),
    "drift of capacity": STEADY._replace(workers=lambda t: 20 + t / 9, load=always(600)),
    "drift of latency": STEADY._replace(service=lambda t: 0.1 + t / 900),
}
"""What the tests assert on and the documentation shows: 20 workers, 0.1 s a call, half as many calls again."""


class Second(NamedTuple):
    """One second of a run: the limit at its end, calls that finished in it, their mean seconds, calls refused."""

    limit: int
    finished: int
    latency: float
    refused: int


class _Bell:
    """Where a waiting call sleeps: rung by the policy, heard by the simulation after the event."""

    alive = True

    def __init__(self, rung: deque[Any], wait: Wait) -> None:
        self._rung = rung
        self._wait = wait

    def ring(self) -> bool:
        self._rung.append(self._wait)
        return True


class Simulation:
    """One run. `guard` is any bulkhead; a call that takes longer than `timeout` in the server is a drop."""

    def __init__(self, guard: Any, server: Server, *, seed: int, timeout: float = math.inf) -> None:
        self.guard = guard
        self.server = server
        self.timeout = timeout
        self._random = random.Random(seed)
        self._sigma = math.sqrt(math.log(1 + server.spread**2))
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._number = 0
        self._busy = 0
        self._backlog: deque[list[Any]] = deque()
        self._rung: deque[Any] = deque()
        self._asleep: set[Any] = set()
        self._finished, self._refused, self._seconds = 0, 0, 0.0

    def run(self, seconds: int) -> list[Second]:
        """What happened, second by second."""
        found: list[Second] = []
        self._at(self._random.expovariate(self.server.load(0)), self._arrive)
        while len(found) < seconds:
            now, _, happen, subject = heapq.heappop(self._events)
            while now >= len(found) + 1:
                latency = self._seconds / self._finished if self._finished else math.nan
                found.append(Second(self.guard.limit, self._finished, latency, self._refused))
                self._finished, self._refused, self._seconds = 0, 0, 0.0
            happen(now, subject)
            while self._rung:
                self._wake(now, self._rung.popleft())
        return found[:seconds]

    def _at(self, moment: float, happen: Callable[..., None], subject: Any = None) -> None:
        self._number += 1
        heapq.heappush(self._events, (moment, self._number, happen, subject))

    def _arrive(self, now: float, _: Any) -> None:
        self._at(now + self._random.expovariate(self.server.load(now)), self._arrive)
        try:
            token = self.guard.enter(now)
        except Wait as wait:
            wait.sleeper = _Bell(self._rung, wait)
            if wait.begin is not None:
                wait.begin()
            self._asleep.add(wait)
            self._at(wait.until, self._wake, wait)
        except Rejected:
            self._refused += 1
        else:
            self._begin(now, token)

    def _wake(self, now: float, wait: Any) -> None:
        if wait not in self._asleep:
            return
        self._asleep.discard(wait)
        try:
            token = wait.resume(now)
        except Rejected:
            self._refused += 1
        except Wait:
            self._asleep.add(wait)
        else:
            self._begin(now, token)

    def _begin(self, now: float, token: Any) -> None:
        call = [token, now, True]  # True while somebody waits for it
        if self.timeout < math.inf:
            self._at(now + self.timeout, self._time_out, call)
        self._backlog.append(call)
        self._serve(now)

    def _serve(self, now: float) -> None:
        while self._backlog and self._busy < self.server.workers(now):
            call = self._backlog.popleft()
            if call[2]:
                self._busy += 1
                factor = math.exp(self._random.gauss(-(self._sigma**2) / 2, self._sigma))
                self._at(now + self.server.service(now) * factor, self._finish, call)

    def _finish(self, now: float, call: list[Any]) -> None:
        self._busy -= 1
        if call[2]:
            call[2] = False
            self._finished += 1
            self._seconds += now - call[1]
            self.guard.exit(call[0], now, None)
        self._serve(now)

    def _time_out(self, now: float, call: list[Any]) -> None:
        if call[2]:
            call[2] = False
            self.guard.exit(call[0], now, TimeoutError())


def fixed(limit: int) -> Bulkhead:
    """The bulkhead to beat: the limit given, as long a queue as the adaptive one has."""
    return Bulkhead("fixed", max_concurrent=limit, max_queued=3 * limit, max_wait=1.0)


def goodput(limit: int, server: Server, seconds: int = 20) -> float:
    """Calls a second that a steady server finishes behind a fixed limit."""
    return sum(second.finished for second in Simulation(fixed(limit), server, seed=0).run(seconds)) / seconds


@functools.cache
def best_fixed_limit(workers: int, service: float, load: float, spread: float) -> int:
    """The smallest limit with 99 % of the goodput that any limit has: more would only be a queue in the server.

    Goodput never falls as the limit grows here, so the search halves.
    """
    server = Server(always(workers), always(service), always(load), spread)
    most = 4 * workers
    wanted = 0.99 * goodput(most, server)
    least = 1
    while least < most:
        middle = (least + most) // 2
        if goodput(middle, server) >= wanted:
            most = middle
        else:
            least = middle + 1
    return most


def best_at(server: Server, moment: float) -> int:
    """The best fixed limit for the server as it is at `moment`."""
    return best_fixed_limit(int(server.workers(moment)), server.service(moment), server.load(moment), server.spread)
