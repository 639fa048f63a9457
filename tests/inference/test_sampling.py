"""Draws follow exactly the distribution that temperature, top_k, top_p and min_p describe."""

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.inference.errors import InvalidSettingError, RuntimeFailure
from seawall.inference.generate.choosing import Chooser, Penalties
from seawall.inference.generate.sampling import Greedy, Sampling, distribution, draw, greedy, noise


def plainly(logits, rules):
    """The same rules by full sorts in float64, in the order that is documented."""
    scaled = logits.astype(np.float64) / rules.temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-logits, kind="stable")
    kept = order[: rules.top_k] if rules.top_k else order
    shares = weights[kept] / weights[kept].sum()
    kept = kept[: np.count_nonzero(shares.cumsum() - shares < rules.top_p)]
    kept = kept[weights[kept] >= rules.min_p * weights.max()]
    expected = np.zeros(len(logits))
    expected[kept] = weights[kept] / weights[kept].sum()
    return expected


def spread(logits, rules):
    tokens, probabilities = distribution(logits, rules)
    found = np.zeros(len(logits))
    found[slice(None) if tokens is None else tokens] = probabilities
    return found


@given(
    seed=st.integers(0, 10_000),
    flatness=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 60, 500, 1000]),
    top_p=st.sampled_from([1.0, 0.999999, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 1e-9, 0.05, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_the_fast_path_keeps_exactly_what_full_sorts_keep(seed, flatness, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, flatness, 700).astype(np.float32)
    rules = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_allclose(spread(logits, rules), plainly(logits, rules), atol=2e-6)


@pytest.mark.parametrize(
    "rules", [Sampling(), Sampling(temperature=0.6, top_p=0.9), Sampling(top_k=7), Sampling(min_p=0.1)]
)
def test_a_hundred_thousand_draws_have_the_frequencies_of_the_distribution(rules):
    logits = np.random.default_rng(4).normal(0, 0.7, 40).astype(np.float32)
    expected = plainly(logits, rules) * 100_000
    counts = np.bincount([draw(logits, rules, 977 * place)[0] for place in range(100_000)], minlength=40)
    assert not counts[expected == 0].any()
    likely = expected > 0
    chi_square = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # 4 standard deviations


def test_far_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    logits = np.full(5_000, -14.0, dtype=np.float32)  # each e^-14 of the likeliest, together 0.4 %
    logits[7] = 0
    far = [token for key in range(20_000) if (token := draw(logits, Sampling(), 31 * key)[0]) != 7]
    assert 4_999 * np.exp(-14) * 20_000 == pytest.approx(83, abs=1)
    assert 50 < len(far) < 120
    assert len(set(far)) > 0.95 * len(far)


def test_two_models_that_nearly_agree_draw_the_same_token_from_the_same_key():
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, 300).astype(np.float32)
    near = logits + rng.normal(0, 0.05, 300).astype(np.float32)
    apart = np.abs(plainly(logits, Sampling()) - plainly(near, Sampling())).sum() / 2
    same = np.mean([draw(logits, Sampling(), key)[0] == draw(near, Sampling(), key)[0] for key in range(4_000)])
    assert same > (1 - apart) / (1 + apart) - 0.02
    apart_keys = np.mean(
        [draw(logits, Sampling(), key)[0] == draw(near, Sampling(), key + 400)[0] for key in range(400)]
    )
    assert apart_keys < 0.3


def test_the_largest_noise_wins_without_dividing_by_zero():
    word, largest = 1 << 64, (1 << 64) - 1
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):  # SplitMix64, backwards
        largest ^= largest >> shift ^ largest >> 2 * shift
        largest = largest * pow(factor, -1, word) % word
    assert noise(largest, np.array([0]))[0] > 0
    assert draw(np.zeros(9, np.float32), Sampling(), largest)[0] == 0


def test_a_small_lead_says_that_little_noise_would_have_changed_the_choice():
    logits = np.array([3.0, 2.9, -5.0], dtype=np.float32)
    leads = [draw(logits, Sampling(), key)[1] for key in range(500)]
    assert min(leads) >= 0
    assert np.mean(np.array(leads) < 0.5) > 0.2
    assert Chooser(Greedy()).choose_with_lead(logits) == (0, pytest.approx(0.1, abs=1e-6))


@given(
    repetition=st.sampled_from([0.5, 1.0, 1.7]),
    presence=st.sampled_from([-1.0, 0.0, 2.0]),
    frequency=st.sampled_from([0.0, 0.7]),
    prompt=st.lists(st.integers(0, 9), max_size=6),
    answer=st.lists(st.integers(0, 9), max_size=6),
    cut=st.integers(0, 6),
)
def test_penalties_do_what_they_say_whether_tokens_are_decided_or_drafted(
    repetition, presence, frequency, prompt, answer, cut
):
    logits = np.linspace(-2, 2, 10, dtype=np.float32)
    expected = logits.astype(np.float64)
    for token in range(10):
        if token in prompt + answer:
            expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        expected[token] -= presence * (token in answer) + frequency * answer.count(token)
    chooser = Chooser(Sampling(), Penalties(repetition=repetition, presence=presence, frequency=frequency), prompt)
    for token in answer[:cut]:
        chooser.decide(token, logits)
    weights = np.exp(expected - expected.max())
    np.testing.assert_allclose(chooser.probabilities(logits, answer[cut:]), weights / weights.sum(), atol=1e-6)


def test_a_choice_depends_on_its_position_and_not_on_who_asks():
    logits = np.random.default_rng(3).normal(0, 1, 50).astype(np.float32)
    first, second = Chooser(Sampling(seed=4)), Chooser(Sampling(seed=4))
    drafted = [first.choose(logits, [0] * place) for place in range(30)]
    alone = []
    for _ in range(30):
        alone.append(second.choose(logits))
        second.decide(0, logits)
    assert drafted == alone
    assert len(set(alone)) > 5


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("repetition", 0),
        ("repetition", 1e-300),  # logits would be infinite, as if the model had failed
        ("repetition", 10**400),
        ("repetition", float("inf")),
        ("presence", 101),
        ("frequency", float("nan")),
        ("repetition", "1.1"),
        ("presence", None),
        ("frequency", True),
    ],
)
def test_a_penalty_out_of_range_is_refused_with_its_name_and_value(setting, value):
    with pytest.raises(InvalidSettingError, match=f"{setting} must be .*got {value!r}"):
        Penalties(**{setting: value})


def test_greedy_takes_the_first_of_the_likeliest():
    assert greedy(np.array([0, 3, 1, 3], dtype=np.float32)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_gives_nan_or_infinity_is_an_error_and_not_a_token(bad):
    logits = np.array([0, bad, 1], dtype=np.float32)
    with pytest.raises(RuntimeFailure, match="logit"):
        greedy(logits)
    with pytest.raises(RuntimeFailure, match="logit"):
        draw(logits, Sampling(), 0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", 0), ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1),
        ("min_p", 1.1), ("seed", -1), ("seed", 1.5), ("temperature", "0.8"), ("temperature", True), ("top_p", None),
        ("temperature", 5e-324), ("temperature", 1e300), ("temperature", 10**400), ("temperature", Fraction(1, 2)),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(setting, value):
    with pytest.raises(InvalidSettingError, match=f"{setting} must be .*got {re.escape(repr(value))}"):
        Sampling(**{setting: value})


@pytest.mark.parametrize("temperature", [1e-30, np.float32(1e-3), 1, 1e30])
@pytest.mark.parametrize("narrow", [{}, {"top_k": 10**30}, {"top_p": 5e-324}, {"min_p": 1e-320}, {"top_p": 0.5}])
def test_extreme_settings_choose_without_a_warning(temperature, narrow):
    logits = np.random.default_rng(0).normal(0, 40, 999).astype(np.float32)
    logits[::3] = -np.inf
    chooser = Chooser(Sampling(temperature=temperature, seed=1, **narrow))
    token, _ = chooser.choose_with_lead(logits)
    chances = chooser.probabilities(logits)
    assert chances[token] > 0
    assert chances.sum() == pytest.approx(1)
    assert not chances[::3].any()


def test_how_likely_an_unlikely_token_is_needs_no_large_number():
    assert Chooser(Greedy()).likelihood(np.array([0, 200, 201], np.float32), 0) == pytest.approx(0, abs=1e-30)
