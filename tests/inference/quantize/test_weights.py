"""A weight rounded to blocks comes back near, and each method beats plain rounding at what it minimises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.inference.errors import InvalidArrayError, InvalidSettingError, NotFiniteError
from seawall.inference.models.packing import pack, unpack
from seawall.inference.quantize import ROUNDINGS, InputStatistics, errors, round_weight
from seawall.inference.quantize.gptq import output_error, shrunk

RNG = np.random.default_rng(5)


def weights_and_inputs(seed, rows=12, columns=70, samples=200):
    rng = np.random.default_rng(seed)
    weights = (rng.standard_t(3, (rows, columns)) * 10.0 ** rng.integers(-12, 12)).astype(np.float32)
    weights[rng.integers(rows)] = 0
    mixing = rng.normal(size=(columns, columns)) * np.exp(rng.normal(size=columns))
    return weights, (rng.normal(size=(samples, columns)) @ mixing).astype(np.float32)


def back(weights, **settings):
    return unpack(round_weight(weights, **settings)).astype(np.float64)


seeds = st.integers(0, 10_000)
bits_and_blocks = st.sampled_from([(2, 16), (4, 16), (4, 32), (4, 64), (8, 32)])


@given(seeds, bits_and_blocks, st.booleans())
@settings(deadline=None, max_examples=60)
def test_plain_rounding_keeps_every_weight_within_half_a_step(seed, shape, asymmetric):
    weights, _ = weights_and_inputs(seed)
    bits, block = shape
    packed = round_weight(weights, bits=bits, block=block, asymmetric=asymmetric)
    steps = np.repeat(np.abs(packed.scales), block, axis=1)[:, : weights.shape[1]].astype(np.float64)
    lost = np.abs(unpack(packed) - weights)
    # The symmetric range lacks one end, and a zero point is rounded as well: each may cost another half step.
    assert np.all(lost <= steps * 1.001)
    assert np.mean(lost <= steps * 0.501) > 0.8


@given(seeds, bits_and_blocks, st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_searched_range_never_loses_more_squares_in_any_block(seed, shape, asymmetric):
    weights, _ = weights_and_inputs(seed, columns=64)
    bits, block = shape
    plain, searched = (
        np.square(back(weights, bits=bits, block=block, rounding=rounding, asymmetric=asymmetric) - weights)
        .reshape(len(weights), -1, block)
        .sum(axis=2)
        for rounding in ("rtn", "mse")
    )
    assert np.all(searched <= plain * (1 + 1e-4))


@given(seeds, bits_and_blocks, st.booleans())
@settings(deadline=None, max_examples=25)
def test_hqq_never_has_a_larger_norm_of_power_07_in_any_block(seed, shape, asymmetric):
    weights, _ = weights_and_inputs(seed, columns=64)
    bits, block = shape
    plain, hqq = (
        (np.abs(back(weights, bits=bits, block=block, rounding=rounding, asymmetric=asymmetric) - weights) ** 0.7)
        .reshape(len(weights), -1, block)
        .sum(axis=2)
        for rounding in ("rtn", "hqq")
    )
    assert np.all(hqq <= plain * (1 + 1e-4))


@given(seeds, bits_and_blocks, st.booleans())
@settings(deadline=None, max_examples=25)
def test_gptq_never_has_a_larger_output_error_in_any_row(seed, shape, asymmetric):
    weights, inputs = weights_and_inputs(seed)
    bits, block = shape
    statistics = InputStatistics.of(inputs)
    hessian = statistics.hessian.astype(np.float64)
    plain, gptq = (
        output_error(
            back(weights, bits=bits, block=block, rounding=rounding, asymmetric=asymmetric, statistics=statistics)
            - weights,
            hessian,
        )
        for rounding in ("rtn", "gptq")
    )
    assert np.all(gptq <= plain * (1 + 1e-3))


@pytest.mark.parametrize(("rounding", "gain"), [("mse", 1.1), ("hqq", 1.05), ("kquant", 1.1), ("gptq", 3)])
def test_outputs_are_nearer_than_by_plain_rounding(rounding, gain):
    mixing = RNG.normal(size=(96, 24)) @ RNG.normal(size=(24, 96))  # inputs that depend on each other
    inputs = (RNG.normal(size=(500, 24)) @ mixing[:24] + 0.1 * RNG.normal(size=(500, 96))).astype(np.float32)
    weights = RNG.normal(size=(64, 96)).astype(np.float32)
    statistics = InputStatistics.of(inputs)
    exact = inputs @ weights.T
    lost = {
        name: errors(exact, inputs @ unpack(round_weight(weights, rounding=name, statistics=statistics)).T).mse
        for name in ("rtn", rounding)
    }
    assert lost["rtn"] > gain * lost[rounding]


def test_weights_of_inputs_that_matter_are_kept_best():
    """k-quant takes the importance of each input into account."""
    weights = RNG.normal(size=(64, 64)).astype(np.float32)
    inputs = RNG.normal(size=(100, 64)).astype(np.float32)
    inputs[:, ::8] *= 30
    statistics = InputStatistics.of(inputs, hessian=False)
    blind = back(weights, rounding="kquant", asymmetric=True) - weights
    seeing = back(weights, rounding="kquant", asymmetric=True, statistics=statistics) - weights
    assert np.square(blind[:, ::8]).mean() > 1.5 * np.square(seeing[:, ::8]).mean()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_zeros_stay_zeros_and_codes_fill_the_form(rounding, asymmetric):
    weights = np.zeros((3, 70), np.float32)
    weights[1, 40] = 2
    statistics = InputStatistics.of(RNG.normal(size=(50, 70)))
    packed = round_weight(weights, bits=4, rounding=rounding, asymmetric=asymmetric, statistics=statistics)
    assert (3, 3, 16) == packed.data.shape
    assert (3, 3) == packed.scales.shape
    assert ((3, 2) if asymmetric else None) == (packed.zero_points.shape if asymmetric else packed.zero_points)
    kept = unpack(packed)
    assert np.array_equal(weights == 0, kept == 0)
    assert abs(kept[1, 40] - 2) < 0.3


def test_plain_symmetric_rounding_is_what_a_converted_model_has():
    weights = RNG.normal(size=(8, 100)).astype(np.float32)
    ours, theirs = round_weight(weights, bits=4, block=32), pack(weights, bits=4, block=32)
    assert np.array_equal(ours.data, theirs.data)
    assert np.array_equal(ours.scales, theirs.scales)


def test_rounding_what_came_back_changes_nothing():
    once = back(RNG.normal(size=(8, 64)).astype(np.float32)).astype(np.float32)
    assert np.array_equal(once, back(once))


def test_statistics_are_those_of_the_inputs():
    inputs = RNG.normal(size=(5, 7, 3)).astype(np.float32)
    rows = inputs.reshape(-1, 3)
    statistics = InputStatistics.of(inputs)
    assert 35 == statistics.rows
    assert np.allclose(statistics.hessian, rows.T @ rows / 35, atol=1e-5)
    assert np.allclose(statistics.mean_square, np.diag(statistics.hessian), atol=1e-5)
    assert np.array_equal(statistics.low, rows.min(axis=0))
    halved = InputStatistics.of(inputs / np.float32(2))
    divided = statistics.divided(np.full(3, 2, np.float32))
    assert np.allclose(halved.hessian, divided.hessian)
    assert np.allclose(halved.mean_absolute, divided.mean_absolute)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"bits": 3}, InvalidSettingError, "bits must be 2, 4 or 8"),
        ({"block": 24}, InvalidSettingError, "power of two of at least 16"),
        ({"rounding": "best"}, InvalidSettingError, "rounding must be one of rtn, mse"),
        ({"rounding": "gptq"}, InvalidSettingError, "needs statistics with a Hessian"),
        (
            {"rounding": "gptq", "statistics": InputStatistics.of(np.ones((2, 64)), hessian=False)},
            InvalidSettingError,
            "Hessian",
        ),
        ({"statistics": InputStatistics.of(np.ones((2, 5)))}, InvalidArrayError, "of 5 inputs, the matrix takes 64"),
    ],
)
def test_a_wrong_setting_says_the_rule(wrong, error, message):
    with pytest.raises(error, match=message):
        round_weight(np.ones((2, 64), np.float32), **wrong)


def test_what_is_no_matrix_of_finite_floats_is_refused():
    with pytest.raises(InvalidArrayError, match="matrix"):
        round_weight(np.ones(64, np.float32))
    with pytest.raises(InvalidArrayError, match="got int64"):
        round_weight(np.ones((2, 64), np.int64))
    broken = np.ones((2, 64), np.float32)
    broken[1, 3] = np.nan
    with pytest.raises(NotFiniteError, match=r"first at \[1, 3\]"):
        round_weight(broken)


def test_what_few_rows_seem_to_say_is_believed_less():
    """On inputs that it has not seen, GPTQ after 40 rows is still better than plain rounding."""
    mixing = RNG.normal(size=(96, 96)) * np.exp(RNG.normal(size=96))
    seen, unseen = (RNG.normal(size=(rows, 96)) @ mixing for rows in (40, 2000))
    weights = RNG.normal(size=(64, 96)).astype(np.float32)
    statistics = InputStatistics.of(seen)
    lost = [
        errors(unseen @ weights.T, unseen @ back(weights, rounding=rounding, statistics=statistics).T).mse
        for rounding in ("rtn", "gptq")
    ]
    assert lost[0] > 1.1 * lost[1]
    hessian = statistics.hessian
    assert np.allclose(hessian, shrunk(hessian, 10**9), rtol=1e-5)
    assert np.array_equal(np.diag(hessian), np.diag(shrunk(hessian, 1)))
    assert np.allclose(shrunk(hessian, 96)[0, 1:], hessian[0, 1:] / 2)


def test_few_or_dependent_inputs_make_a_usable_hessian():
    """One row of calibration data, a dead channel and two equal ones: singular, and damped."""
    inputs = RNG.normal(size=(1, 64)).astype(np.float32)
    inputs[:, 3] = 0
    inputs[:, 5] = inputs[:, 6]
    weights = RNG.normal(size=(8, 64)).astype(np.float32)
    kept = back(weights, rounding="gptq", statistics=InputStatistics.of(inputs))
    assert np.isfinite(kept).all()
    assert np.abs((kept - weights) @ inputs[0]).max() < 0.5 * np.abs(back(weights) - weights).max() * 64
