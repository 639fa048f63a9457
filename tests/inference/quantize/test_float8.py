"""E4M3 and E5M2 bit for bit: every code, every float16, random and awkward float32, against two other codecs."""

import functools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from seawall.inference.errors import InvalidArrayError
from seawall.inference.quantize import decode_e4m3, decode_e5m2, encode_e4m3, encode_e5m2

E4M3 = (encode_e4m3, decode_e4m3, ml_dtypes.float8_e4m3fn, TensorProto.FLOAT8E4M3FN, 448.0)
E5M2 = (encode_e5m2, decode_e5m2, ml_dtypes.float8_e5m2, TensorProto.FLOAT8E5M2, 57344.0)
BOTH = pytest.mark.parametrize(("encode", "decode", "dtype", "kind", "largest"), [E4M3, E5M2], ids=["e4m3", "e5m2"])
SATURATE = pytest.mark.parametrize("saturate", [True, False])

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


@functools.cache
def singles():
    """Edges and 200,000 random bit patterns of float32."""
    rng = np.random.default_rng(20261124)
    codes = np.arange(256, dtype=np.uint8)
    grid = np.concatenate([codes.view(d).astype(np.float32) for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)])
    grid = np.unique(grid[np.isfinite(grid)])
    ties = (grid[1:] + grid[:-1]) / 2
    edges = np.concatenate(
        [grid, ties, [448, 464, 480, 496, 57344, 61440, 65536, 2**-10, 2**-17, 3.4028235e38, 1e-45, 1.1754944e-38]]
    ).astype(np.float32)
    with np.errstate(over="ignore"):
        around = [edges, *(np.nextafter(edges, np.float32(side)) for side in (np.inf, -np.inf))]
    random = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    near = (rng.normal(size=50_000) * 2.0 ** rng.integers(-20, 20, 50_000)).astype(np.float32)
    specials = np.array(
        [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7F800000, 0xFF800000, 0, 0x80000000], np.uint32
    )
    return np.concatenate([*around, random, near, specials.view(np.float32), -edges])


def theirs(values, dtype, largest, saturate):
    """ml_dtypes, which does not saturate, behind the rule of ONNX for saturate=1."""
    with np.errstate(invalid="ignore", over="ignore"):
        wide = values.astype(np.float32)
        return (np.clip(wide, -largest, largest) if saturate else wide).astype(dtype).view(np.uint8)


def cast(values, kind, saturate):
    """What the reference implementation of ONNX's own Cast makes of float32 values."""
    node = helper.make_node("Cast", ["x"], ["y"], to=kind, saturate=int(saturate))
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", kind, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(ReferenceEvaluator(model).run(None, {"x": values})[0]).view(np.uint8)


@BOTH
def test_all_256_codes_decode_as_ml_dtypes_does(encode, decode, dtype, kind, largest):
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(codes.view(dtype).astype(np.float32), decode(codes), equal_nan=True)
    assert np.float32 == decode(codes).dtype
    assert largest == np.nanmax(np.where(np.isinf(decode(codes)), np.nan, decode(codes)))


@BOTH
@SATURATE
def test_every_code_that_is_a_number_encodes_to_itself(encode, decode, dtype, kind, largest, saturate):
    codes = np.arange(256, dtype=np.uint8)
    values = decode(codes)
    numbers = np.isfinite(values)
    assert np.array_equal(codes[numbers], encode(values, saturate=saturate)[numbers])
    assert np.isnan(decode(encode(values, saturate=saturate)[np.isnan(values)])).all()


@BOTH
@SATURATE
def test_all_65536_halves_encode_as_ml_dtypes_does(encode, decode, dtype, kind, largest, saturate):
    expected = theirs(HALVES, dtype, largest, saturate)
    assert np.array_equal(expected, encode(HALVES, saturate=saturate))


@BOTH
@SATURATE
def test_float32_edges_and_random_bits_encode_as_ml_dtypes_does(encode, decode, dtype, kind, largest, saturate):
    values = singles()
    expected = theirs(values, dtype, largest, saturate)
    assert np.array_equal(expected, encode(values, saturate=saturate))


@BOTH
@SATURATE
def test_float32_and_halves_encode_as_the_reference_cast_of_onnx(encode, decode, dtype, kind, largest, saturate):
    for values in (singles(), HALVES.astype(np.float32)):
        assert np.array_equal(cast(values, kind, saturate), encode(values, saturate=saturate))


@BOTH
@SATURATE
def test_every_bfloat16_encodes_as_ml_dtypes_does(encode, decode, dtype, kind, largest, saturate):
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    assert np.array_equal(theirs(values, dtype, largest, saturate), encode(values, saturate=saturate))


@BOTH
def test_the_table_of_the_onnx_cast_holds(encode, decode, dtype, kind, largest):
    over = [np.inf, -np.inf, 1e30, -1e30]
    given = np.array([*over, np.nan, 0.0, -0.0], np.float32)
    assert [largest, -largest, largest, -largest] == decode(encode(given))[:4].tolist()
    assert np.isnan(decode(encode(given))[4])
    assert [0x00, 0x80] == encode(given)[5:].tolist()
    raw = decode(encode(given, saturate=False))
    assert np.isnan(raw[:4]).all() if kind == TensorProto.FLOAT8E4M3FN else raw[:4].tolist() == 2 * [np.inf, -np.inf]
    assert np.isnan(raw[4])


def test_without_saturation_448_and_57344_hold_until_they_stop_being_the_nearest():
    e4m3 = decode_e4m3(encode_e4m3(np.array([448, 464, np.nextafter(464, 500), 480, 496]), saturate=False))
    assert [448, 448] == e4m3[:2].tolist()
    assert np.isnan(e4m3[2:]).all()
    e5m2 = decode_e5m2(encode_e5m2(np.array([57344, np.nextafter(61440, 0), 61440, 65535]), saturate=False))
    assert [57344, 57344, np.inf, np.inf] == e5m2.tolist()


@BOTH
def test_ties_go_to_the_even_code(encode, decode, dtype, kind, largest):
    codes = np.arange(127 if kind == TensorProto.FLOAT8E4M3FN else 124, dtype=np.uint8)
    values = decode(codes).astype(np.float64)
    ties = (values[1:] + values[:-1]) / 2
    even = np.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    for sign, bit in ((1, 0), (-1, 0x80)):
        assert np.array_equal(even | bit, encode(sign * ties))
        assert np.array_equal(codes[1:] | bit, encode(sign * np.nextafter(ties, np.inf)))
        assert np.array_equal(codes[:-1] | bit, encode(sign * np.nextafter(ties, 0)))


@BOTH
def test_float64_is_rounded_once(encode, decode, dtype, kind, largest):
    rng = np.random.default_rng(7)
    grid = decode(np.arange(120, dtype=np.uint8)).astype(np.float64)
    tie = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate([tie * (1 + side * 2.0**-45) for side in (-1, 1)])  # float32 cannot tell these from a tie
    values = np.concatenate([values, rng.normal(size=100), [1e300, -1e300, 1e-300]])
    exact = [Fraction(value) for value in grid.tolist()]
    for value, code in zip(values.tolist(), encode(values).tolist(), strict=True):
        if abs(value) <= grid[-1]:
            nearest = min(range(len(exact)), key=lambda at: (abs(exact[at] - abs(Fraction(value))), at % 2))
            assert nearest == code & 0x7F
    assert [largest, -largest, 0.0] == decode(encode(values))[-3:].tolist()


@BOTH
def test_layout_and_byte_order_do_not_matter(encode, decode, dtype, kind, largest):
    values = np.random.default_rng(8).normal(size=(70, 1000)).astype(np.float32)
    codes = encode(values)
    assert (70, 1000) == codes.shape
    assert np.array_equal(codes.T, encode(values.T))
    assert np.array_equal(codes[::-1, ::3], encode(values[::-1, ::3]))
    assert np.array_equal(codes, encode(values.astype(">f4")))
    assert np.array_equal(codes, encode(values.astype(">f8")))
    assert () == encode(np.float32(1)).shape
    assert (0, 3) == encode(np.zeros((0, 3), np.float32)).shape == decode(np.zeros((0, 3), np.uint8)).shape


@BOTH
def test_integers_are_no_values_and_floats_no_codes(encode, decode, dtype, kind, largest):
    with pytest.raises(InvalidArrayError, match="expected float16"):
        encode(np.zeros(3, np.int8))
    with pytest.raises(InvalidArrayError, match=r"view\(np.uint8\)"):
        decode(np.zeros(3, dtype))
