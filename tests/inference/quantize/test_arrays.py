"""Quantized arrays come back to within half a step, whatever their shape, type and values."""

import dataclasses

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from seawall.inference.errors import InvalidArrayError, InvalidSettingError, ModelError, NotFiniteError
from seawall.inference.quantize import Quantized, Scheme, dequantize, quantize

INTEGERS = [
    {"dtype": dtype, "symmetric": symmetric} for dtype in ("int8", "int4", "int2") for symmetric in (True, False)
]
FLOATS = [{"dtype": "float8_e4m3fn"}, {"dtype": "float8_e5m2"}]
HIGHEST = {"int8": 127, "int4": 7, "int2": 1}
RELATIVE = {"float8_e4m3fn": (2.0**-4, 2.0**-10), "float8_e5m2": (2.0**-3, 2.0**-17)}
LARGEST = {"float8_e4m3fn": 448, "float8_e5m2": 57344}


@st.composite
def arrays(draw):
    """Arrays of up to three axes, of every float type, order and layout, from denormal to the largest values."""
    dtype = np.dtype(draw(st.sampled_from(["<f2", "<f4", ">f4", "<f8", ">f8", "bfloat16"])))
    base = np.dtype("f4") if dtype.name == "bfloat16" else dtype.newbyteorder("=")
    limit = float(np.finfo(base).max) / (2 if dtype.name == "bfloat16" else 1)  # rounding up must not reach infinity
    top = draw(st.sampled_from([1.0, limit, float(np.finfo(base).tiny) * 300]))
    elements = st.floats(-min(top, limit), min(top, limit), width=base.itemsize * 8)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7))
    array = draw(hnp.arrays(base, shape, elements=elements | st.just(0.0))).astype(dtype)
    if array.ndim > 1 and draw(st.booleans()):
        array = array.T
    if array.ndim and draw(st.booleans()):
        array = array[::-1]
    return array


@st.composite
def scenes(draw, kinds=(*INTEGERS, *FLOATS)):
    """An array and a scheme that fits it."""
    array = draw(arrays())
    settings = dict(draw(st.sampled_from(kinds)))
    sharing = draw(st.sampled_from(["tensor", "channel", "block"])) if array.ndim else "tensor"
    if sharing == "channel":
        settings["axis"] = draw(st.integers(-array.ndim, array.ndim - 1))
    if sharing == "block":
        settings["block_size"] = draw(st.integers(1, 9))
    return array, settings


def spread(quantized, per_group):
    """The value of each group at each of its elements."""
    shape, scheme = quantized.data.shape, quantized.scheme
    if scheme.block_size is not None:
        return np.repeat(per_group, min(scheme.block_size, shape[-1]), axis=-1)[..., : shape[-1]]
    if scheme.axis is None:
        return np.broadcast_to(per_group, shape)
    return np.broadcast_to(
        per_group.reshape([-1 if i == scheme.axis % len(shape) else 1 for i in range(len(shape))]), shape
    )


def group_largest(array, quantized):
    """The largest magnitude among the values that share a scale, at each element; slow and simple."""
    ids = spread(quantized, np.arange(quantized.scale.size).reshape(quantized.scale.shape))
    exact = np.abs(array.astype(np.longdouble))
    largest = np.zeros(max(quantized.scale.size, 1), np.longdouble)
    np.maximum.at(largest, ids.reshape(-1), exact.reshape(-1))
    return largest[ids]


@given(scenes(INTEGERS))
@settings(deadline=None, max_examples=400)
def test_every_value_comes_back_to_within_half_a_step(scene):
    array, scheme = scene
    quantized = quantize(array, **scheme)
    back = dequantize(quantized)
    assert array.shape == back.shape == quantized.data.shape
    assert np.isfinite(back).all()
    off = np.abs(back.astype(np.longdouble) - array.astype(np.longdouble))
    rounding = 8 * np.finfo(back.dtype).eps * group_largest(array, quantized)
    assert np.all(off <= spread(quantized, quantized.scale) / 2 + rounding)


@given(scenes(FLOATS))
@settings(deadline=None, max_examples=400)
def test_eight_bit_floats_keep_the_relative_bound(scene):
    array, scheme = scene
    quantized = quantize(array, **scheme)
    back = dequantize(quantized)
    assert np.isfinite(back).all()
    exact = array.astype(np.longdouble)
    relative, absolute = RELATIVE[scheme["dtype"]]
    off = np.abs(back.astype(np.longdouble) - exact)
    limits = np.finfo(back.dtype)
    bound = np.maximum(np.abs(exact) * relative, spread(quantized, quantized.scale).astype(np.longdouble) * absolute)
    assert np.all(off <= bound * (1 + 8 * limits.eps) + limits.smallest_subnormal)


@given(scenes())
@settings(deadline=None, max_examples=400)
def test_quantizing_what_came_back_gives_the_same_codes(scene):
    array, scheme = scene
    once = quantize(array, **scheme)
    again = quantize(dequantize(once), **scheme)
    nonzero = spread(once, np.array(once.scale)) > 0
    assert nonzero.all()
    assert np.array_equal(once.data, again.data)
    if once.zero_point is not None:
        assert np.array_equal(once.zero_point, again.zero_point)


@given(scenes())
@settings(deadline=None, max_examples=200)
def test_larger_values_of_a_group_never_come_back_smaller(scene):
    array, scheme = scene
    quantized = quantize(array, **scheme)
    ids = spread(quantized, np.arange(quantized.scale.size).reshape(quantized.scale.shape)).reshape(-1)
    values, back = array.astype(np.float64).reshape(-1), dequantize(quantized).astype(np.float64).reshape(-1)
    order = np.lexsort((values, ids))
    same = ids[order][1:] == ids[order][:-1]
    assert np.all(np.diff(back[order])[same] >= 0)


@given(scenes())
@settings(deadline=None, max_examples=200)
def test_zeros_come_back_as_zeros_and_the_input_stays_as_it_was(scene):
    array, scheme = scene
    before = array.copy()
    back = dequantize(quantize(array, **scheme))
    assert np.array_equal(before, array)
    assert not back[array == 0].any()


@given(scenes(INTEGERS))
@settings(deadline=None, max_examples=200)
def test_codes_stay_within_their_bits_and_symmetric_ones_leave_the_lowest_out(scene):
    array, scheme = scene
    codes = quantize(array, **scheme).data
    highest = HIGHEST[scheme["dtype"]]
    lowest = -highest if scheme["symmetric"] else -highest - 1
    assert np.all((lowest <= codes) & (codes <= highest))
    assert np.int8 == codes.dtype


@given(st.data())
@settings(deadline=None)
def test_integers_up_to_the_highest_code_stay_what_they_are(data):
    dtype = data.draw(st.sampled_from(sorted(HIGHEST)))
    highest, symmetric = HIGHEST[dtype], data.draw(st.booleans())
    lowest = -highest if symmetric else -highest - 1
    values = np.array([lowest, highest, *data.draw(st.lists(st.integers(lowest, highest)))], np.float32)
    step = np.float32(2.0 ** data.draw(st.integers(-60, 60)))
    quantized = quantize(values * step, dtype=dtype, symmetric=symmetric)
    assert step == quantized.scale
    assert np.array_equal(values, quantized.data)
    assert np.array_equal(values * step, dequantize(quantized))


def test_both_ends_half_way_between_codes_do_not_shrink_the_range_the_second_time():
    for low, high in ((-100.5, 154.5), (-54.5, 200.5), (-0.5, 254.5)):
        once = quantize(np.array([low, high, 3.0], np.float32), symmetric=False)
        again = quantize(dequantize(once), symmetric=False)
        assert np.array_equal(once.data, again.data)
        assert {-128, 127} <= set(once.data.tolist())


def test_a_short_last_block_has_a_scale_of_its_own():
    array = np.array([[1, 1, 1, 1, 100], [2, 2, 2, 2, 200]], np.float32)
    quantized = quantize(array, block_size=4)
    assert (2, 2) == quantized.scale.shape
    assert np.array_equal(array, dequantize(quantized))
    assert np.array_equal(np.full((2, 5), 127), quantized.data)
    assert quantized.data.flags.c_contiguous


def test_each_channel_has_its_own_scale_whichever_axis_it_is():
    array = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    for axis in (0, 1, 2, -1, -2, -3):
        channels = np.moveaxis(quantize(array, axis=axis).data, axis, 0)
        for channel, alone in zip(channels, np.moveaxis(array, axis, 0), strict=True):
            assert np.array_equal(quantize(alone).data, channel)


@pytest.mark.parametrize("shape", [(1, 100_003), (70_001, 3), (3, 40_000, 2), (40_000,), (129, 1024)])
@pytest.mark.parametrize("sharing", [{}, {"axis": 0}, {"axis": -1}, {"block_size": 32}, {"block_size": 40_000}])
@pytest.mark.parametrize("symmetric", [True, False])
def test_arrays_larger_than_a_tile_match_the_formula(shape, sharing, symmetric):
    array = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    quantized = quantize(array, symmetric=symmetric, **sharing)
    scale = spread(quantized, quantized.scale)
    zero_point = 0 if symmetric else spread(quantized, quantized.zero_point).astype(np.float32)
    expected = np.clip(np.rint(array / scale) + zero_point, -127 if symmetric else -128, 127)
    assert np.array_equal(expected, quantized.data)
    assert np.array_equal((quantized.data - np.float32(zero_point)) * scale, dequantize(quantized))
    largest = group_largest(array, quantized)
    if symmetric:
        assert np.array_equal(scale, largest.astype(np.float32) / np.float32(127))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_codes_and_values_are_those_of_onnx_quantize_linear(dtype, symmetric, axis):
    array = np.random.default_rng(4).normal(size=(6, 10)).astype(np.float32)
    array[:, 0] = np.arange(6) * 0.5  # ties
    quantized = quantize(array, dtype=dtype, symmetric=symmetric, axis=axis)
    kind = {"int8": TensorProto.INT8, "int4": TensorProto.INT4}[dtype]
    zero_point = np.zeros_like(quantized.scale, np.int8) if symmetric else quantized.zero_point
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
        helper.make_node("Cast", ["q"], ["codes"], to=TensorProto.INT8),
    ]
    initializers = [
        onnx.numpy_helper.from_array(quantized.scale, "s"),
        helper.make_tensor("z", kind, quantized.scale.shape, zero_point.reshape(-1).tolist()),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, array.shape)],
        [helper.make_tensor_value_info("codes", TensorProto.INT8, None),
         helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], initializers,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    codes, values = ReferenceEvaluator(model).run(None, {"x": array})
    assert np.array_equal(np.clip(codes, -HIGHEST[dtype] if symmetric else -128, None), quantized.data)
    assert np.array_equal(values, dequantize(quantized))


@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize("sharing", [{}, {"axis": 0}, {"axis": -1}, {"block_size": 4}])
def test_an_empty_array_stays_empty_with_scale_1(kind, shape, sharing):
    quantized = quantize(np.zeros(shape, np.float32), **kind, **sharing)
    assert shape == quantized.data.shape == dequantize(quantized).shape
    assert np.all(quantized.scale == 1)


@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
def test_all_zeros_stay_zeros_with_scale_1(kind):
    quantized = quantize(np.zeros((2, 8), np.float32), **kind, block_size=4)
    assert np.all(quantized.scale == 1)
    assert not dequantize(quantized).any()


@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("value", [3.0, -0.1, 1e-44, -1e-38, 3.4028235e38, -3.4028235e38])
def test_a_constant_comes_back_within_the_rounding_of_the_arithmetic_or_half_the_smallest_step(kind, value):
    constant = np.full(5, value, np.float32)
    back = dequantize(quantize(constant, **kind))
    limits = np.finfo(np.float32)
    assert np.allclose(back, constant, rtol=4 * limits.eps, atol=float(limits.tiny) / 2)


def test_a_range_wider_than_float32_is_quantized_all_the_same():
    largest = np.finfo(np.float32).max
    back = dequantize(quantize(np.array([-largest, largest, largest / 3], np.float32), symmetric=False))
    assert np.isfinite(back).all()
    assert np.all(np.abs(back / largest - [-1, 1, 1 / 3]) < 1 / 255)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bfloat16"])
@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
def test_not_finite_values_are_refused_with_where_they_are(bad, dtype, kind):
    array = np.ones((3, 4), dtype)
    array[1, 2] = array[2, 3] = bad
    with pytest.raises(NotFiniteError, match=r"2 NaN or infinite, the first at \[1, 2\]") as caught:
        quantize(array, **kind, axis=0)
    assert (2, (1, 2)) == (caught.value.count, caught.value.index)


@pytest.mark.parametrize(
    "dtype", ["i1", "u1", "i4", "i8", "?", "c8", "O", "U3", np.longdouble, ml_dtypes.float8_e4m3fn]
)
def test_what_is_no_array_of_floats_is_refused(dtype):
    with pytest.raises(InvalidArrayError, match="expected float16, bfloat16, float32 or float64"):
        quantize(np.zeros(3, dtype))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int3"}, "one of int8, int4, int2, float8_e4m3fn, float8_e5m2, got 'int3'"),
        ({"dtype": 4}, "got 4"),
        ({"dtype": "float8_e5m2", "symmetric": False}, "symmetric must be True"),
        ({"axis": 2}, r"one of the 2 axes of shape \(2, 3\), got 2"),
        ({"axis": -3}, "got -3"),
        ({"axis": 1.0}, "integer, got 1.0"),
        ({"axis": True}, "integer, got True"),
        ({"block_size": 0}, "at least 1, got 0"),
        ({"block_size": -4}, "at least 1, got -4"),
        ({"block_size": 2.0}, "got 2.0"),
        ({"axis": 0, "block_size": 2}, "not both"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_value(settings, message):
    with pytest.raises(InvalidSettingError, match=message) as caught:
        quantize(np.ones((2, 3), np.float32), **settings)
    assert isinstance(caught.value, ModelError)


@pytest.mark.parametrize("settings", [{"axis": 0}, {"block_size": 4}])
def test_a_scalar_has_no_axis_to_share_scales_along(settings):
    with pytest.raises(InvalidSettingError, match=r"scalar|0 axes"):
        quantize(np.float32(1), **settings)


def test_what_does_not_fit_together_is_no_quantized_array():
    good = quantize(np.ones((2, 8), np.float32), dtype="int4", symmetric=False, block_size=4)
    for change, message in [
        ({"scale": np.ones(2, np.float32)}, r"scale must have the shape \(2, 2\)"),
        ({"zero_point": np.zeros((2, 1), np.int8)}, "zero_point must have the shape"),
        ({"zero_point": None}, "zero points go with asymmetric schemes"),
        ({"data": good.data.astype(np.int32)}, "codes of int4 are int8, got int32"),
        ({"scheme": Scheme(dtype="float8_e5m2", block_size=4)}, "codes of float8_e5m2 are uint8"),
    ]:
        with pytest.raises(InvalidArrayError, match=message):
            dataclasses.replace(good, **change)
    assert isinstance(good, Quantized)


def test_sizes_count_packed_codes_scales_and_zero_points():
    array = np.ones((3, 64), np.float32)
    assert 3 * 64 + 4 == quantize(array).nbytes
    assert 3 * 32 + 6 * 4 == quantize(array, dtype="int4", block_size=32).nbytes
    assert 3 * 32 + 3 + 6 * 4 == quantize(array, dtype="int4", symmetric=False, block_size=32).nbytes
    assert 3 * 16 + 6 * 4 == quantize(array, dtype="int2", block_size=32).nbytes


def test_a_scheme_is_labelled_and_int2_says_that_it_was_asked_for():
    array = np.ones((2, 8), np.float32)
    assert "int8, symmetric, per tensor" == str(quantize(array).scheme)
    assert "int4, asymmetric, per block of 4" == str(
        quantize(array, dtype="int4", symmetric=False, block_size=4).scheme
    )
    assert "opt-in" in str(quantize(array, dtype="int2", axis=0).scheme)


def test_float64_is_calculated_in_float64_and_the_rest_in_float32():
    assert np.float64 == dequantize(quantize(np.ones(3))).dtype
    for dtype in ("f2", "f4", ">f4", "bfloat16"):
        assert np.float32 == dequantize(quantize(np.ones(3, dtype))).dtype
