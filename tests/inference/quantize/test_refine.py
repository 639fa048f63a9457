"""Refined scales lose less on average, never more in any group, and stay the same kind of codes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.inference.errors import InvalidArrayError, InvalidSettingError, NotFiniteError
from seawall.inference.quantize import dequantize, errors, quantize, refine

RNG = np.random.default_rng(11)
NORMAL = RNG.normal(size=(64, 256)).astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "symmetric", "gain"),
    [
        ("int8", True, 1.03),
        ("int8", False, 1.03),
        ("int4", True, 1.1),
        ("int4", False, 1.05),
        ("int2", True, 2),
        ("int2", False, 1.3),
    ],
)
def test_blocks_of_normal_weights_lose_less(dtype, symmetric, gain):
    rounded = quantize(NORMAL, dtype=dtype, symmetric=symmetric, block_size=32)
    refined = refine(NORMAL, rounded)
    assert errors(NORMAL, dequantize(rounded)).mse > gain * errors(NORMAL, dequantize(refined)).mse
    assert rounded.scheme == refined.scheme
    assert rounded.nbytes == refined.nbytes


@given(
    st.integers(0, 1000),
    st.sampled_from(["int8", "int4", "int2"]),
    st.booleans(),
    st.sampled_from(["axis", "block", "tensor"]),
)
@settings(deadline=None, max_examples=60)
def test_no_group_ever_loses_more(seed, dtype, symmetric, sharing):
    rng = np.random.default_rng(seed)
    array = (rng.standard_t(2, size=(4, 13)) * 10.0 ** rng.integers(-30, 30)).astype(np.float32)
    array[rng.integers(4)] = 0
    shared = {"axis": {"axis": 0}, "block": {"block_size": 5}, "tensor": {}}[sharing]
    rounded = quantize(array, dtype=dtype, symmetric=symmetric, **shared)
    refined = refine(array, rounded)
    before, after = (np.square(dequantize(q).astype(np.float64) - array) for q in (rounded, refined))
    if sharing == "block":
        before, after = (np.add.reduceat(e, [0, 5, 10], axis=1) for e in (before, after))
    elif sharing == "axis":
        before, after = before.sum(axis=1), after.sum(axis=1)
    else:
        before, after = before.sum(), after.sum()
    assert np.all(after <= before * (1 + 1e-5))
    assert np.all(refined.scale > 0)
    lowest = {"int8": -128, "int4": -8, "int2": -2}[dtype]
    assert np.all((refined.data >= lowest + symmetric) & (refined.data < -lowest))


def test_an_outlier_is_clipped_where_the_rest_gains():
    array = RNG.normal(size=32).astype(np.float32)
    array[3] = 4.0
    rounded = quantize(array, dtype="int2", block_size=32)
    refined = refine(array, rounded)
    assert refined.scale[0] < rounded.scale[0]
    assert abs(dequantize(refined)[3] - 4.0) > refined.scale[0] / 2


def test_the_rounded_weights_are_not_touched():
    rounded = quantize(NORMAL, dtype="int4", block_size=32)
    data, scale = rounded.data.copy(), rounded.scale.copy()
    refine(NORMAL, rounded)
    assert np.array_equal(data, rounded.data)
    assert np.array_equal(scale, rounded.scale)


def test_the_zero_point_moves_where_that_helps():
    rounded = quantize(NORMAL, dtype="int2", symmetric=False, block_size=32)
    assert np.any(rounded.zero_point != refine(NORMAL, rounded).zero_point)


@pytest.mark.parametrize("value", [1e-38, -2e-38, 3.4e38])
def test_scales_stay_normal_and_finite_at_the_ends_of_float32(value):
    array = (RNG.uniform(0.1, 1, size=64) * value).astype(np.float32)
    for dtype in ("int4", "int2"):
        refined = refine(array, quantize(array, dtype=dtype, block_size=16))
        assert np.isfinite(refined.scale).all()
        assert np.all(refined.scale >= np.finfo(np.float32).tiny)


@pytest.mark.parametrize("sharing", [{}, {"axis": 0}, {"block_size": 4}])
def test_an_empty_array_has_nothing_to_refine(sharing):
    empty = np.zeros((3, 0), np.float32)
    refined = refine(empty, quantize(empty, symmetric=False, **sharing))
    assert (3, 0) == refined.data.shape


def test_what_cannot_be_refined_is_refused():
    with pytest.raises(InvalidSettingError, match="integer codes, got float8_e4m3fn"):
        refine(NORMAL, quantize(NORMAL, dtype="float8_e4m3fn"))
    with pytest.raises(InvalidArrayError, match=r"shape \(64, 256\), got \(64,\)"):
        refine(NORMAL[:, 0], quantize(NORMAL))
    with pytest.raises(InvalidSettingError, match="at least 1, got 0"):
        refine(NORMAL, quantize(NORMAL), rounds=0)
    with pytest.raises(NotFiniteError):
        refine(np.full_like(NORMAL, np.nan), quantize(NORMAL))
