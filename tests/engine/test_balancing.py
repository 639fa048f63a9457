"""Who is asked next: by turns, by load, by latency. Pure; times are numbers."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.engine.balancing import LeastLoaded, PeakEwma, RoundRobin, Standing

weights = st.lists(st.floats(0.1, 20.0), min_size=1, max_size=6)


def standings(shares):
    return [Standing(str(index), weight) for index, weight in enumerate(shares)]


@given(weights, st.integers(1, 300))
def test_turns_follow_the_weights_and_nobody_is_ever_more_than_one_call_off(shares, calls):
    rule, replicas = RoundRobin(), standings(shares)
    picked = Counter(rule.choose(replicas, 0.0).name for _ in range(calls))
    for one in replicas:
        for other in replicas:
            ahead = picked[one.name] / one.weight - picked[other.name] / other.weight
            assert ahead <= 1 / one.weight + 1 / other.weight + 1e-6


@given(weights, st.integers(1, 60), st.integers(1, 60))
def test_one_that_was_away_joins_in_and_makes_up_for_nothing(shares, before, after):
    rule, replicas = RoundRobin(), standings([*shares, 1.0])
    for _ in range(before):
        rule.choose(replicas[:-1], 0.0)
    picked = Counter(rule.choose(replicas, 0.0).name for _ in range(after))
    late = picked[replicas[-1].name]
    for one in replicas[:-1]:
        assert late - picked[one.name] / one.weight <= 1 + 1 / one.weight + 1e-6


def test_equal_weights_take_turns_in_order():
    rule, replicas = RoundRobin(), standings([1, 1, 1])
    assert list("012012") == [rule.choose(replicas, 0.0).name for _ in range(6)]


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.5, 4)), min_size=1, max_size=6))
def test_the_least_loaded_for_its_weight_is_asked(found):
    replicas = standings([weight for _, weight in found])
    for replica, (active, _) in zip(replicas, found, strict=True):
        replica.active = active
    chosen = LeastLoaded().choose(replicas, 0.0)
    assert (chosen.active + 1) / chosen.weight == min((one.active + 1) / one.weight for one in replicas)


def test_those_that_are_equally_loaded_take_turns():
    rule, replicas = LeastLoaded(), standings([1, 1, 1])
    replicas[1].active = 3
    assert ["0", "2", "0", "2"] == [rule.choose(replicas, 0.0).name for _ in range(4)]


def shares_of(rule, replicas, *, seconds, calls=2000):
    """Shares of calls that last `seconds(name, now)`, ten of them in flight at any time."""
    now, flying, picked = 0.0, [], Counter()
    for number in range(calls):
        if len(flying) == 10:
            flying.sort(key=lambda call: call[0])
            now, replica, token, took = flying.pop(0)
            replica.answered(token, now)
            rule.heard(replica, took, now)
            replica.end(token)
        replica = rule.choose(replicas, now)
        picked[replica.name] += 1
        replica.begin(number, now)
        flying.append((now + seconds(replica.name, now), replica, number, seconds(replica.name, now)))
    return {name: count / calls for name, count in picked.items()}


def test_latency_steers_the_calls_to_the_quick_ones():
    rule = PeakEwma(rng=random.Random(1))
    shares = shares_of(rule, standings([1, 1, 1]), seconds=lambda name, now: {"0": 0.1, "1": 0.1, "2": 0.5}[name])
    assert 2.5 * shares["2"] < shares["0"]
    assert shares["0"] == pytest.approx(shares["1"], abs=0.06)


def test_one_that_becomes_slow_is_left_and_one_that_recovers_is_found_again():
    rule, replicas = PeakEwma(decay=1.0, rng=random.Random(2)), standings([1, 1])
    slow = shares_of(rule, replicas, seconds=lambda name, now: 1.0 if name == "1" else 0.05)
    assert slow["1"] < 0.2
    replicas = standings([1, 1])
    back = shares_of(rule, replicas, calls=8000, seconds=lambda name, now: 1.0 if name == "1" and now < 5 else 0.05)
    assert back["1"] > 0.35


def test_a_peak_counts_at_once_and_is_forgotten_bit_by_bit():
    rule, one = PeakEwma(decay=10.0), Standing("a")
    rule.heard(one, 0.1, 0.0)
    rule.heard(one, 2.0, 1.0)
    assert one.latency == 2.0
    rule.heard(one, 0.1, 2.0)
    assert 1.8 < one.latency < 1.9
    rule.heard(one, 0.1, 60.0)
    assert one.latency < 0.11


def test_a_call_that_hangs_makes_its_replica_dear_before_it_is_answered():
    rule, (hung, fine) = PeakEwma(), standings([1, 1])
    for one in (hung, fine):
        rule.heard(one, 0.1, 0.0)
        one.begin("call", 0.0)
    fine.answered("call", 0.1)
    assert rule.cost(hung, 0.1) == pytest.approx(rule.cost(fine, 0.1), rel=0.05)
    assert rule.cost(hung, 5.0) > 40 * rule.cost(fine, 5.0)


def test_a_new_one_gets_one_call_and_then_waits_for_its_answer():
    rule, (new, old) = PeakEwma(), standings([1, 1])
    rule.heard(old, 0.1, 0.0)
    assert all(rule.choose([new, old], 0.0) is new for _ in range(10))
    new.begin("call", 0.0)
    assert all(rule.choose([new, old], 0.0) is old for _ in range(10))
    rule.heard(new, 0.05, 0.2)
    new.end("call")
    assert all(rule.choose([new, old], 0.2) is new for _ in range(10))


def test_a_weight_divides_the_cost():
    rule, (strong, weak) = PeakEwma(), standings([4, 1])
    for one in (strong, weak):
        rule.heard(one, 0.1, 0.0)
    strong.active = 2
    assert rule.choose([strong, weak], 0.0) is strong
    strong.active = 4
    assert rule.choose([strong, weak], 0.0) is weak


@pytest.mark.parametrize("decay", [0, -1, float("nan"), "1"])
def test_a_decay_that_cannot_be_is_refused(decay):
    with pytest.raises((ValueError, TypeError), match="decay must be"):
        PeakEwma(decay=decay)
