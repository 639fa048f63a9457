"""The retry budget against a model that remembers everything and counts it anew each time."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seawall import use_clock
from seawall.policies.retry_budget import RetryBudget

_SLOTS = 10


class Model:
    """Lists of when calls and extra attempts began. The window is whole slots: the one in progress and nine before."""

    def __init__(self, ratio, floor, window):
        self.ratio, self.floor, self.window = ratio, floor, window
        self.calls, self.extras = [], []
        self.in_flight = self.extra_in_flight = 0

    def recent(self, moments, now):
        slot = self.window / _SLOTS
        return sum(math.floor(moment / slot) > math.floor(now / slot) - _SLOTS for moment in moments)

    def balance(self, now):
        if self.window is None:
            return max(self.floor, self.ratio * self.in_flight) - self.extra_in_flight
        earned = self.ratio * self.recent(self.calls, now)
        return self.floor * self.window + earned - self.recent(self.extras, now)


class BudgetMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now = 0.0

    @initialize(
        ratio=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
        floor=st.sampled_from([0.0, 0.5, 2.0]),
        window=st.sampled_from([None, 1.0, 10.0]),
    )
    def begin(self, ratio, floor, window):
        self.budget = RetryBudget("b", ratio=ratio, floor=floor, window=window)
        self.model = Model(ratio, floor, window)

    @rule(seconds=st.integers(1, 100).map(lambda eighths: eighths / 8))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(count=st.integers(1, 8))
    def calls_begin(self, count):
        for _ in range(count):
            self.budget.call_began(self.now)
            self.model.calls.append(self.now)
            self.model.in_flight += 1

    @precondition(lambda self: self.model.in_flight)
    @rule()
    def a_call_ends(self):
        self.budget.call_ended()
        self.model.in_flight -= 1

    @rule(count=st.integers(1, 4))
    def more_attempts_are_asked_for(self, count):
        for _ in range(count):
            may = self.model.balance(self.now) > 1 - 1e-9
            assert self.budget.allow_extra(self.now) is may
            if may:
                self.model.extras.append(self.now)
                self.model.extra_in_flight += 1

    @precondition(lambda self: self.model.extra_in_flight)
    @rule()
    def an_extra_attempt_ends(self):
        self.budget.extra_ended()
        self.model.extra_in_flight -= 1

    @invariant()
    def both_say_the_same(self):
        if not hasattr(self, "budget"):
            return
        with use_clock(lambda: self.now):
            snapshot = self.budget.snapshot()
        assert abs(snapshot.balance - max(0.0, self.model.balance(self.now))) < 1e-6
        assert (snapshot.calls, snapshot.extras) == (len(self.model.calls), len(self.model.extras))
        assert (snapshot.in_flight, snapshot.extra_in_flight) == (self.model.in_flight, self.model.extra_in_flight)
        if self.model.window is not None:
            most = self.model.floor * self.model.window + self.model.ratio * len(self.model.calls)
            recent = self.model.recent(self.model.extras, self.now)
            assert recent <= most + 1


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
