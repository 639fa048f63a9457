"""Circuit breaker: stop calling what is failing, and find out gently when it works again."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from seawall.core import checks
from seawall.core.counts import RollingWindow
from seawall.core.errors import Rejected
from seawall.core.events import Event, Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token


class State(enum.Enum):
    """What a breaker does with calls."""

    CLOSED = "closed"  # lets them pass and counts how they end
    OPEN = "open"  # refuses them until the reset timeout has passed
    HALF_OPEN = "half_open"  # lets a few probes through to find out


class CircuitOpenError(Rejected):
    """The breaker is open, or half open with all its probes out. `retry_after` is when it probes next."""

    reason = "is open: what it guards was failing"


@dataclass(frozen=True, slots=True)
class StateChanged(Event):
    """A breaker changed its state."""

    before: State
    after: State


@dataclass(frozen=True, slots=True)
class BreakerSnapshot:
    """A breaker at one moment. Counters only grow; `failure_rate` is of the window, None under `minimum_calls`."""

    state: State
    successes: int
    failures: int
    neither: int
    rejections: int
    opened: int
    failure_rate: float | None
    consecutive_failures: int
    probes: int
    retry_after: float | None


class _Probe:
    """The token of a trial call: a slot on lease until `expires`. The list it is in ends with the round."""

    __slots__ = ("expires",)

    def __init__(self, expires: float) -> None:
        self.expires = expires


class CircuitBreaker(GuardPolicy):
    """Opens when calls fail too often, refuses calls at once while open, then probes before it closes.

    Closed, it opens when at least `failure_rate` of the calls in the last `window` seconds failed, or after
    `consecutive_failures` in a row. The rate is judged at each failure, from `minimum_calls` calls on: a success
    never opens it. After `reset_timeout` seconds it is half open: up to `probes` trial calls at a time pass;
    `success_threshold` successes close it, one failure opens it again. A result that arrives after a change of
    state changes nothing, and a call that was cancelled, refused further in or abandoned counts as neither
    success nor failure.

    A probe's slot is a lease: one that still hangs after `probe_timeout` seconds (the reset timeout unless
    told) no longer keeps the next probe out.

    Args:
        name: labels errors, metrics and logs.
        failure_rate: share of calls in (0, 1].
        minimum_calls: calls the window needs before the rate counts.
        window: seconds the rate looks back, in ten slots.
        consecutive_failures: failures in a row that open it whatever the rate; None for never.
        reset_timeout: seconds it stays open.
        probes: trial calls in flight at most while half open.
        success_threshold: trial calls that must succeed to close it.
        probe_timeout: seconds after which a hanging probe's slot is given to another.
        on: exceptions that count as failures.
        ignore: of those, the ones that count as neither.
        listeners: called with its `StateChanged` and `CallRejected` events.

    Raises:
        CircuitOpenError: from a guarded call, while open.

    >>> payments = CircuitBreaker("payments", consecutive_failures=1)
    >>> @payments
    ... def pay():
    ...     raise ConnectionError("no route")
    >>> try: pay()
    ... except ConnectionError: print(payments.state)
    State.OPEN
    """

    kind = "breaker"

    def __init__(
        self,
        name: str,
        *,
        failure_rate: float = 0.5,
        minimum_calls: int = 20,
        window: float | timedelta = 60.0,
        consecutive_failures: int | None = None,
        reset_timeout: float | timedelta = 30.0,
        probes: int = 1,
        success_threshold: int = 1,
        probe_timeout: float | timedelta | None = None,
        on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        ignore: type[BaseException] | tuple[type[BaseException], ...] = (),
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.failure_rate = checks.fraction("failure_rate", failure_rate)
        self.minimum_calls = checks.count("minimum_calls", minimum_calls)
        self.consecutive_failures = (
            None if consecutive_failures is None else checks.count("consecutive_failures", consecutive_failures)
        )
        self.reset_timeout = checks.seconds("reset_timeout", reset_timeout)
        self.probes = checks.count("probes", probes)
        self.success_threshold = checks.count("success_threshold", success_threshold)
        self.probe_timeout = (
            self.reset_timeout if probe_timeout is None else checks.seconds("probe_timeout", probe_timeout)
        )
        self.on = checks.exceptions("on", on)
        self.ignore = checks.exceptions("ignore", ignore)
        self._window = RollingWindow(checks.seconds("window", window), slots=10, width=2)
        self._counts = [0, 0]  # successes, failures: of calls that ended in the state they began in
        self._late = [0, 0]  # of the others, probes among them
        self._neither = 0
        self._opened = 0
        self._state = State.CLOSED
        self._generation = 0  # of the state: a call from an earlier one proves nothing
        self._in_a_row = 0
        self._since = [0, 0]  # the counts when the breaker last closed: older calls don't count again
        self._opens_until = 0.0
        self._probing: list[_Probe] = []
        self._passed = 0
        self._register()

    @property
    def state(self) -> State:
        """What it does with a call now; open turns half open when a call comes after the reset timeout."""
        return self._state

    def enter(self, now: float) -> Token:
        """Let the call pass, or raise `CircuitOpenError`."""
        if self._state is State.CLOSED:
            return self._generation
        if self._state is State.OPEN:
            if now < self._opens_until:
                raise self._refused(CircuitOpenError(self.name, self._opens_until - now), now)
            self._become(State.HALF_OPEN, now)
        return self._probe(now)

    def _probe(self, now: float) -> Token:
        self._probing = [probe for probe in self._probing if probe.expires > now]
        if len(self._probing) >= self.probes:
            retry_after = min(probe.expires for probe in self._probing) - now
            raise self._refused(CircuitOpenError(self.name, retry_after), now)
        probe = _Probe(now + self.probe_timeout)
        self._probing.append(probe)
        return probe

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Count how the call ended, and act on it if it began in the state the breaker is in."""
        failed = exc is not None
        if failed and not self._is_failure(exc):  # type: ignore[arg-type]
            self._neither += 1
            if token.__class__ is _Probe and token in self._probing:
                self._probing.remove(token)
        elif token == self._generation:
            if now >= self._window.turns_at:
                self._window.turn(now, self._counts)
            self._counts[failed] += 1
            self._in_a_row = self._in_a_row + 1 if failed else 0
            if failed and self._too_many(now):
                self._open(now)
        else:
            self._late[failed] += 1
            if token.__class__ is _Probe and token in self._probing:
                self._probe_ended(token, now, failed=failed)

    def _is_failure(self, exc: BaseException) -> bool:
        if isinstance(exc, Rejected) or not isinstance(exc, self.on):
            return False
        return not isinstance(exc, self.ignore)

    def _probe_ended(self, probe: _Probe, now: float, *, failed: bool) -> None:
        self._probing.remove(probe)
        if failed:
            self._open(now)
            return
        self._passed += 1
        if self._passed >= self.success_threshold:
            self._become(State.CLOSED, now)

    def _too_many(self, now: float) -> bool:
        if self.consecutive_failures is not None and self._in_a_row >= self.consecutive_failures:
            return True
        rate = self._rate(now)
        return rate is not None and rate >= self.failure_rate

    def _rate(self, now: float) -> float | None:
        """Share of failures in the window since the breaker closed; None below `minimum_calls`."""
        recent = self._window.since(now, self._counts)
        closed = [count - before for count, before in zip(self._counts, self._since, strict=True)]
        successes, failures = map(min, recent, closed)
        calls = successes + failures
        return failures / calls if calls >= self.minimum_calls else None

    def _open(self, now: float) -> None:
        self._opens_until = now + self.reset_timeout
        self._opened += 1
        self._become(State.OPEN, now)

    def _become(self, state: State, now: float) -> None:
        """The one place that changes the state, and says everything about the change."""
        self._emit(StateChanged, now, self._state, state)
        self._state = state
        self._generation += 1
        self._in_a_row = self._passed = 0
        self._probing = []
        self._since = list(self._counts)

    def snapshot(self) -> BreakerSnapshot:
        """State and counters at one moment."""
        with self._lock:
            now = self._now()
            retry_after = self._opens_until - now if self._state is State.OPEN else None
            return BreakerSnapshot(
                state=self._state,
                successes=self._counts[0] + self._late[0],
                failures=self._counts[1] + self._late[1],
                neither=self._neither,
                rejections=self._rejections,
                opened=self._opened,
                failure_rate=self._rate(now),
                consecutive_failures=self._in_a_row,
                probes=len(self._probing),
                retry_after=None if retry_after is None else max(0.0, retry_after),
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {
            "success": snapshot.successes,
            "failure": snapshot.failures,
            "neither": snapshot.neither,
            "rejected": snapshot.rejections,
        }

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        rate = math.nan if snapshot.failure_rate is None else snapshot.failure_rate
        states = {f"state.{state.value}": float(state is snapshot.state) for state in State}
        return {**states, "failure_rate": rate}
