"""The algorithms alone: plain numbers in, a limit out. How they do against servers is in test_adaptive_bulkhead."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import AIMDLimit, GradientLimit, VegasLimit


class Feed:
    """Tells a limit of calls that begin and end one after the other, `inflight` at a time."""

    def __init__(self, limit, **window):
        self.limit = limit
        self.now = 0.0

    def window(self, latency, *, inflight=None, calls=50, dropped=0):
        """One window of a second and a bit: `calls` that took `latency`, of which `dropped` timed out."""
        inflight = self.limit.limit if inflight is None else inflight
        start = self.now + 1e-6
        end = start + max(1.01, 2.5 * latency)
        for number in range(calls):
            at = start + latency + (end - start - latency) * number / (calls - 1)
            self.limit.observe(at, latency, inflight, number < dropped)
        self.now = end
        return self.limit.limit


def gradient(**settings):
    return Feed(GradientLimit(**{"initial_limit": 20, **settings}))


def test_the_first_window_looks_at_the_baseline_with_a_quarter_less():
    feed = gradient()
    assert feed.limit.limit == 15
    assert math.isnan(feed.limit.baseline)
    feed.window(0.1)
    assert feed.limit.limit == 20
    assert feed.limit.baseline == pytest.approx(0.1)


def test_while_calls_are_as_fast_as_with_fewer_it_grows_by_a_tenth_a_window():
    feed = gradient()
    feed.window(0.1)
    assert [feed.window(0.1) for _ in range(5)] == [22, 24, 26, 29, 32]


def test_it_does_not_grow_for_calls_that_never_come():
    feed = gradient()
    feed.window(0.1)
    assert [feed.window(0.1, inflight=19) for _ in range(5)] == [20] * 5


def test_the_nearer_to_the_tolerance_the_less_it_grows():
    feed = gradient(tolerance=0.5)
    feed.window(0.1)
    feed.window(0.125)
    assert feed.limit._estimate == pytest.approx(21)
    feed.window(0.15)
    assert feed.limit._estimate == pytest.approx(21, abs=0.01)


def test_twice_the_latency_cuts_it_in_half_and_a_bit_less_for_the_tolerance():
    feed = gradient()
    feed.window(0.1)
    feed.window(0.2)
    assert feed.limit._estimate == pytest.approx(10.6)


def test_after_a_cut_it_looks_again_and_a_server_that_is_just_slower_is_believed():
    feed = gradient()
    feed.window(0.1)
    feed.window(0.2)
    feed.window(0.2)
    assert feed.limit._looking
    before = feed.limit._estimate
    feed.window(0.2)
    assert feed.limit.baseline == pytest.approx(0.2)
    feed.window(0.2)
    assert feed.limit._estimate > before


def test_an_overload_that_lasts_never_becomes_the_normal():
    feed = gradient(initial_limit=40)  # of ten workers that take 0.1 s: latency follows the limit
    for _ in range(2000):
        feed.window(0.1 * max(1.0, feed.limit.limit / 10))
    assert 8 <= feed.limit.limit <= 12


def test_once_in_twenty_windows_it_looks_at_the_baseline_though_all_is_well():
    feed = gradient(max_limit=20)
    looks = []
    for _ in range(60):
        looks.append(feed.limit._looking)
        feed.window(0.1)
    assert [number for number, looking in enumerate(looks) if looking] == [0, 21, 42]


def test_a_window_with_fewer_calls_than_it_would_let_in_is_a_look_for_free():
    feed = gradient()
    feed.window(0.1)
    feed.window(0.05, inflight=10)
    assert feed.limit.baseline == pytest.approx(0.05)
    assert not feed.limit._looking


def test_faster_with_more_beside_it_means_that_the_baseline_was_of_slower_days():
    feed = gradient()
    feed.window(0.2)
    feed.window(0.1)
    assert feed.limit.baseline == pytest.approx(0.1)


def test_a_window_with_many_timeouts_cuts_it_by_a_fifth_and_a_few_are_noise():
    feed = gradient()
    feed.window(0.1)
    feed.window(0.1, dropped=6)
    assert feed.limit._estimate == 16
    feed.window(0.1, dropped=5)
    assert feed.limit._estimate > 16


def test_when_all_calls_time_out_it_falls_to_the_least_and_recovers():
    feed = gradient()
    feed.window(0.1)
    for _ in range(30):
        feed.window(0.5, dropped=50)
    assert feed.limit.limit == 1
    for _ in range(30):
        feed.window(0.1)
    assert feed.limit.limit >= 15


@pytest.mark.parametrize("make", [GradientLimit, VegasLimit])
def test_a_call_that_began_under_another_limit_says_nothing(make):
    limit = make(initial_limit=20, window=1.0, minimum_calls=2)
    limit.observe(1.0, 0.5, 20, False)
    limit.observe(2.0, 0.5, 20, False)  # the window is full; the next begins now
    before = limit._seen
    limit.observe(2.1, 0.2, 20, False)
    assert before is limit._seen
    assert (before.since, before.calls) == (2.0, 0)


@pytest.mark.parametrize("make", [GradientLimit, VegasLimit])
def test_a_timeout_is_never_a_latency(make):
    limit = make(initial_limit=20)
    limit.observe(1.0, 0.5, 20, True)
    assert (limit._seen.calls, limit._seen.drops, limit._seen.total) == (0, 1, 0.0)


@pytest.mark.parametrize("make", [GradientLimit, VegasLimit])
def test_a_window_lasts_twice_as_long_as_its_calls_so_that_it_sees_them_end(make):
    limit = make(initial_limit=20, window=1.0, minimum_calls=2)
    limit.observe(5.0, 5.0, 20, False)
    limit.observe(9.9, 5.0, 20, False)
    assert limit._seen.calls == 2
    limit.observe(10.1, 5.0, 20, False)
    assert limit._seen.calls == 0


def test_one_call_that_hangs_weighs_as_one_call():
    feed = gradient()
    feed.window(0.1)
    start = feed.now + 1e-6
    for number in range(60):
        feed.limit.observe(start + 0.1 + number * 0.02, 0.1, 20, False)
    assert feed.limit._estimate == pytest.approx(22)
    feed.limit.observe(start + 100, 98.0, 20, False)
    for number in range(60):
        feed.limit.observe(start + 100.2 + number * 0.02, 0.1, 22, False)
    assert feed.limit._estimate > 22 * 0.9


def vegas(**settings):
    return Feed(VegasLimit(**{"initial_limit": 20, **settings}))


def test_vegas_leaps_while_nothing_queues_and_steps_as_the_queue_grows():
    feed = vegas()
    feed.window(0.1)
    assert feed.window(0.1) == 26  # no queue: by six
    assert feed.window(0.1 / (1 - 1.5 / 26)) == 27  # a queue of two: by one
    assert feed.window(0.1 / (1 - 4.5 / 27)) == 27  # of five: as wanted
    assert feed.window(0.1 / (1 - 7.5 / 27)) == 26  # of eight: back


def test_vegas_gives_way_to_a_timeout_and_takes_the_least_latency_afresh_after_a_while():
    feed = vegas(probe_every=3)
    feed.window(0.1)
    assert feed.window(0.1, dropped=1) == 19
    assert feed.window(0.3) == 18
    feed.window(0.3)
    assert feed.limit._least == pytest.approx(math.log(0.3))


def test_vegas_is_left_alone_by_calls_that_use_less_than_half_of_it():
    feed = vegas()
    feed.window(0.1)
    assert feed.window(0.1, inflight=9) == 20


def test_aimd_adds_one_per_round_of_calls():
    limit = AIMDLimit(initial_limit=10)
    for number in range(10):
        limit.observe(number * 0.1, 0.1, 10, False)
    assert limit._estimate == pytest.approx(11, abs=0.06)


def test_aimd_takes_a_tenth_off_once_for_all_the_calls_that_were_in_flight_then():
    limit = AIMDLimit(initial_limit=20)
    for number in range(20):
        limit.observe(5.0 + number * 0.01, 1.0, 20, True)
    assert limit.limit == 18
    limit.observe(6.5, 1.0, 18, True)
    assert limit.limit == 16


def test_aimd_takes_a_slow_success_for_a_drop_and_leaves_the_limit_when_half_of_it_is_idle():
    limit = AIMDLimit(initial_limit=20, max_latency=2.0)
    limit.observe(3.0, 2.0, 9, False)
    assert limit._estimate == 20
    limit.observe(3.0, 2.1, 20, False)
    assert limit.limit == 18


@settings(deadline=None, max_examples=60)
@given(
    calls=st.lists(
        st.tuples(
            st.floats(0, 10, allow_nan=False),
            st.floats(0, 1e300, allow_nan=False),
            st.integers(1, 100),
            st.booleans(),
        ),
        max_size=200,
    ),
    kind=st.sampled_from(["gradient", "vegas", "aimd"]),
)
def test_whatever_it_is_told_it_stays_between_its_bounds(calls, kind):
    made = {
        "gradient": lambda: GradientLimit(8, 3, 12, minimum_calls=2, window=0.1),
        "vegas": lambda: VegasLimit(8, 3, 12, minimum_calls=2, window=0.1),
        "aimd": lambda: AIMDLimit(8, 3, 12),
    }[kind]()
    now = 0.0
    for step, latency, inflight, dropped in calls:
        now += step
        made.observe(now, latency, inflight, dropped)
        assert 3 <= made.limit <= 12


@pytest.mark.parametrize("make", [GradientLimit, VegasLimit, AIMDLimit])
@pytest.mark.parametrize(
    ("settings", "error", "rule"),
    [
        ({"initial_limit": 0}, ValueError, "initial_limit must be 1 or more, got 0"),
        ({"initial_limit": True}, TypeError, "initial_limit must be a whole number, got True"),
        ({"min_limit": 30}, ValueError, "must lie between min_limit and max_limit, got 30 <= 20 <= 1000"),
        ({"max_limit": 10}, ValueError, "must lie between min_limit and max_limit, got 1 <= 20 <= 10"),
        ({"max_limit": 10**400}, ValueError, "max_limit must be 1000000 or less"),
    ],
)
def test_bad_bounds_are_refused(make, settings, error, rule):
    with pytest.raises(error, match=rule):
        make(**settings)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (GradientLimit, {"window": math.nan}),
        (GradientLimit, {"window": 0}),
        (GradientLimit, {"minimum_calls": 0}),
        (GradientLimit, {"tolerance": 0.0}),
        (GradientLimit, {"tolerance": 1.5}),
        (VegasLimit, {"probe_every": 0}),
        (VegasLimit, {"window": math.inf}),
        (AIMDLimit, {"max_latency": 0}),
        (AIMDLimit, {"backoff": 1.0}),
    ],
)
def test_a_bad_setting_is_refused(make, settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} "):
        make(**settings)


@pytest.mark.parametrize("start", [0.0, 1e6])
def test_a_window_is_as_long_whatever_the_clock_says(start):
    limit = GradientLimit(initial_limit=20, window=1.0, minimum_calls=2)
    for ended in (4.0, 4.5, 7.9):  # calls of four seconds make a window of eight
        limit.observe(start + ended, 4.0, 15, False)
    assert math.isnan(limit.baseline)
    limit.observe(start + 8.1, 4.0, 15, False)
    assert limit.baseline == pytest.approx(4.0)


@pytest.mark.parametrize(("wait", "full"), [(0.9, False), (1.1, True)])
def test_a_window_of_quick_calls_lasts_as_long_as_it_was_told_to(wait, full):
    limit = GradientLimit(initial_limit=20, window=1.0, minimum_calls=2)
    for ended in (0.1, wait):
        limit.observe(1e6 + ended, 0.1, 15, False)
    assert math.isnan(limit.baseline) is not full
