"""The limiter against a model that anybody can check: the list of what started, and when."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seawall import RateLimitedError, RateLimiter, Wait, use_clock

CLOSE = 1e-5  # the limiter lets a call start a microsecond early, for clocks are not exact


def ask(enter, now):
    try:
        return enter(now)
    except (RateLimitedError, Wait) as answer:
        return answer


class Bell:
    def __init__(self):
        self.rung = False

    def ring(self):
        self.rung = True
        return True


class Machine(RuleBasedStateMachine):
    """Calls of several costs come, wait, give up and reserve; time passes; each wakes when it said, or is rung."""

    algorithm = "gcra"
    rate, per, burst, max_wait = 2.0, 1.0, 4, 3.0
    late = 0.0  # by which a turn may come late

    @initialize()
    def build(self):
        self.now = 0.0
        burst = {"burst": self.burst} if self.burst else {}
        self.limiter = RateLimiter(
            "r", rate=self.rate, per=self.per, algorithm=self.algorithm, max_wait=self.max_wait, **burst
        )
        self.started = []  # [when, cost]
        self.waits = []  # in order of arrival, with their costs
        self.reserved = []  # reservations and their records
        self.charged = False  # turns were taken away from those who wait
        self.sure = True  # else the limiter may let calls start later: it can't know what a late refund is worth

    def earliest(self, cost):
        """When a call may start, by the definition of a bucket that refills evenly."""
        start, behind = self.now, 0
        for when, paid in reversed(self.started):
            behind += paid
            start = max(start, when + (behind + cost - self.burst) * self.per / self.rate)
        return start

    def start(self, cost):
        assert self.earliest(cost) <= self.now + CLOSE, "it started before it might"
        record = [self.now, cost]
        self.started.append(record)
        return record

    def check_time(self, cost, start):
        earliest = self.earliest(cost)
        assert start >= earliest - CLOSE
        if self.sure:
            assert start <= earliest + self.late + CLOSE

    @rule(cost=st.integers(1, 4))
    def call(self, cost):
        view = self.limiter if cost == 1 else self.limiter.costing(cost)
        answer = ask(view.enter, self.now)
        if isinstance(answer, RateLimitedError):
            assert answer.retry_after > 0
            if not self.waits:
                assert answer.retry_after > self.max_wait
                self.check_time(cost, self.now + answer.retry_after)
        elif isinstance(answer, Wait):
            answer.sleeper = Bell()
            self.waits.append((answer, cost, self.now))
            assert answer.until <= self.now + self.max_wait + CLOSE
            if len(self.waits) == 1:
                assert answer.until > self.now
                self.check_time(cost, answer.until)
        else:
            assert not self.waits, "it overtook"
            self.start(cost)

    @precondition(lambda self: not self.waits)
    @rule(cost=st.integers(1, 4))
    def reserve(self, cost):
        with use_clock(lambda: self.now):
            before, self.limiter.max_wait = self.limiter.max_wait, 0.0
            try:
                reservation = self.limiter.reserve(cost)
            except RateLimitedError as refused:
                self.check_time(cost, self.now + refused.retry_after)
            else:
                self.reserved.append((reservation, self.start(cost)))
                self.sure = self.sure and len(self.reserved) == 1
            finally:
                self.limiter.max_wait = before

    @precondition(lambda self: self.reserved)
    @rule(which=st.integers(0, 9), actual=st.integers(0, 6))
    def settle(self, which, actual):
        reservation, record = self.reserved.pop(which % len(self.reserved))
        with use_clock(lambda: self.now):
            reservation.settle(actual)
        self.charged = self.charged or actual > record[1]
        self.sure = self.sure and not 0 < actual < record[1]
        self.started.append([self.now, max(0, actual - record[1])])
        record[1] = min(record[1], actual)

    @precondition(lambda self: self.waits)
    @rule(which=st.integers(0, 9))
    def give_up(self, which):
        wait, *_ = self.waits.pop(which % len(self.waits))
        wait.abandon(self.now)

    @rule(seconds=st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 3)))
    def time_passes(self, seconds):
        then = self.now + seconds
        for _ in range(200):
            awake = [
                (self.now if wait.sleeper.rung else max(self.now, wait.until), place)
                for place, (wait, *_) in enumerate(self.waits)
                if wait.sleeper.rung or wait.until <= then
            ]
            if not awake:
                break
            self.now, place = min(awake)
            self.resume(place)
        else:
            raise AssertionError("somebody wakes again and again")
        self.now = then
        with use_clock(lambda: self.now):
            if not self.reserved and self.limiter.at_rest(self.now):
                self.sure = True

    def resume(self, place):
        wait, cost, since = self.waits[place]
        wait.sleeper.rung = False
        answer = ask(wait.resume, self.now)
        if isinstance(answer, Wait):
            assert answer is wait
            return
        self.waits.pop(place)
        if isinstance(answer, RateLimitedError):
            assert self.charged, "it was promised a turn in time"
        else:
            assert place == 0, "it overtook"
            assert self.now <= since + self.max_wait + CLOSE
            self.start(cost)

    @invariant()
    def the_first_is_not_forgotten(self):
        if self.waits:
            wait, cost, _ = self.waits[0]
            if self.sure and self.earliest(cost) + self.late < self.now - CLOSE:
                assert wait.sleeper.rung or wait.until <= self.now + CLOSE
        with use_clock(lambda: self.now):
            assert self.limiter.snapshot().waiting == len(self.waits)


class FixedWindow(Machine):
    algorithm, burst = "fixed_window", None
    rate = 4.0

    def earliest(self, cost):
        if not self.started:
            return self.now
        first = self.started[0][0]
        window = first + math.floor((self.now + 1e-6 - first) / self.per) * self.per
        used = sum(paid for when, paid in self.started if when >= window - 1e-6)
        return self.now if used + cost <= self.rate else window + self.per


class SlidingWindow(Machine):
    algorithm, burst = "sliding_window", None
    rate = 4.0
    late = 1 / 32

    def earliest(self, cost):
        ends = [self.now, *(when + self.per for when, _ in self.started if when + self.per > self.now)]
        return min(end for end in ends if self.used(end) + cost <= self.rate or end == max(ends))

    def used(self, at):
        return sum(paid for when, paid in self.started if when > at - self.per + 1e-6)


for machine in (Machine, FixedWindow, SlidingWindow):
    machine.TestCase.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestTheBucketIsTheModel = Machine.TestCase
TestTheFixedWindowIsTheModel = FixedWindow.TestCase
TestTheSlidingWindowIsTheModelButASlot = SlidingWindow.TestCase
