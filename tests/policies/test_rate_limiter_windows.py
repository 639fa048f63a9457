from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import RateLimitedError, RateLimiter, use_clock
from seawall.policies.rate_limiter._meters import SLOTS


def admitted(guard, moments):
    inside = []
    for now in moments:
        try:
            guard.enter(now)
        except RateLimitedError:
            continue
        inside.append(now)
    return inside


def most_in_a_window(times, per):
    return max((sum(1 for at in times if start <= at < start + per - 1e-6) for start in times), default=0)


def test_b14_a_sliding_window_lets_its_rate_start_and_not_twice_that_over_an_edge():
    guard = RateLimiter("r", rate=10, algorithm="sliding_window")
    assert len(admitted(guard, [2.0] * 12)) == 10
    assert len(admitted(guard, [100.9] * 12)) == 10
    assert admitted(guard, [101.05] * 12) == []
    with pytest.raises(RateLimitedError) as refused:
        guard.enter(101.05)
    assert refused.value.retry_after == pytest.approx(0.85)
    assert len(admitted(guard, [101.9] * 12)) == 10


def test_a_fixed_window_counts_anew_at_its_edge():
    guard = RateLimiter("r", rate=3, per=10, algorithm="fixed_window")
    assert admitted(guard, [5.0, 6.0, 7.0, 8.0, 14.9]) == [5.0, 6.0, 7.0]
    with pytest.raises(RateLimitedError) as refused:
        guard.enter(14.0)
    assert refused.value.retry_after == pytest.approx(1.0)
    assert len(admitted(guard, [15.0] * 5)) == 3
    assert len(admitted(guard, [1000.0] * 5)) == 3
    assert admitted(guard, [1004.9]) == [], "windows follow one another from the first call on"
    assert admitted(guard, [1005.0]) == [1005.0]


@settings(deadline=None)
@given(
    gaps=st.lists(st.one_of(st.just(0.0), st.floats(0, 0.7)), min_size=1, max_size=80),
    rate=st.integers(1, 8),
    per=st.floats(0.1, 2),
    start=st.floats(0, 1e6),
)
def test_in_no_window_does_a_sliding_one_admit_more_than_its_rate_and_turns_come_back_at_most_a_slot_late(
    gaps, rate, per, start
):
    guard, inside, now = RateLimiter("r", rate=rate, per=per, algorithm="sliding_window"), [], start
    for gap in gaps:
        now += gap
        if admitted(guard, [now]):
            inside.append(now)
        else:
            assert guard._line.starts(now, 1) <= inside[-rate] + per + per / SLOTS + 1e-5
    assert most_in_a_window(inside, per) <= rate


@pytest.mark.parametrize("algorithm", ["fixed_window", "sliding_window"])
@given(rate=st.integers(1, 20), per=st.floats(1e-3, 1e4), start=st.floats(0, 1e8), gap=st.floats(0, 1))
def test_a_call_after_retry_after_gets_in_and_one_just_before_does_not(algorithm, rate, per, start, gap):
    guard, now = RateLimiter("r", rate=rate, per=per, algorithm=algorithm), start
    for _ in range(rate):
        guard.enter(now)
        now += gap * per / rate
    with pytest.raises(RateLimitedError) as refused:
        guard.enter(start)
    retry_after = refused.value.retry_after
    if retry_after > 1e-3:
        with pytest.raises(RateLimitedError):
            guard.enter(start + retry_after - 1e-5)
    guard.enter(start + retry_after)


def test_a_sliding_window_keeps_a_bounded_number_of_groups_and_loses_nothing_to_steady_load():
    guard = RateLimiter("r", rate=1000, per=1.0, algorithm="sliding_window")
    moments = [number / 5000 for number in range(50_000)]
    inside = admitted(guard, moments)
    assert len(guard._meter.groups) <= SLOTS + 2
    assert most_in_a_window(inside[::7], 1.0) <= 1000 / 7 + 1
    assert len(inside) >= 9.7 * 1000  # 10 s


def test_the_snapshot_of_a_window_says_what_is_left_in_it():
    for algorithm in ("fixed_window", "sliding_window"):
        guard = RateLimiter("r", rate=5, per=10, algorithm=algorithm)
        with use_clock(lambda: 50.0):
            assert guard.snapshot().available == 5
            guard.admit().success()
            guard.admit().success()
            assert guard.snapshot().available == 3
            assert not guard.at_rest(50.0)
        with use_clock(lambda: 60.0):
            assert guard.snapshot().available == 5
            assert guard.at_rest(60.0)


@pytest.mark.parametrize(("algorithm", "left"), [("fixed_window", 0.5), ("sliding_window", 1.0)])
def test_drained_after_a_pause_it_is_closed_for_the_rest_of_the_window_of_now(algorithm, left):
    guard = RateLimiter("r", rate=2, algorithm=algorithm)
    guard.enter(0.0)
    with use_clock(lambda: 5.5):
        guard.drain()
        with pytest.raises(RateLimitedError) as refused:
            guard.enter(5.5)
    assert refused.value.retry_after == pytest.approx(left)
