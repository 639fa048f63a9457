"""One length of drafts for all rows of a run: where it pays, as far as it pays, and not after it has not."""

import random
from itertools import accumulate
from operator import mul

import pytest

from seawall.inference.generate.rows.drafting import SharedDrafts
from seawall.inference.generate.speculation import Pace

PACE = Pace(1.0, 1.1, 0.1)  # seconds of one token, of two, and of each further one


def seconds(tokens):
    return 1.1 + 0.1 * (tokens - 2)


def best(rows, chances):
    """The length that gives most tokens per second, by trying all."""
    rates = []
    for length in range(17):
        tokens = sum(1 + sum(accumulate(row[:length], mul)) for row in chances)
        rates.append(tokens / seconds(rows * (1 + length)))
    return rates.index(max(rates)), max(rates) / rates[0]


@pytest.mark.parametrize("rows", [2, 4, 8, 16])
@pytest.mark.parametrize("chance", [0.05, 0.3, 0.6, 0.8, 0.95, 0.99])
def test_the_length_is_the_one_that_gives_most_tokens_per_second(rows, chance):
    chances = [[chance] * 16] * rows
    drafts = SharedDrafts(PACE)
    for _ in range(40):
        length = drafts.length(chances)
        tokens = sum(1 + sum(accumulate(row[:length], mul)) for row in chances)
        drafts.learn(rows, 1 + length, tokens, seconds(rows * (1 + length)))
    wanted, _ = best(rows, chances)
    rate = sum(1 + sum(accumulate(row[:length], mul)) for row in chances) / seconds(rows * (1 + length))
    assert rate >= 0.98 * best(rows, chances)[1] * rows / seconds(rows)
    assert (length > 0) == (wanted > 0)


def test_one_row_that_repeats_itself_does_not_make_seven_others_pay():
    chances = [[0.95] * 16, *[[0.05]] * 7]
    assert SharedDrafts(PACE).length(chances) == 0
    assert SharedDrafts(PACE).length([[0.95] * 16, [0.05]]) > 0


def test_rows_without_an_offer_are_not_drafted_for():
    assert SharedDrafts(PACE).length([[], []]) == 0


def test_drafts_that_never_hold_cost_a_bounded_share_of_the_time():
    drafts, spent, plain = SharedDrafts(PACE), 0.0, 0.0
    for _ in range(2000):
        length = drafts.length([[0.9] * 4] * 4)  # so the drafters say
        took = seconds(4 * (1 + length))
        drafts.learn(4, 1 + length, 4, took)
        spent += took
        plain += seconds(4)
    assert spent <= plain * 1.03


def test_what_a_long_quiet_time_would_have_allowed_is_not_lost_at_once():
    drafts = SharedDrafts(PACE)
    for _ in range(100_000):
        drafts.learn(4, 1, 4, seconds(4))
    lost = 0.0
    for _ in range(1000):
        length = drafts.length([[0.9] * 4] * 4)
        took = seconds(4 * (1 + length))
        drafts.learn(4, 1 + length, 4, took)
        lost += took - seconds(4)
    assert 10 * seconds(4) < lost < 100 * seconds(4)  # 40 for the quiet time, and 2 % of what came after


def test_a_noisy_clock_makes_nobody_draft_who_should_not():
    rng = random.Random(1)
    drafts = SharedDrafts(PACE)
    lengths = []
    for _ in range(500):
        length = drafts.length([[0.2, 0.1]] * 8)
        drafts.learn(8, 1 + length, 8, seconds(8 * (1 + length)) * rng.uniform(0.7, 1.4))
        lengths.append(length)
    assert sum(map(bool, lengths)) < 25


def test_where_single_tokens_run_as_two_one_drafted_token_is_free():
    chances = [[0.1] * 3] * 8
    assert SharedDrafts(PACE).length(chances, least_width=2) == 1
