"""The breaker against a model that only keeps lists: whatever happens, in whatever order, both say the same."""

from __future__ import annotations

from asyncio import CancelledError

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from seawall import CircuitBreaker, CircuitOpenError, State, use_clock

GOOD, BAD, CANCELLED, TOLD = "good", "bad", "cancelled", "told to wait 7 s"
BY_HAND = {
    "force_open": State.OPEN,
    "force_closed": State.CLOSED,
    "isolate": State.ISOLATED,
    "disable": State.DISABLED,
    "metrics_only": State.METRICS_ONLY,
    "reset": State.CLOSED,
}


class ToldToWaitError(Exception):
    seconds = 7.0


class ModelCall:
    def __init__(self, stay, began, lease=None):
        self.stay, self.began, self.lease = stay, began, lease


class Model:
    """One list of ended calls for each stay in a state; every question is answered by reading the list."""

    def __init__(self, **rules):
        self.__dict__.update(rules)
        self.seen = {GOOD: 0, BAD: 0, "neither": 0, "rejected": 0, "slow": 0, "opened": 0}
        self.in_a_row = 0
        self.state = State.CLOSED
        self.go(State.CLOSED, 0)

    def go(self, state, now, until=None):
        self.state, self.since, self.until = state, now, until
        self.stay = object()
        self.ended = []  # (time, bad, slow) of this stay's calls
        self.out = []  # probes that hold a slot
        if state not in (State.OPEN, State.HALF_OPEN):
            self.in_a_row = 0

    def open(self, now, seconds=None):
        if self.state is State.METRICS_ONLY:
            return
        self.seen["opened"] += 1
        self.in_a_row += 1
        self.go(State.OPEN, now, now + (seconds or self.reset_timeout(self.in_a_row)))

    def pass_time(self, now):
        if self.state is State.HALF_OPEN and self.half_open_timeout and now >= self.since + self.half_open_timeout:
            end = self.since + self.half_open_timeout
            self.open(end) if self.half_open_then is State.OPEN else self.go(State.CLOSED, end)

    def enter(self, now):
        self.pass_time(now)
        if self.state is State.OPEN and now >= self.until:
            self.go(State.HALF_OPEN, now)
        if self.state in (State.CLOSED, State.METRICS_ONLY):
            return ModelCall(self.stay, now)
        if self.state is State.DISABLED:
            return ModelCall("uncounted", now)
        if self.state is State.HALF_OPEN:
            self.out = [call for call in self.out if call.lease > now]
            total = self.permitted_probes or 10**9
            if len(self.out) < self.probes and len(self.out) + len(self.ended) < total:
                self.out.append(ModelCall(self.stay, now, now + self.probe_timeout))
                return self.out[-1]
        self.seen["rejected"] += 1
        return None

    def exit(self, call, now, ending):
        if call.stay == "uncounted":
            return
        self.pass_time(now)
        neither, bad = ending == CANCELLED, ending in (BAD, TOLD)
        slow = not neither and self.slow_call_duration is not None and now - call.began > self.slow_call_duration
        self.seen["neither" if neither else BAD if bad else GOOD] += 1
        self.seen["slow"] += slow
        probe = call.lease is not None
        if call.stay is not self.stay or (probe and call not in self.out):
            return
        if probe:
            self.out.remove(call)
        if not neither:
            self.ended.append((now, bad, slow))
        if ending == TOLD:
            self.open(now, 7)
        elif probe:
            self.judge_round(now)
        elif bad or slow:
            self.judge_calls(now, bad)

    def judge_round(self, now):
        worse = sum(1 for _, bad, slow in self.ended if bad or slow)
        if len(self.ended) - worse >= self.success_threshold:
            self.go(State.CLOSED, now)
        elif worse > (self.permitted_probes or self.success_threshold) - self.success_threshold:
            self.open(now)

    def judge_calls(self, now, bad):
        if bad and self.consecutive_failures and self.row() >= self.consecutive_failures:
            self.open(now)
            return
        recent = self.recent(now)
        if len(recent) < self.minimum_calls:
            return
        share = [sum(one[which] for one in recent) / len(recent) for which in (1, 2)]
        if (bad and share[0] >= self.failure_rate) or (self.slow_call_rate and share[1] >= self.slow_call_rate):
            self.open(now)

    def row(self):
        return len(self.ended) - max((i + 1 for i, (_, bad, _) in enumerate(self.ended) if not bad), default=0)

    def recent(self, now):
        if self.window_calls:
            return self.ended[-self.window_calls :]
        return [one for one in self.ended if one[0] // 1 > now - 10]  # ten slots of a second


class Breakers(RuleBasedStateMachine):
    @initialize(
        window=st.sampled_from([{"window": 10.0}, {"window_calls": 4}, {"window_calls": 7}]),
        slow=st.booleans(),
        consecutive=st.sampled_from([None, 2, 3]),
        probes=st.integers(1, 3),
        threshold=st.integers(1, 3),
        spare=st.sampled_from([None, 0, 1, 2]),
        half_open=st.sampled_from([None, 6]),
        then=st.sampled_from([State.OPEN, State.CLOSED]),
        told=st.booleans(),
    )
    def build(self, window, slow, consecutive, probes, threshold, spare, half_open, then, told):
        rules = {
            "failure_rate": 0.5,
            "minimum_calls": 4,
            "slow_call_rate": 0.6 if slow else None,
            "slow_call_duration": 2.0 if slow else None,
            "consecutive_failures": consecutive,
            "window_calls": window.get("window_calls"),
            "reset_timeout": lambda opened: 3.0 * opened,
            "probes": probes,
            "success_threshold": threshold,
            "permitted_probes": None if spare is None else threshold + spare,
            "probe_timeout": 4.0,
            "half_open_timeout": half_open,
            "half_open_then": then,
        }
        self.now = 0
        self.clock = use_clock(lambda: float(self.now))
        self.clock.__enter__()
        open_for = (lambda outcome: getattr(outcome, "seconds", None)) if told else None
        self.breaker = CircuitBreaker("b", **rules, window=window.get("window"), open_for=open_for)
        self.model = Model(**rules)
        self.told = told
        self.flying = []

    def teardown(self):
        if hasattr(self, "clock"):
            self.clock.__exit__(None, None, None)

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds):
        self.now += seconds

    @rule(times=st.integers(1, 3))
    def start(self, times):
        for _ in range(times):
            expected = self.model.enter(self.now)
            try:
                token = self.breaker.enter(float(self.now))
            except CircuitOpenError:
                assert expected is None
            else:
                assert expected is not None
                self.flying.append((token, expected))

    @rule(which=st.integers(0, 9), ending=st.sampled_from([GOOD, GOOD, BAD, BAD, CANCELLED, TOLD]))
    def finish(self, which, ending):
        if self.flying:
            self.end(*self.flying.pop(which % len(self.flying)), ending)

    @rule(ending=st.sampled_from([GOOD, BAD, BAD]), took=st.sampled_from([0, 0, 3]))
    def call(self, ending, took):
        self.start(1)
        if self.flying:
            self.now += took
            self.end(*self.flying.pop(), ending)

    def end(self, token, expected, ending):
        ending = BAD if ending == TOLD and not self.told else ending
        error = {GOOD: None, BAD: OSError(), CANCELLED: CancelledError(), TOLD: ToldToWaitError()}[ending]
        if self.breaker.judges:
            self.breaker.judge(token, None, error)
        self.breaker.exit(token, float(self.now), error)
        self.model.exit(expected, self.now, ending)

    @rule(what=st.sampled_from(sorted(BY_HAND)), sure=st.integers(0, 3))
    def by_hand(self, what, sure):
        if sure:  # mostly leave it alone
            return
        getattr(self.breaker, what)()
        if what == "force_open":
            self.model.state = State.OPEN if self.model.state is State.METRICS_ONLY else self.model.state
            self.model.open(self.now)
        elif what != "force_closed" or self.model.state is not State.CLOSED:
            self.model.go(BY_HAND[what], self.now)

    @invariant()
    def agree(self):
        if not hasattr(self, "model"):
            return
        seen, model = self.breaker.snapshot(), self.model
        assert seen.state is model.state
        assert model.seen == {
            GOOD: seen.successes,
            BAD: seen.failures,
            "neither": seen.neither,
            "rejected": seen.rejections,
            "slow": seen.slow,
            "opened": seen.opened,
        }
        assert seen.opened_in_a_row == model.in_a_row
        assert seen.probes == len(model.out) <= model.probes
        if model.state in (State.CLOSED, State.METRICS_ONLY):
            recent = model.recent(self.now)
            rate = sum(bad for _, bad, _ in recent) / len(recent) if len(recent) >= model.minimum_calls else None
            assert seen.failure_rate == rate
            assert seen.consecutive_failures == model.row()


TestBreakers = Breakers.TestCase
TestBreakers.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
