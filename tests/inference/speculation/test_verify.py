"""The acceptance rules keep the target's distribution, and the target's own choices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.inference.generate.speculation import (
    accept_or_reject,
    expected_tokens,
    residual,
    sample,
    verify_chosen,
    verify_drawn,
)


def some_distribution(rng, size, sparse):
    weights = rng.dirichlet(np.full(size, 0.5))
    if sparse:
        weights[rng.random(size) < 0.4] = 0
    return weights / weights.sum() if weights.sum() else np.eye(size)[0]


@given(seed=st.integers(0, 10_000), size=st.integers(1, 12), sparse=st.booleans())
@settings(max_examples=300, deadline=None)
def test_accepting_and_correcting_together_give_exactly_the_target(seed, size, sparse):
    rng = np.random.default_rng(seed)
    target, draft = some_distribution(rng, size, sparse), some_distribution(rng, size, sparse)
    drawn = draft > 0
    chance = np.zeros(size)
    chance[drawn] = np.minimum(1, target[drawn] / draft[drawn])
    kept = draft * chance
    law = kept + (1 - kept.sum()) * residual(target, draft)
    np.testing.assert_allclose(law, target, atol=1e-12)


def test_the_residual_of_equal_distributions_is_the_target_and_divides_by_nothing():
    same = np.array([0.25, 0.75])
    np.testing.assert_array_equal(residual(same, same), same)


def test_a_token_that_the_draft_could_not_have_drawn_is_accepted_where_the_target_allows_it():
    target, draft = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])
    rng = np.random.default_rng(0)
    assert accept_or_reject(0, target, draft, rng)[0]
    accepted, token = accept_or_reject(2, target, draft, rng)
    assert not accepted
    assert token in (0, 1)


def chi_square(counts, probabilities):
    """Counts against what was expected, as standard deviations above the mean of chi-square."""
    expected = probabilities * counts.sum()
    assert not counts[expected == 0].any()
    likely = expected > 0
    freedom = likely.sum() - 1
    statistic = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", range(4))
def test_a_million_draws_are_distributed_as_the_target(seed):
    rng = np.random.default_rng(seed)
    target, draft = some_distribution(rng, 10, sparse=False), some_distribution(rng, 10, sparse=seed % 2 == 1)
    counts = np.zeros(10)
    for _ in range(4):
        tokens = rng.choice(10, 250_000, p=draft)
        rows = (np.broadcast_to(target, (250_000, 10)), np.broadcast_to(draft, (250_000, 10)))
        accepted, taken = accept_or_reject(tokens, *rows, rng)
        assert accepted.mean() == pytest.approx(np.minimum(target, draft).sum(), abs=0.01)
        counts += np.bincount(taken, minlength=10)
    assert counts.sum() == 1_000_000
    assert abs(chi_square(counts, target)) < 4


def markov(rng, size):
    """A model of one token of memory: the distribution of the next token after each."""
    return np.stack([some_distribution(rng, size, sparse=False) for _ in range(size)])


@pytest.mark.parametrize("drawn", [True, False])
def test_rounds_write_texts_that_are_distributed_as_the_targets_own(drawn):
    """Every text of three tokens, by exact enumeration, against 40,000 speculative ones."""
    size, texts = 3, 40_000
    rng = np.random.default_rng(11)
    target, draft = markov(rng, size), markov(rng, size)
    exact = np.einsum("a,ab,bc->abc", target[0], target, target).ravel()
    counts = np.zeros(size**3)
    for _ in range(texts):
        text = [0]
        while len(text) < 4:
            drafted = []
            for _ in range(2):
                last = (text + drafted)[-1]
                drafted.append(int(sample(draft[last], rng)) if drawn else (last + 1) % size)
            context = [text[-1], *drafted]
            offered = (lambda i, c=context: draft[c[i]]) if drawn else (lambda i, d=drafted: np.eye(size)[d[i]])
            text += verify_drawn(drafted, offered, lambda i, c=context: target[c[i]], rng)
        counts[(text[1] * size + text[2]) * size + text[3]] += 1
    assert abs(chi_square(counts, exact)) < 4


@given(
    choices=st.lists(st.integers(0, 3), min_size=9, max_size=9),
    drafted=st.lists(st.integers(0, 3), max_size=8),
)
def test_chosen_tokens_are_the_targets_own_up_to_the_first_that_was_not_drafted(choices, drafted):
    decided = verify_chosen(drafted, lambda place: choices[place])
    assert decided == choices[: len(decided)]
    assert 1 <= len(decided) <= len(drafted) + 1
    if len(decided) <= len(drafted):
        assert decided[:-1] == drafted[: len(decided) - 1]
        assert decided[-1] != drafted[len(decided) - 1]


def test_leniency_keeps_drafted_tokens_that_the_rule_would_not():
    assert verify_chosen([1, 2], lambda place: 9, lambda place: place == 0) == [1, 9]
    nothing = np.array([1.0, 0.0])
    kept = verify_drawn([1], lambda _: nothing, lambda _: nothing, np.random.default_rng(0), lambda _: True)
    assert kept == [1, 0]


def test_the_closed_form_counts_the_tokens_of_a_round():
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)
