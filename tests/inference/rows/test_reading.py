"""Parts of prompts: how long, and cut so that no token of several is ever alone in a kernel's block."""

from hypothesis import given
from hypothesis import strategies as st

from seawall.inference.generate.rows.reading import LEAST, ReadingPace
from seawall.inference.generate.slot import CHUNK, part_length


@given(st.integers(1, 3000), st.lists(st.integers(4, CHUNK), min_size=1, max_size=5))
def test_a_prompt_is_read_whole_in_parts_that_leave_no_token_alone(tokens, sizes):
    left, number = tokens, 0
    while left:
        part = part_length(left, sizes[number % len(sizes)])
        assert 1 <= part <= min(left, sizes[number % len(sizes)])
        assert tokens == 1 or part % 16 != 1
        left, number = left - part, number + 1


@given(st.integers(300, 3000), st.integers(4, CHUNK))
def test_parts_are_hardly_shorter_than_they_may_be(left, most):
    assert part_length(left, most) >= most - 2


def test_a_part_beside_decoding_takes_nearly_as_long_as_the_decoding():
    pace = ReadingPace()
    for _ in range(20):
        pace.saw(100, 0.1)  # 1,000 tokens a second
    assert pace.tokens(0.05) == 40
    assert pace.tokens(0.001) == LEAST
    assert pace.tokens(9.0) == CHUNK
    for _ in range(20):
        pace.saw(100, 0.2)
    assert pace.tokens(0.05) == 20


def test_nobody_waits_for_a_prompt_that_is_alone():
    assert ReadingPace().tokens(0.0) == CHUNK


def test_the_first_part_beside_decoding_is_the_shortest_and_a_clock_that_stands_proves_nothing():
    pace = ReadingPace()
    pace.saw(100, 0.0)
    assert pace.tokens(0.05) == LEAST


def test_a_given_size_is_kept_to():
    pace = ReadingPace(40)
    assert [pace.tokens(seconds) for seconds in (0.0, 0.01, 9.0)] == [40, 40, 40]
