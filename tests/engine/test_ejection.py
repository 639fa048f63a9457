"""Who is left out, for how long, and how many at once. Pure; times are numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.engine.ejection import Ejection, Health, Outliers


def healths(count):
    return [Health() for _ in range(count)]


def failures(outliers, health, everybody, now, count=5):
    return [outliers.saw(health, everybody, now, failed=True) for _ in range(count)][-1]


def test_failures_in_a_row_eject_and_one_success_starts_the_count_anew():
    outliers, (bad, good) = Outliers(Ejection(consecutive_failures=3, time=30.0)), healths(2)
    both = [bad, good]
    assert [outliers.saw(bad, both, 0.0, failed=True) for _ in range(2)] == [None, None]
    assert outliers.saw(bad, both, 0.0, failed=False) is None
    assert [outliers.saw(bad, both, 1.0, failed=True) for _ in range(2)] == [None, None]
    assert outliers.saw(bad, both, 1.0, failed=True) == "3 failures in a row"
    assert bad.until == 31.0
    assert good.until is None


def test_its_time_over_it_is_back_and_the_next_ejection_lasts_longer_up_to_a_limit():
    outliers, (bad, good) = Outliers(Ejection(time=30.0, max_time=70.0)), healths(2)
    both, now, lasted = [bad, good], 0.0, []
    for _ in range(4):
        failures(outliers, bad, both, now)
        assert outliers.back(both, bad.until - 0.1) == []
        lasted.append(bad.until - now)
        now = bad.until
        assert outliers.back(both, now) == [bad]
        assert bad.until is None
    assert lasted == [30.0, 60.0, 70.0, 70.0]


def test_one_that_is_back_needs_as_many_failures_as_before():
    outliers, (bad, good) = Outliers(Ejection(time=30.0)), healths(2)
    failures(outliers, bad, [bad, good], 0.0)
    outliers.back([bad, good], 30.0)
    assert failures(outliers, bad, [bad, good], 31.0, count=4) is None
    assert failures(outliers, bad, [bad, good], 31.0, count=1) == "5 failures in a row"


def test_while_one_is_out_it_is_neither_compared_nor_forgiven():
    outliers, everybody = Outliers(Ejection(interval=10.0, time=60.0)), healths(6)
    outliers.compare(everybody, 0.0)
    seen(outliers, everybody, [1.0] * 6, 1.0)
    failures(outliers, everybody[0], everybody, 1.0, count=40)
    assert outliers.compare(everybody, 10.0) == []
    assert everybody[0].ejections == 1
    assert everybody[0].until == 61.0


def test_quiet_intervals_take_ejections_back():
    outliers, (bad, good) = Outliers(Ejection(time=30.0, interval=10.0)), healths(2)
    both = [bad, good]
    outliers.compare(both, 0.0)
    failures(outliers, bad, both, 0.0)
    outliers.back(both, 30.0)
    assert bad.ejections == 1
    outliers.compare(both, 30.0)
    assert bad.ejections == 0
    failures(outliers, bad, both, 31.0)
    assert bad.until == 61.0


@given(st.integers(1, 12), st.floats(0.01, 1.0), st.lists(st.integers(0, 11), max_size=200))
def test_never_more_than_the_share_are_out_and_one_always_may_be(count, share, hits):
    outliers, everybody = Outliers(Ejection(consecutive_failures=1, max_ejected=share)), healths(count)
    for hit in hits:
        outliers.saw(everybody[hit % count], everybody, 0.0, failed=True)
        out = sum(health.until is not None for health in everybody)
        assert out <= max(1, share * count + 1e-9)
    if count > 1 and hits:
        assert sum(health.until is not None for health in everybody) >= 1
    if count == 1:
        assert everybody[0].until is None


def seen(outliers, everybody, rates, now, calls=100):
    for health, rate in zip(everybody, rates, strict=True):
        bad = round(calls * (1 - rate))
        for number in range(calls):  # spread, so that few fail in a row
            outliers.saw(health, everybody, now, failed=number * bad // calls != (number + 1) * bad // calls)


def test_a_success_rate_far_below_the_others_ejects_at_the_end_of_the_interval():
    outliers, everybody = Outliers(Ejection(interval=10.0)), healths(6)
    assert outliers.compare(everybody, 0.0) == []
    seen(outliers, everybody, [0.99, 1.0, 0.98, 1.0, 0.99, 0.8], 5.0)
    assert outliers.compare(everybody, 9.9) == []
    ((found, reason),) = outliers.compare(everybody, 10.0)
    assert found is everybody[5]
    assert reason == "a success rate of 0.8, where the mean is 0.96"
    assert found.until == 40.0


@pytest.mark.parametrize(
    ("rates", "calls"),
    [
        ([0.5] * 6, 100),  # all alike: not the replica's fault
        ([1.0, 1.0, 1.0, 0.2], 100),  # too few to compare
        ([1.0, 1.0, 1.0, 1.0, 1.0, 0.5], 19),  # too few calls
    ],
)
def test_rates_that_prove_nothing_eject_nobody(rates, calls):
    outliers, everybody = Outliers(Ejection(interval=10.0, consecutive_failures=None)), healths(len(rates))
    outliers.compare(everybody, 0.0)
    seen(outliers, everybody, rates, 5.0, calls)
    assert outliers.compare(everybody, 10.0) == []


def test_an_interval_is_judged_by_its_own_calls():
    outliers, everybody = Outliers(Ejection(interval=10.0, consecutive_failures=None)), healths(6)
    outliers.compare(everybody, 0.0)
    seen(outliers, everybody, [1.0] * 5 + [0.7], 1.0, calls=10)  # too few
    outliers.compare(everybody, 10.0)
    seen(outliers, everybody, [1.0] * 6, 11.0)
    assert outliers.compare(everybody, 20.0) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"consecutive_failures": 0}, "consecutive_failures must be 1 or more, got 0"),
        ({"interval": 0}, "interval must be more than 0"),
        ({"success_rate_stdev": -1}, "success_rate_stdev must be more than 0"),
        ({"minimum_replicas": 1}, "minimum_replicas must be 2 or more"),
        ({"max_ejected": 1.5}, "max_ejected must be in"),
        ({"time": 60, "max_time": 30}, "max_time must be time or more, got 30.0 s and 60.0 s"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Ejection(**settings)
