"""Budgets and burn rates against a list of every call ever made, and alerts against the workbook."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import SLO, listen, use_clock
from seawall.slo.alerts import BurnAlertFired, BurnAlertResolved
from seawall.slo.objective import BudgetExhausted
from seawall.slo.sketch import LatencySketch, RollingSketch
from seawall.slo.tracker import BudgetTracker
from seawall.slo.windows import DAY, HOUR, MINUTE, MONTH, duration, pairs_for
from seawall.testing import VirtualClock


def test_the_four_pairs_are_the_workbooks():
    found = [(pair.severity, pair.long, pair.short, pair.factor) for pair in pairs_for(MONTH)]
    assert found == [
        ("page", HOUR, 5 * MINUTE, 14.4),
        ("page", 6 * HOUR, 30 * MINUTE, 6.0),
        ("ticket", DAY, 2 * HOUR, 3.0),
        ("ticket", 3 * DAY, 6 * HOUR, 1.0),
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 4 * HOUR), st.booleans()), max_size=60),
    st.sampled_from([5 * MINUTE, HOUR, 6 * HOUR, 3 * DAY, MONTH]),
)
def test_a_look_back_is_right_to_within_one_slot(calls, seconds):
    tracker, now, all_calls = BudgetTracker(MONTH), 1000.0, []
    for pause, bad in calls:
        now += pause
        tracker.add(now, bad=bad)
        all_calls.append((now, bad))
    slot = next(slot for limit, slot in ((HOUR, 10.0), (DAY, 300.0), (MONTH, HOUR)) if seconds <= limit)
    found = tracker.since(now, seconds)
    for kind in (False, True):
        least = sum(at > now - seconds + slot for at, bad in all_calls if bad is kind)
        most = sum(at >= now - seconds - slot for at, bad in all_calls if bad is kind)
        assert least <= found[kind] <= most


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, HOUR), st.booleans()), max_size=40), st.floats(0, DAY), st.floats(0, 1e6))
def test_what_an_earlier_process_counted_is_there_for_the_next_one(calls, ago, start):
    first, now = BudgetTracker(MONTH), 50.0
    for pause, bad in calls:
        now += pause
        first.add(now, bad=bad)
    second = BudgetTracker(MONTH)
    second.restore(first.state(now), start, ago)
    good, bad = second.since(start, MONTH)
    assert (good, bad) == first.since(now, MONTH)  # nothing is a month old
    assert second.counts == [0, 0]
    assert second.covered(start) == pytest.approx(first.covered(now) + (ago if first.covered(now) else 0), abs=1e-3)


def test_a_state_of_other_slots_is_refused():
    tracker = BudgetTracker(7 * DAY)
    with pytest.raises(ValueError, match="slots"):
        BudgetTracker(MONTH).restore(tracker.state(0.0), 0.0, 0.0)


def test_the_budget_runs_out_when_it_is_said_to():
    tracker, tolerated = BudgetTracker(MONTH), 0.001
    for second in range(int(HOUR)):
        tracker.add(float(second), bad=second % 100 == 0)  # ten times what is tolerated
    left = tracker.exhausted_in(HOUR, tolerated)
    assert left == 0.0  # of the calls so far it has used all
    calm = BudgetTracker(MONTH)
    for second in range(int(HOUR)):
        calm.add(float(second))
    assert calm.exhausted_in(HOUR, tolerated) == math.inf


class Watched:
    """An SLO under a scripted load, on a clock of ours."""

    def __init__(self, **settings):
        self.clock = VirtualClock()
        self.events = []
        with use_clock(self.clock):
            self.slo = SLO("answers", **{"target": 0.999, **settings})

    def run(self, seconds, error_rate, *, per_second=10, rng=None):
        rng = rng or random.Random(1)
        step = 1 / per_second
        with use_clock(self.clock):
            stop = listen(self.events.append)
            try:
                for _ in range(int(seconds * per_second)):
                    self.clock.advance(step)
                    try:
                        with self.slo.scope():
                            if rng.random() < error_rate:
                                raise OSError
                    except OSError:
                        pass
            finally:
                stop()
        return self

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def test_a_total_outage_pages_within_a_minute():
    watched = Watched().run(2 * HOUR, 0.0, per_second=2)
    began = watched.clock()
    watched.run(60, 1.0)
    quickest = next(event for event in watched.of(BurnAlertFired) if event.long == HOUR)
    assert quickest.at - began <= 60
    assert (quickest.severity, quickest.short, quickest.factor) == ("page", 5 * MINUTE, 14.4)


def test_half_the_tolerated_error_rate_never_pages():
    watched = Watched().run(12 * HOUR, 0.0005, per_second=5)
    assert watched.of(BurnAlertFired) == []


def test_an_alert_ends_soon_after_its_cause():
    watched = Watched().run(2 * HOUR, 0.0, per_second=2).run(5 * MINUTE, 1.0).run(10 * MINUTE, 0.0)
    quick = [event for event in watched.of(BurnAlertResolved) if event.short == 5 * MINUTE]
    assert len(quick) == 1
    with use_clock(watched.clock):
        assert watched.slo.severity == "page"  # the slower pair still sees it
    watched.run(HOUR, 0.0)
    assert {event.short for event in watched.of(BurnAlertResolved)} >= {5 * MINUTE, 30 * MINUTE}


def test_few_calls_wake_nobody():
    watched = Watched(minimum_calls=10).run(9, 1.0, per_second=1)
    assert watched.of(BurnAlertFired) == []


def test_an_exhausted_budget_is_told_once():
    watched = Watched().run(HOUR, 0.01)
    assert len(watched.of(BudgetExhausted)) == 1
    with use_clock(watched.clock):
        assert watched.slo.exhausted_in() == 0.0
        assert watched.slo.error_budget <= 0


def test_an_action_hears_how_the_budget_burns_and_can_not_break_a_call():
    heard = []

    class Action:
        def observe(self, source, burn):
            heard.append((source.name, burn.severities, burn.bad))
            raise RuntimeError("mine")

    watched = Watched(actions=[Action()]).run(2 * HOUR, 0.0, per_second=1).run(60, 1.0)
    assert heard[-1][0] == "answers"
    assert heard[-1][1] == {"page", "ticket"}
    with use_clock(watched.clock):
        assert watched.slo.snapshot().bad == 600


@pytest.mark.parametrize("actions", [3, [object()]])
def test_an_action_that_can_not_be_told_is_refused(actions):
    with pytest.raises(TypeError, match="actions"):
        SLO("answers", target=0.9, actions=actions)


def test_a_restart_does_not_forget():
    before = Watched().run(HOUR, 0.02)
    with use_clock(before.clock):
        state, budget = before.slo.state(), before.slo.error_budget
    after = Watched()
    with use_clock(after.clock):
        after.slo.restore(state, ago=30.0)
        assert after.slo.error_budget == pytest.approx(budget)
        assert after.slo.snapshot().bad == 0
    with pytest.raises(ValueError, match="window"):
        Watched(window=7 * DAY).slo.restore(state)


# Percentiles


@settings(max_examples=100)
@given(st.lists(st.floats(1e-5, 3599.0), min_size=1, max_size=200), st.floats(0, 1))
def test_every_percentile_is_right_to_within_two_percent(values, share):
    sketch = LatencySketch()
    for value in values:
        sketch.add(value)
    exact = sorted(values)[max(1, math.ceil(share * len(values) - 1e-9)) - 1]
    assert sketch.percentile(share) == pytest.approx(exact, rel=0.02)


@given(st.lists(st.floats(0, 1e9)), st.lists(st.floats(0, 1e9)))
def test_sketches_add_up(left, right):
    apart, whole = [LatencySketch(), LatencySketch()], LatencySketch()
    for part, values in zip(apart, (left, right), strict=True):
        for value in values:
            part.add(value)
            whole.add(value)
    apart[0].merge(apart[1])
    assert len(apart[0]) == len(whole) == len(left) + len(right)
    if left or right:
        assert apart[0].percentile(0.5) == whole.percentile(0.5)


def test_old_latencies_are_forgotten():
    recent = RollingSketch(3600.0)
    recent.add(0.0, 9.0)
    for minute in range(1, 180):
        recent.add(60.0 * minute, 0.1)
    assert recent.merged(180 * 60.0).percentile(1.0) == pytest.approx(0.1, rel=0.02)


def test_an_slo_keeps_percentiles_only_if_asked():
    with pytest.raises(RuntimeError, match="percentiles=True"):
        SLO("answers", target=0.9).latency_percentile(0.5)
    watched = Watched(percentiles=True).run(10, 0.0)
    with use_clock(watched.clock):
        assert watched.slo.latency_percentile(0.5) == pytest.approx(1e-5, rel=0.03)  # a virtual call takes no time


@given(st.integers(0, 10**9))
def test_a_duration_is_written_so_that_it_reads_back(milliseconds):
    units = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
    import re

    found = re.findall(r"(\d+)(ms|[dhms])", duration(milliseconds / 1000))
    assert sum(int(amount) * units[unit] for amount, unit in found) == milliseconds
