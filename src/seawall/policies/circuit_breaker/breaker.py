"""The breaker itself: who may call, what a result changes, and the one place that changes the state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import timedelta
from typing import Literal

from seawall.core import checks, events
from seawall.core.counts import RollingWindow
from seawall.core.errors import Rejected
from seawall.core.events import Listener
from seawall.core.policy import GuardPolicy
from seawall.core.protocol import Token
from seawall.policies.circuit_breaker import calls, settings, timeouts
from seawall.policies.circuit_breaker.calls import Call, Errors, OpenFor, Outcome, Predicate, Probe
from seawall.policies.circuit_breaker.states import (
    BreakerSnapshot,
    CircuitOpenError,
    State,
    StateChanged,
    ThresholdExceeded,
    described,
)
from seawall.policies.circuit_breaker.timeouts import ResetTimeout
from seawall.policies.circuit_breaker.windows import CallWindow

# An enum's members are slow to look up where calls pass by.
CLOSED, OPEN, HALF_OPEN, ISOLATED, DISABLED, METRICS_ONLY = State
SUCCESS, FAILURE, NEITHER = Outcome

SLOTS = 10
SLOW = 2  # where slow calls stand in the counts, after successes and failures


class CircuitBreaker(GuardPolicy):
    """Opens when calls fail too often, refuses calls at once while open, then probes before it closes.

    Closed, it opens when at least `failure_rate` of the calls in the window failed, when at least `slow_call_rate`
    of them took too long, or after `consecutive_failures` in a row. It judges at each failure and each slow call,
    from `minimum_calls` calls on: a quick success never opens it. After `reset_timeout` seconds it is half open and
    lets probes through: it closes once `success_threshold` of them succeeded, and opens again at the first failure
    or, given `permitted_probes`, once too few are left to succeed. A result that arrives after a change of state
    changes nothing, and a call that was cancelled, refused further in or abandoned is neither success nor failure.

    A probe's slot is a lease: one that still hangs after `probe_timeout` seconds no longer keeps the next one out.

    Args:
        name: labels errors, metrics and logs.
        failure_rate: share of calls in (0, 1].
        slow_call_rate: share of slow calls in (0, 1] that opens it; goes with `slow_call_duration`.
        slow_call_duration: seconds beyond which a call is slow, however it ends; None for never.
        consecutive_failures: failures in a row that open it whatever the rate; None for never.
        minimum_calls: calls the window needs before a rate counts; all of it, where that is fewer.
        window: seconds the rates look back, in ten slots; 60 unless it or `window_calls` is given.
        window_calls: calls the rates look back, instead of seconds.
        reset_timeout: seconds it stays open, or a function of how many times in a row it opened, such as
            `growing(5)`. It is asked when the breaker is built, for 1 to 32 times: later the lock is held.
        open_for: given the exception or the result of a call, the seconds to open for at once (Retry-After), or None.
        probes: trial calls in flight at most while half open.
        permitted_probes: trial calls of one half-open round in all; as many may fail as are not needed to close it.
            None for any number, of which none may fail.
        success_threshold: trial calls that must succeed, and not be slow, to close it.
        probe_timeout: seconds after which a hanging probe's slot is given to another; the reset timeout unless told.
        half_open_timeout: seconds it stays half open at most; None for as long as it takes.
        half_open_then: the state after that, open or closed.
        on: exceptions that count as failures: classes, or a predicate.
        ignore: of those, the ones that count as neither: classes, or a predicate.
        on_result: predicate of a result; True counts it as a failure.
        listeners: called with its `StateChanged`, `ThresholdExceeded` and `CallRejected` events.

    Raises:
        CircuitOpenError: from a guarded call, while open.

    Examples:
        >>> payments = CircuitBreaker("payments", consecutive_failures=1)
        >>> @payments
        ... def pay():
        ...     raise ConnectionError("no route")
        >>> try: pay()
        ... except ConnectionError: print(payments.state)
        State.OPEN
    """

    kind = "breaker"
    __slots__ = (
        *settings.NAMES,
        "_counts",
        "_exceeded",
        "_failed",
        "_failure",
        "_generation",
        "_in_a_row",
        "_late_failures",
        "_late_slow",
        "_late_successes",
        "_neither",
        "_opened",
        "_opened_in_a_row",
        "_passed",
        "_plain",
        "_probing",
        "_state",
        "_timeouts",
        "_turns_at",
        "_until",
        "_window",
        "judges",
    )

    def __init__(
        self,
        name: str,
        *,
        failure_rate: float = 0.5,
        slow_call_rate: float | None = None,
        slow_call_duration: float | timedelta | None = None,
        consecutive_failures: int | None = None,
        minimum_calls: int = 20,
        window: float | timedelta | None = None,
        window_calls: int | None = None,
        reset_timeout: ResetTimeout = 30.0,
        open_for: OpenFor | None = None,
        probes: int = 1,
        permitted_probes: int | None = None,
        success_threshold: int = 1,
        probe_timeout: float | timedelta | None = None,
        half_open_timeout: float | timedelta | None = None,
        half_open_then: State | Literal["open", "closed"] = State.OPEN,
        on: Errors = Exception,
        ignore: Errors = (),
        on_result: Predicate | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.failure_rate = checks.fraction("failure_rate", failure_rate)
        self.slow_call_rate, self.slow_call_duration = settings.slow_calls(slow_call_rate, slow_call_duration)
        self.consecutive_failures = settings.count("consecutive_failures", consecutive_failures)
        self.minimum_calls = checks.count("minimum_calls", minimum_calls)
        self.window, self.window_calls = settings.windows(window, window_calls)
        self._timeouts = timeouts.durations(reset_timeout)
        self.reset_timeout = self._timeouts if isinstance(self._timeouts, float) else reset_timeout
        self.open_for = None if open_for is None else checks.function("open_for", open_for, of="one value")
        self.probes = checks.count("probes", probes)
        self.success_threshold = checks.count("success_threshold", success_threshold)
        self.permitted_probes = settings.permitted_probes(permitted_probes, self.success_threshold)
        self.probe_timeout = settings.seconds("probe_timeout", probe_timeout)
        self.half_open_timeout = settings.seconds("half_open_timeout", half_open_timeout)
        self.half_open_then = settings.after_half_open(half_open_then)
        self.on = settings.errors("on", on)
        self.ignore = settings.errors("ignore", ignore)
        self.on_result = None if on_result is None else checks.function("on_result", on_result, of="one value")
        self.judges = on_result is not None or open_for is not None or calls.asks(on) or calls.asks(ignore)
        self._counts = [0, 0, 0]  # successes, failures, slow ones: of calls that ended in the state they began in
        self._late_successes = self._late_failures = self._late_slow = 0  # of the others, probes among them
        self._neither = 0
        self._opened = self._opened_in_a_row = 0
        self._state = CLOSED
        self._generation = 0
        self._until = math.inf  # when the state ends by itself
        self._probing: tuple[Probe, ...] = ()
        self._failure: str | None = None
        self._window: RollingWindow | CallWindow | None = None
        self._turns_at = -math.inf
        self._in_a_row = self._passed = self._failed = 0
        self._exceeded = False
        self._plain: int | None = None
        self._begin()
        self._register()

    @property
    def state(self) -> State:
        """What it does with a call now; a state whose time is over ends when the next call comes."""
        return self._state

    def enter(self, now: float) -> Token:
        """Let the call pass, or raise `CircuitOpenError`."""
        token = self._plain
        if token is not None:
            return token
        return self._admit(now)

    def _admit(self, now: float) -> Token:
        if self._state is HALF_OPEN:
            self._end_round(now)
        if self._state is OPEN:
            if now < self._until:
                raise self._refusal(self._until, now)
            self._become(HALF_OPEN, now, "the reset timeout is over")
        state = self._state
        if state is CLOSED or state is METRICS_ONLY:
            return Call(self._generation, now)
        if state is HALF_OPEN:
            return self._probe(now)
        if state is DISABLED:
            return None
        self._rejections += 1  # no event: whoever isolated it wanted every one of them
        error = CircuitOpenError(self.name)
        error.reason = "is isolated by hand"
        raise error

    def _refusal(self, until: float, now: float) -> CircuitOpenError:
        error = CircuitOpenError(self.name, until - now)
        error.failure = self._failure
        return self._refused(error, now)

    def _probe(self, now: float) -> Token:
        self._probing = tuple(probe for probe in self._probing if probe.expires > now)
        out = len(self._probing)
        if out >= self.probes or out + self._passed + self._failed >= (self.permitted_probes or math.inf):
            raise self._refusal(min(self._until, *(probe.expires for probe in self._probing)), now)
        lease = timeouts.after(self._timeouts, 1) if self.probe_timeout is None else self.probe_timeout
        probe = Probe(self._generation, now, now + lease)
        self._probing = (*self._probing, probe)
        return probe

    def judge(self, token: Token, result: object, exc: BaseException | None) -> None:
        """Ask the user's predicates what the call counts as, and for how long to stay away."""
        if not isinstance(token, Call):
            return
        if exc is None:
            failed = self.on_result is not None and calls.says(self.on_result, result, otherwise=False)
            token.outcome = FAILURE if failed else SUCCESS
        else:
            token.outcome = calls.judged(exc, self.on, self.ignore)
        answered = exc is None or (isinstance(exc, Exception) and not isinstance(exc, Rejected))
        if self.open_for is not None and answered:
            token.seconds = calls.named(self.open_for, result if exc is None else exc)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Count how the call ended, and act on it if it began in the state the breaker is in."""
        if exc is None and token == self._generation:  # nearly every call
            if now >= self._turns_at:
                self._turn(now)
            self._counts[0] += 1
            self._in_a_row = 0
        elif token is not None:  # or it came while disabled
            self._ended(token if isinstance(token, Call) else Call(token, now), now, exc)

    def _ended(self, call: Call, now: float, exc: BaseException | None) -> None:
        if self._state is HALF_OPEN:
            self._end_round(now)
        probing = isinstance(call, Probe)
        current = call.generation == self._generation and (not probing or call in self._probing)
        if probing:
            self._probing = tuple(probe for probe in self._probing if probe is not call)
        outcome = call.outcome or calls.outcome(exc, self.on, self.ignore)
        failed = outcome is FAILURE
        slow = self.slow_call_duration is not None and now - call.began > self.slow_call_duration
        if outcome is NEITHER:
            self._neither += 1
            failed = slow = False
        elif current and not probing:
            self._count(now, failed=failed, slow=slow)
        else:
            self._late_successes += not failed
            self._late_failures += failed
            self._late_slow += slow
        if not current:
            return
        failure = exc if failed else None
        if call.seconds is not None:
            self._trip(now, f"told to wait {call.seconds:.3g} s", failure, call.seconds)
        elif probing and outcome is not NEITHER:
            self._failed += failed or slow
            self._passed += not (failed or slow)
            self._decide(now, failure)
        elif failed or slow:
            reason = self._too_much(now, failed=failed)
            if reason is not None:
                self._trip(now, reason, failure)

    def _turn(self, now: float) -> None:
        """Begin a slot of the window; the first call makes the window, so idle breakers are small."""
        if self._window is None:
            if self.window_calls is not None:
                self._window = CallWindow(self.window_calls)
            else:
                assert self.window is not None
                self._window = RollingWindow(self.window, slots=SLOTS, width=len(self._counts))
        self._window.turn(now, self._counts)
        self._turns_at = self._window.turns_at

    def _count(self, now: float, *, failed: bool, slow: bool) -> None:
        if now >= self._turns_at:
            self._turn(now)
        self._counts[failed] += 1
        self._counts[SLOW] += slow
        self._in_a_row = self._in_a_row + 1 if failed else 0
        if isinstance(self._window, CallWindow):
            self._window.mark(failed=failed, slow=slow)

    def _recent(self, now: float) -> tuple[int, int, int]:
        """Calls, failures and slow calls in the window since the state began; no calls where they are too few."""
        if self._window is None:
            return 0, 0, 0
        successes, failures, slow = self._window.since(now, self._counts)
        enough = min(self.minimum_calls, self.window_calls or self.minimum_calls)
        recent = successes + failures
        return (recent, failures, slow) if recent >= enough else (0, 0, 0)

    def _too_much(self, now: float, *, failed: bool) -> str | None:
        """Why to open after a call that failed, or was only slow; None if all is well enough."""
        if failed and self.consecutive_failures is not None and self._in_a_row >= self.consecutive_failures:
            return f"{self._in_a_row} failures in a row"
        recent, failures, slow = self._recent(now)
        if failed and recent and failures / recent >= self.failure_rate:
            return f"{failures} of {recent} calls failed"
        if self.slow_call_rate is not None and recent and slow / recent >= self.slow_call_rate:
            return f"{slow} of {recent} calls were slow"
        return None

    def _decide(self, now: float, failure: BaseException | None = None) -> None:
        """End a round of probes as soon as its outcome is certain."""
        spare = 0 if self.permitted_probes is None else self.permitted_probes - self.success_threshold
        if self._passed >= self.success_threshold:
            self._become(CLOSED, now, "the probes succeeded")
        elif self._failed > spare:
            self._open(now, "the probes failed", failure)

    def _end_round(self, now: float) -> None:
        """End a round of probes that took too long; it is open from then on, though nobody called to see it."""
        if now >= self._until:
            if self.half_open_then is CLOSED:
                self._become(CLOSED, now, "the probes took too long")
            else:
                self._open(now, "the probes took too long", since=self._until)

    def _trip(self, now: float, reason: str, failure: BaseException | None, seconds: float | None = None) -> None:
        """Open, or where only metrics are wanted say once that it would."""
        if self._state is not METRICS_ONLY:
            self._open(now, reason, failure, seconds)
        elif not self._exceeded:
            self._exceeded = True
            self._emit(ThresholdExceeded, now, reason)

    def _open(
        self,
        now: float,
        reason: str,
        failure: BaseException | None = None,
        seconds: float | None = None,
        *,
        since: float | None = None,
    ) -> None:
        self._opened += 1
        self._opened_in_a_row += 1
        if failure is not None:
            self._failure = described(failure)
        until = (now if since is None else since) + (seconds or timeouts.after(self._timeouts, self._opened_in_a_row))
        self._become(OPEN, now, reason, until)

    def _become(self, state: State, now: float, reason: str, until: float = math.inf) -> None:
        """The one place that changes the state, and says everything about the change."""
        if state is not self._state:
            self._emit(StateChanged, now, self._state, state, reason)
        self._state = state
        self._generation += 1
        if state is HALF_OPEN and self.half_open_timeout is not None:
            until = now + self.half_open_timeout
        self._until = until
        self._probing = ()
        if state is not OPEN and state is not HALF_OPEN:
            self._opened_in_a_row, self._failure = 0, None
        self._begin()

    def _begin(self) -> None:
        """Forget what the state before has counted."""
        self._window, self._turns_at = None, -math.inf
        self._in_a_row = self._passed = self._failed = 0
        self._exceeded = False
        self._hand_out()

    def _hand_out(self) -> None:
        """Choose the token: where nobody asks how long a call took or what it returned, the generation will do."""
        passing = self._state is CLOSED or self._state is METRICS_ONLY
        plain = passing and not self.judges and self.slow_call_duration is None
        self._plain = self._generation if plain else None

    def force_open(self, seconds: float | timedelta | None = None) -> None:
        """Open now, as if calls had failed: for `seconds`, or the reset timeout; then it probes."""
        duration = settings.seconds("seconds", seconds)
        with self._lock:
            self._open(self._now(), "opened by hand", seconds=duration)
        events.deliver()

    def force_closed(self) -> None:
        """Close now and go on judging, from an empty window. A closed breaker stays as it is."""
        with self._lock:
            if self._state is not CLOSED:
                self._become(CLOSED, self._now(), "closed by hand")
        events.deliver()

    def isolate(self) -> None:
        """Refuse every call until told otherwise, such as while the dependency is moved."""
        self._by_hand(ISOLATED, "isolated by hand")

    def disable(self) -> None:
        """Let every call pass until told otherwise, and count none."""
        self._by_hand(DISABLED, "disabled by hand")

    def metrics_only(self) -> None:
        """Let every call pass until told otherwise; count, and say once when it would have opened."""
        self._by_hand(METRICS_ONLY, "metrics only, by hand")

    def reset(self) -> None:
        """Close, and forget the window and how often it opened in a row. What only grows stays."""
        self._by_hand(CLOSED, "reset by hand")

    def _by_hand(self, state: State, reason: str) -> None:
        with self._lock:
            self._become(state, self._now(), reason)
        events.deliver()

    def update(self, **changes: object) -> None:
        """Change settings while calls are in flight: all of them or, if one is wrong, none.

        The state stays, and so does what is counted, unless the window changes. Times that run already, run as they
        began. A breaker built without predicates (`on_result`, `open_for`, and `on` or `ignore` as functions) can't be
        given any: the functions it guards would never ask them.
        """
        if changes.get("window") is not None:
            changes.setdefault("window_calls", None)
        if changes.get("window_calls") is not None:
            changes.setdefault("window", None)
        super().update(**changes)

    def _check_change(self, fresh: CircuitBreaker) -> None:
        if fresh.judges and not self.judges:
            raise ValueError(
                f"CircuitBreaker {self.name!r} was built without predicates, and what it guards asks none; "
                "give it the first one when it is built"
            )

    def _adopt(self, fresh: CircuitBreaker, now: float) -> None:
        window = self.window, self.window_calls
        for setting in settings.NAMES:
            setattr(self, setting, getattr(fresh, setting))
        self._timeouts = fresh._timeouts
        if window != (self.window, self.window_calls):
            self._window, self._turns_at = None, -math.inf
        self._hand_out()
        if self._state is HALF_OPEN:
            self._decide(now)

    def at_rest(self, now: float) -> bool:
        """Whether a new breaker would do as well: it is closed, and nothing bad is in sight."""
        with self._lock:
            bad = self._window is not None and any(self._window.since(now, self._counts)[1:])
            counting = self.consecutive_failures is not None and self._in_a_row > 0
            return self._state is CLOSED and not bad and not counting

    def snapshot(self) -> BreakerSnapshot:
        """State and counters at one moment."""
        with self._lock:
            now = self._now()
            recent, failures, slow = self._recent(now)
            return BreakerSnapshot(
                state=self._state,
                successes=self._counts[0] + self._late_successes,
                failures=self._counts[1] + self._late_failures,
                slow=self._counts[SLOW] + self._late_slow,
                neither=self._neither,
                rejections=self._rejections,
                opened=self._opened,
                opened_in_a_row=self._opened_in_a_row,
                failure_rate=failures / recent if recent else None,
                slow_call_rate=slow / recent if recent and self.slow_call_rate is not None else None,
                consecutive_failures=self._in_a_row,
                probes=len(self._probing),
                retry_after=max(0.0, self._until - now) if self._state is OPEN else None,
                failure=self._failure,
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
        rates = {"failure_rate": snapshot.failure_rate}
        if self.slow_call_rate is not None:
            rates["slow_call_rate"] = snapshot.slow_call_rate
        states = {f"state.{state.value}": float(state is snapshot.state) for state in State}
        return {**states, **{name: math.nan if rate is None else rate for name, rate in rates.items()}}
