from __future__ import annotations

import math
import threading
from datetime import timedelta

import pytest

from seawall import use_clock
from seawall.policies import retry
from seawall.policies.retry_budget import RetryBudget, RetryBudgetExhausted
from seawall.testing import VirtualClock


def budget(**settings):
    return RetryBudget("b", **settings)


def began(one, calls, at=0.0):
    for _ in range(calls):
        one.call_began(at)
    return one


def granted(one, asked, at=0.0):
    return sum(one.allow_extra(at) for _ in range(asked))


def test_extra_attempts_are_a_share_of_the_calls():
    assert granted(began(budget(ratio=0.2, floor=0), 50), 50) == 10


@pytest.mark.parametrize("ratio", [0.01, 0.07, 0.1, 0.29, 0.58, 1.0])
def test_a_share_is_exact_though_floats_are_not(ratio):
    assert granted(began(budget(ratio=ratio, floor=0), 100), 200) == round(100 * ratio)


def test_where_calls_are_few_the_floor_holds_for_each_second_of_the_window():
    assert granted(budget(floor=0.5, window=10.0), 50) == 5
    assert granted(budget(), 50) == 10


def test_calls_and_extra_attempts_are_forgotten_when_the_window_has_passed():
    one = began(budget(ratio=0.2, floor=0, window=10.0), 50)
    assert granted(one, 50, at=5.0) == 10
    assert granted(one, 50, at=9.0) == 0
    began(one, 10, at=9.5)
    assert granted(one, 50, at=10.5) == 0  # the 50 calls are gone, the 10 extra attempts of 5.0 are not
    assert granted(one, 50, at=15.5) == 2
    assert granted(one, 50, at=40.0) == 0


def test_what_is_in_flight_counts_where_there_is_no_window():
    one = began(budget(window=None, ratio=0.2, floor=1), 20)
    assert granted(one, 50) == 4
    one.extra_ended()
    assert granted(one, 50) == 1
    for _ in range(20):
        one.call_ended()
    for _ in range(4):
        one.extra_ended()
    assert granted(one, 50) == 1
    assert granted(budget(window=None), 50) == 3


def test_exhaustion_suppresses_only_the_new_attempt():
    one = budget(window=None, floor=1)
    assert one.allow_extra(0.0)
    assert not one.allow_extra(0.0)
    assert one.snapshot().extra_in_flight == 1


def test_the_first_refusal_after_an_allowance_is_an_event():
    heard = []
    one = budget(window=None, floor=1, listeners=[heard.append])
    assert granted(one, 5, at=7.0) == 1
    one.extra_ended()
    assert granted(one, 5, at=8.0) == 1
    assert heard == [RetryBudgetExhausted("b", 7.0, 0.2), RetryBudgetExhausted("b", 8.0, 0.2)]


def test_a_listener_may_ask_the_budget():
    heard = []
    one = budget(window=None, floor=1, listeners=[lambda event: heard.append(one.allow_extra(9.0))])
    assert granted(one, 2) == 1
    assert heard == [False]


def test_it_tells_its_counts():
    with use_clock(VirtualClock()):
        one = began(budget(ratio=0.5, floor=0), 5)
        assert granted(one, 4) == 2
        one.call_ended()
        assert one.counters() == {"first": 5, "extra": 2, "refused": 2}
        assert one.gauges() == {"balance": 0.5, "in_flight": 4, "extra_in_flight": 2}


def test_settings_change_and_nothing_is_forgotten():
    with use_clock(VirtualClock()):
        one = began(budget(ratio=0.2, floor=0), 10)
        assert granted(one, 5) == 2
        one.update(ratio=0.5)
        assert granted(one, 5) == 3
        one.update(window=None, floor=6)
        assert granted(one, 5) == 1
        one.update(window=timedelta(seconds=20), floor=None)
        assert (one.ratio, one.floor, one.window) == (0.5, None, 20.0)
        assert granted(one, 50) == 20


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0},
        {"ratio": 20},
        {"ratio": math.nan},
        {"ratio": True},
        {"floor": -1},
        {"floor": math.inf},
        {"floor": math.nan},
        {"floor": "3"},
        {"window": 0},
        {"window": 1e-310},
        {"window": math.inf},
        {"window": False},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
        budget(**settings)


@pytest.mark.parametrize("settings", [{"window": 1e308, "floor": 1e308}, {"floor": 1e-310}, {"ratio": 1e-310}])
def test_absurd_settings_work(settings):
    one = began(budget(**settings), 3, at=1e6)
    one.allow_extra(1e6)
    one.allow_extra(1e9)
    assert one.snapshot().calls == 3


def test_eight_threads_never_get_more_than_there_is():
    one = began(budget(ratio=0.5, floor=0), 1000)
    got = []
    threads = [threading.Thread(target=lambda: got.append(granted(one, 200))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(got) == 500


def test_it_is_what_a_retry_wants_and_decorates_nothing():
    assert isinstance(budget(), retry.Budget)
    with pytest.raises(TypeError, match="no policy"):
        budget()(len)


def test_calls_that_have_ended_count_in_the_window_after_a_change_of_the_share_too():
    with use_clock(VirtualClock()):
        one = began(budget(ratio=0.2, floor=0), 10)
        for _ in range(10):
            one.call_ended()
        one.update(ratio=0.5)
        assert granted(one, 50) == 5
