from __future__ import annotations

import math

from hypothesis import example, given, settings
from hypothesis import strategies as st

from seawall.core.counts import RollingWindow


@settings(deadline=None, max_examples=300)
@given(
    start=st.one_of(st.floats(-1e4, 1e6), st.just(0.0)),
    gaps=st.lists(st.one_of(st.just(0.0), st.floats(0, 3), st.floats(0, 500)), max_size=80),
    seconds=st.floats(0.5, 60),
    slots=st.integers(1, 12),
    look=st.integers(0, 12),
)
@example(start=1.6286994572741924, gaps=[1.6286994572741924] * 2, seconds=1.6286994572741924, slots=2, look=0)
def test_a_window_agrees_with_counting_the_moments_over_equal_times_and_jumps(start, gaps, seconds, slots, look):
    window, counts, history, now = RollingWindow(seconds, slots=slots, width=1), [0], [], start
    slot = seconds / slots
    for gap in gaps:
        now += gap
        if now >= window.turns_at:
            window.turn(now, counts)
        assert now < window.turns_at
        counts[0] += 1
        history.append(now)
        (seen,) = window.since(now, counts)
        # The start of the oldest slot, give or take a rounding error.
        oldest = (math.floor(now / slot) - slots + 1) * slot
        error = 1e-9 * max(1.0, abs(now))
        assert sum(at >= oldest + error for at in history) <= seen <= sum(at >= oldest - error for at in history)
    (whole,), (part,) = window.since(now, counts), window.since(now, counts, look * slot)
    assert part <= whole
    assert window.since(now + seconds + slot, counts) == [0]


def test_before_its_first_turn_a_window_has_seen_nothing():
    assert RollingWindow(10.0, slots=10, width=3).since(5.0, [7, 8, 9]) == [0, 0, 0]


def test_what_was_counted_before_the_first_turn_is_not_in_the_window():
    window = RollingWindow(10.0, slots=10, width=1)
    window.turn(1000.0, [50])
    assert window.since(1000.5, [53]) == [3]


def test_slots_that_passed_without_a_call_count_as_empty():
    window, counts = RollingWindow(10.0, slots=10, width=1), [0]
    window.turn(0.5, counts)
    counts[0] += 4
    window.turn(7.5, counts)
    counts[0] += 2
    assert [window.since(now, counts)[0] for now in (7.5, 9.9, 10.1, 16.9, 17.1)] == [6, 6, 2, 2, 0]
    assert window.since(7.5, counts, 3.0) == [2]


def test_a_slot_that_is_over_but_for_a_rounding_error_of_the_division_is_over():
    window = RollingWindow(0.5, slots=12, width=1)
    slot, now = 0.5 / 12, 7738 * (0.5 / 12)
    assert math.floor(now / slot) == 7737
    window.turn(now - slot / 2, [0])
    assert window.turns_at == now
    window.turn(now, [3])
    assert window.turns_at == 7739 * slot
    assert window.since(now + slot / 2, [5], slot) == [2]
