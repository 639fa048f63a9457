"""Measures of what was lost, checked against numbers worked out by hand and against each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.inference.errors import InvalidArrayError, NotFiniteError
from seawall.inference.quantize import dequantize, errors, kl_divergence, quantize, top1_agreement


def test_errors_are_those_worked_out_by_hand():
    found = errors(np.array([1.0, 2.0, -2.0]), np.array([1.0, 2.5, -3.0]))
    assert math.isclose(1.25 / 3, found.mse)
    assert 0.5 == found.mae
    assert 1.0 == found.max_error
    assert math.isclose(10 * math.log10(9 / 1.25), found.sqnr_db)


def test_errors_of_large_float16_arrays_are_summed_in_float64():
    reference = np.full(200_000, 60_000, np.float16)
    found = errors(reference, np.zeros_like(reference))
    assert (60_000.0**2, 60_000.0, 60_000.0) == (found.mse, found.mae, found.max_error)
    late = reference.copy()
    late[-1] = 0
    assert math.isclose(0.3, errors(reference, late).mae)


def test_equal_arrays_have_infinite_sqnr_and_a_lost_zero_has_minus_infinite():
    assert math.inf == errors(np.ones(3), np.ones(3)).sqnr_db
    assert math.inf == errors(np.zeros((0, 2)), np.zeros((0, 2))).sqnr_db
    assert -math.inf == errors(np.zeros(3), np.ones(3)).sqnr_db


def test_one_bit_more_is_worth_six_decibels():
    weights = np.random.default_rng(0).uniform(-1, 1, 100_000)
    found = {dtype: errors(weights, dequantize(quantize(weights, dtype=dtype))).sqnr_db for dtype in ("int8", "int4")}
    assert abs(found["int8"] - found["int4"] - 20 * math.log10(127 / 7)) < 0.1


def test_nan_is_refused_so_that_no_gate_compares_with_it():
    many = np.zeros(100_000)
    many[99_999] = np.nan
    with pytest.raises(NotFiniteError, match=r"the first at \[99999\]"):
        errors(many, np.zeros(100_000))
    with pytest.raises(NotFiniteError):
        errors(np.zeros(2), np.array([0, np.inf]))
    for bad in (np.nan, np.inf):
        with pytest.raises(NotFiniteError):
            kl_divergence(np.zeros((2, 3)), np.array([[0, 0, 0], [0, bad, 0]]))
        with pytest.raises(NotFiniteError):
            top1_agreement(np.array([bad, 0.0]), np.zeros(2))
    with pytest.raises(NotFiniteError):
        kl_divergence(np.full((1, 2), -np.inf), np.zeros((1, 2)))


def test_arrays_of_different_shapes_are_not_compared():
    for measure in (errors, kl_divergence, top1_agreement):
        with pytest.raises(InvalidArrayError, match=r"one shape, got \(2, 3\) and \(3,\)"):
            measure(np.zeros((2, 3)), np.zeros(3))
    for measure in (kl_divergence, top1_agreement):
        with pytest.raises(InvalidArrayError, match="vocabulary"):
            measure(np.zeros((2, 0)), np.zeros((2, 0)))


def test_the_divergence_is_that_of_the_probabilities():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    found = kl_divergence(np.log(p)[None] + 7.0, np.log(q)[None] - 3.0)
    assert (1,) == found.shape
    assert math.isclose(expected, found[0])


@given(st.integers(0, 10_000))
def test_the_divergence_is_never_negative_and_zero_for_the_same_prediction(seed):
    rng = np.random.default_rng(seed)
    first, second = (rng.normal(scale=30, size=(2, 3, 11)).astype(np.float32) for _ in range(2))
    assert np.all(kl_divergence(first, second) >= 0)
    assert np.allclose(0, kl_divergence(first, first + np.float32(5)), atol=1e-5)
    assert (2, 3) == kl_divergence(first, second).shape


def test_huge_logits_do_not_overflow():
    found = kl_divergence(np.array([[1e30, 0.0]]), np.array([[1e30, 1e29]]))
    assert 0 == found[0]


def test_a_token_that_cannot_come_costs_nothing_unless_only_the_candidate_rules_it_out():
    masked = np.array([0.0, 0.0, -np.inf])
    assert 0 == kl_divergence(masked, masked)
    assert math.isclose(math.log(1.5), kl_divergence(masked, np.zeros(3)))
    assert math.inf == kl_divergence(np.zeros(3), masked)


def test_agreement_is_the_fraction_of_equal_first_choices():
    reference = np.array([[1.0, 2.0], [5.0, 1.0], [3.0, 3.0], [0.0, 1.0]])
    candidate = np.array([[0.0, 9.0], [1.0, 5.0], [3.0, 3.0], [0.5, 0.6]])
    assert 0.75 == top1_agreement(reference, candidate)
    assert 1.0 == top1_agreement(np.zeros((0, 4)), np.zeros((0, 4)))
    assert 1.0 == top1_agreement([0.0, 1.0], [0.0, 2.0])
