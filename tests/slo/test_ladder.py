"""A ladder comes down after its hold, whichever hold it was told last."""

from __future__ import annotations

import pytest

from seawall.slo.ladder import Ladder


def climbed():
    ladder = Ladder(3, step_up=10.0, hold=300.0, minimum_calls=10)
    ladder.judge(0.0, alert=True, factor=10.0, good=0, bad=0, tolerated=0.001)
    assert ladder.judge(10.0, alert=True, factor=10.0, good=0, bad=100, tolerated=0.001) == 1
    return ladder


def level_at(ladder, now, good):
    return ladder.judge(now, alert=False, factor=10.0, good=good, bad=100, tolerated=0.001)


@pytest.mark.parametrize("hold", [50.0, 600.0])
def test_another_hold_holds_for_a_ladder_that_is_up_already(hold):
    ladder = climbed()
    ladder.configure(step_up=10.0, hold=hold, minimum_calls=10)
    level_at(ladder, 20.0, 1000)
    assert level_at(ladder, 10.0 + hold - 1, 2000) == 1
    assert level_at(ladder, 30.0 + hold, 3000) == 0


def test_the_same_hold_again_keeps_one_that_a_relapse_made_longer():
    ladder = climbed()
    ladder.hold = 600.0
    ladder.configure(step_up=5.0, hold=300.0, minimum_calls=20)
    assert (ladder.hold, ladder.step_up, ladder.minimum_calls) == (600.0, 5.0, 20)


@pytest.mark.parametrize(("bad", "level"), [(1, 1), (2, 2)])
def test_one_bad_call_that_was_in_flight_takes_no_further_step(bad, level):
    ladder = climbed()
    assert ladder.judge(20.0, alert=True, factor=6.0, good=100, bad=100 + bad, tolerated=0.001) == level
