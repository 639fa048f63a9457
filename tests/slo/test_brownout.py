"""A ladder goes up quickly and comes down slowly, and what it changed it puts back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import SLO, CircuitOpenError, LoadShedder, Priority, RetryBudget, listen, priority, use_clock
from seawall.slo.brownout import Adjust, BrownedOutError, BrownOut, BrownOutStepped, Refuse, Run, Shed
from seawall.slo.ladder import Ladder
from seawall.testing import VirtualClock

STEP, HOLD = 15.0, 300.0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 120), st.booleans(), st.integers(0, 50), st.integers(0, 50)), max_size=200))
def test_a_ladder_never_swings(looks):
    ladder = Ladder(4, step_up=STEP, hold=HOLD, minimum_calls=5)
    now, good, bad, changes = 0.0, 0, 0, []
    for pause, alert, goods, bads in looks:
        now, good, bad = now + pause, good + goods, bad + bads
        before = ladder.level
        after = ladder.judge(now, alert=alert, factor=6.0, good=good, bad=bad, tolerated=0.01)
        assert 0 <= after <= 4
        assert after - before <= 1
        if after != before:
            changes.append((now, after > before))
            assert alert or after < before
    for (earlier, _), (later, up) in itertools.pairwise(changes):
        assert later - earlier >= (STEP if up else 0)
        if not up and dict(changes).get(earlier):
            assert later - earlier >= HOLD
    ups = [at for at, up in changes if up]
    downs = [at for at, up in changes if not up]
    for at in downs:  # a step down that was followed by one up has a whole hold before the next
        again = [up for up in ups if up > at]
        if again:
            assert all(down - again[0] >= HOLD for down in downs if down > again[0])


def burning(*steps, target=0.99, **wanted):
    dimmer = BrownOut("answers", list(steps), step_up=STEP, hold=HOLD, **wanted)
    return dimmer, SLO("answers", target=target, actions=[dimmer])


def load(clock, slo, dimmer, seconds, failing, levels=None, per_second=5):
    for _ in range(int(seconds * per_second)):
        clock.advance(1 / per_second)
        try:
            with slo.scope(), dimmer.scope():
                if failing():
                    raise OSError
        except (OSError, BrownedOutError):
            pass
        if levels is not None and (not levels or levels[-1][1] != dimmer.level):
            levels.append((clock(), dimmer.level))


def test_it_climbs_while_the_budget_burns_and_comes_back_when_it_is_over():
    clock, heard, ran = VirtualClock(), [], []
    steps = [Run(lambda: ran.append("on"), lambda: ran.append("off")), Shed(0.3), Refuse()]
    with use_clock(clock):
        dimmer, slo = burning(*steps)
        stop = listen(lambda event: heard.append(event) if isinstance(event, BrownOutStepped) else None)
        load(clock, slo, dimmer, 3600, lambda: False)
        assert dimmer.level == 0
        began = clock()
        load(clock, slo, dimmer, 900, lambda: True)
        assert heard[0].at - began < 600
        assert [event.level for event in heard][:3] == [1, 2, 3]
        assert all(later.at - earlier.at >= STEP for earlier, later in itertools.pairwise(heard[:3]))
        assert ran[0] == "on"
        load(clock, slo, dimmer, 7200, lambda: False)
        stop()
    assert dimmer.level == 0
    assert ran[-1] == "off"
    assert dimmer.gauges() == {"level": 0.0}
    assert dimmer.snapshot().steps_up == dimmer.snapshot().steps_down >= 3


def test_a_step_that_helps_is_the_last_one():
    clock = VirtualClock()
    with use_clock(clock):
        dimmer, slo = burning(*(Run(lambda: None) for _ in range(4)))
        load(clock, slo, dimmer, 3600, lambda: False)
        load(clock, slo, dimmer, 1800, lambda: dimmer.level == 0)
    assert 1 == max(1, dimmer.level)
    assert dimmer.snapshot().steps_up <= 3


def test_refusing_everybody_does_not_keep_it_refusing():
    clock = VirtualClock()
    with use_clock(clock):
        dimmer, slo = burning(Refuse())
        load(clock, slo, dimmer, 3600, lambda: False)
        load(clock, slo, dimmer, 900, lambda: True)
        assert dimmer.snapshot().refused
        load(clock, slo, dimmer, 3600, lambda: False)
        assert dimmer.level == 0
        assert slo.snapshot().bad > dimmer.snapshot().refused


def test_critical_calls_are_not_refused():
    dimmer = BrownOut("answers", [Refuse()])
    with use_clock(lambda: 1.0):
        dimmer._go_to(1, 1.0, frozenset())
        with pytest.raises(BrownedOutError) as caught:
            dimmer.admit()
        assert (caught.value.policy, caught.value.retry_after, caught.value.sheds) == ("answers", 300.0, True)
        with priority(Priority.CRITICAL):
            dimmer.admit().success()
    assert dimmer.counters() == {"served": 1, "rejected": 1}
    assert not CircuitOpenError("b").sheds


def test_adjusted_settings_come_back_unless_somebody_changed_them():
    budget = RetryBudget("payments", ratio=0.2, floor=2.0)
    step = Adjust(budget, ratio=0.02, floor=0)
    step.engage()
    assert (budget.ratio, budget.floor) == (0.02, 0)
    budget.update(floor=5)
    step.release()
    assert (budget.ratio, budget.floor) == (0.2, 5)


def test_a_shedder_sheds_while_the_step_holds():
    clock, half = VirtualClock(), Shed(0.5)
    with use_clock(clock):
        front = LoadShedder("front", failure_rate=None, signals=[half])
        half.engage()
        for _ in range(200):
            clock.advance(0.05)
            try:
                front.admit().success()
            except Exception:
                continue
        assert front.snapshot().rate == 0.5
        assert 50 < front.snapshot().rejections < 150


def test_a_step_that_fails_is_logged_and_the_rest_goes_on(caplog):
    ran = []
    with use_clock(lambda: 1.0):
        dimmer = BrownOut("answers", [Run(lambda: 1 / 0), Run(lambda: ran.append(2))])
        dimmer._go_to(2, 1.0, frozenset())
        dimmer.admit().success()
    assert ran == [2]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("ladder", "kwargs", "rule"),
    [
        ([], {}, "ladder must have a step or more"),
        ([print], {}, "ladder must hold steps"),
        (3, {}, "ladder must be an iterable"),
        ([Refuse()], {"severity": "red"}, "severity must be one of page, ticket, got 'red'"),
        ([Refuse()], {"hold": 0}, "hold must be more than 0"),
    ],
)
def test_a_bad_setting_is_refused(ladder, kwargs, rule):
    with pytest.raises((TypeError, ValueError), match=rule):
        BrownOut("answers", ladder, **kwargs)


def test_what_can_not_be_adjusted_is_refused():
    with pytest.raises(TypeError, match="ratoi"):
        Adjust(RetryBudget("payments"), ratoi=1)
    with pytest.raises(TypeError, match="update"):
        Adjust(object(), ratio=1)
