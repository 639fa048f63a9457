"""A bulkhead agrees with a list of who waits and a sum of what is in, over any history."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seawall import Bulkhead, BulkheadFullError, Wait
from seawall.core.ambient import Priority, priority

AGING, MAX_WAIT, QUEUE = 1.0, 4.0, 3  # with halves of seconds, so that nothing is rounded


@dataclass
class Sleeper:
    alive: bool = True

    def ring(self):
        return self.alive


@dataclass(eq=False)
class Call:
    cost: int
    level: int
    since: float
    wait: Wait | None = None
    token: object = None
    sleeper: Sleeper = field(default_factory=Sleeper)

    def weight(self, now):
        """Who has the most is served first: its priority, and a level more for each `AGING` seconds it waited."""
        return self.level + (now - self.since) / AGING

    def rank(self, now):
        """As much for both, the higher priority is first."""
        return self.weight(now), self.level


class BulkheadMachine(RuleBasedStateMachine):
    @initialize(limit=st.integers(1, 5))
    def begin(self, limit):
        self.guard = Bulkhead("k", max_concurrent=limit, max_queued=QUEUE, max_wait=MAX_WAIT, aging=AGING)
        self.now = 0.0
        self.limit = limit
        self.waiting = []  # in the order they came
        self.granted = []  # have a place and do not know it yet
        self.inside = []
        self.rejections = self.finished = 0
        self.next_sweep = 0.0

    # The model

    def taken(self):
        return sum(call.cost for call in self.granted + self.inside)

    def fits(self, call):
        return self.taken() + call.cost <= self.limit or self.taken() == 0

    def serve(self):
        while self.waiting:
            first = max(self.waiting, key=lambda call: call.rank(self.now))
            if not self.fits(first):
                return
            self.waiting.remove(first)
            if first.sleeper.alive:
                self.granted.append(first)

    def make_room(self, call):
        """What a full queue does with a newcomer; None refuses it."""
        if self.now >= self.next_sweep:
            self.next_sweep = self.now + 1.0
            dead = [one for one in self.waiting if not one.sleeper.alive]
            self.waiting = [one for one in self.waiting if one.sleeper.alive]
            if dead:
                return "queue"
        weights = [one.weight(self.now) for one in self.waiting]
        if call.weight(self.now) <= min(weights):
            return None
        if call.rank(self.now) > max(one.rank(self.now) for one in self.waiting) and self.fits(call):
            return "at once"
        last = [one for one in self.waiting if one.weight(self.now) == min(weights)]
        self.displaced = min(reversed(last), key=lambda one: one.level)
        self.waiting.remove(self.displaced)
        return "displace"

    # What happens

    @rule(cost=st.integers(1, 5), level=st.sampled_from(Priority))
    def a_call_comes(self, cost, level):
        call = Call(min(cost, self.limit), int(level), self.now)
        if not self.waiting and self.fits(call):
            expected = "at once"
        else:
            expected = "queue" if len(self.waiting) < QUEUE else self.make_room(call)
        try:
            with priority(level):
                call.token = self.guard.enter(self.now) if call.cost == 1 else self.guard.enter_at(self.now, call.cost)
        except BulkheadFullError:
            assert expected is None
            self.rejections += 1
            return
        except Wait as wait:
            wait.sleeper = call.sleeper
            if wait.begin is not None:
                wait.begin()
            call.wait = wait
        if expected == "at once":
            assert call.wait is None
            self.inside.append(call)
            return
        self.waiting.append(call)
        self.serve()
        if call in self.granted:  # it was first, so it need not even wait
            assert call.wait is None
            self.granted.remove(call)
            self.inside.append(call)
        else:
            assert call.wait is not None
        if expected == "displace":
            with pytest.raises(BulkheadFullError):
                self.displaced.wait.resume(self.now)
            self.rejections += 1

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def a_call_ends(self, data):
        call = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        self.guard.exit(call.token, self.now, None)
        self.finished += 1
        self.serve()

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), resumed=st.booleans())
    def a_waiter_finds_its_place(self, data, resumed):
        call = self.granted.pop(data.draw(st.integers(0, len(self.granted) - 1)))
        call.token = call.wait.resume(self.now) if resumed else call.wait.token
        self.inside.append(call)

    @precondition(lambda self: self.granted + self.waiting)
    @rule(data=st.data())
    def a_waiter_is_cancelled(self, data):
        call = data.draw(st.sampled_from(self.granted + self.waiting))
        call.wait.abandon(self.now)
        (self.granted if call in self.granted else self.waiting).remove(call)
        self.serve()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def the_loop_of_a_waiter_dies(self, data):
        data.draw(st.sampled_from(self.waiting)).sleeper.alive = False

    @rule(half_seconds=st.integers(1, 6))
    def time_passes(self, half_seconds):
        self.now += half_seconds / 2
        for call in list(self.waiting):
            if call in self.waiting and call.sleeper.alive and call.since + MAX_WAIT <= self.now:
                self.waiting.remove(call)
                with pytest.raises(BulkheadFullError):
                    call.wait.resume(self.now)
                self.rejections += 1
                self.serve()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def a_waiter_wakes_for_nothing(self, data):
        call = data.draw(st.sampled_from(self.waiting))
        if call.since + MAX_WAIT > self.now:
            with pytest.raises(Wait):
                call.wait.resume(self.now)

    @rule(limit=st.integers(1, 5))
    def the_limit_changes(self, limit):
        self.limit = limit
        self.guard.resize(limit, self.now)
        self.serve()

    # What must hold

    @invariant()
    def both_agree(self):
        seen = self.guard.snapshot()
        assert (seen.active, seen.waiting, seen.limit) == (self.taken(), len(self.waiting), self.limit)
        assert (seen.finished, seen.rejections) == (self.finished, self.rejections)
        assert all(call.wait.granted for call in self.granted)
        assert not any(call.wait.granted for call in self.waiting)

    def teardown(self):
        for call in self.waiting + self.granted:
            call.wait.abandon(self.now)
        for call in self.inside:
            self.guard.exit(call.token, self.now, None)
        assert (self.guard.snapshot().active, self.guard.snapshot().waiting) == (0, 0)


TestBulkhead = BulkheadMachine.TestCase
TestBulkhead.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
