"""Packed codes are the bytes that ONNX, ml_dtypes and MatMulNBits write."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from seawall.inference.errors import InvalidArrayError, InvalidSettingError
from seawall.inference.models.packing import pack
from seawall.inference.quantize import pack_bits, quantize, unpack_bits
from seawall.inference.runtime import ort  # noqa: F401  # before ONNX Runtime, whose telemetry it switches off


@given(st.sampled_from([2, 4]), st.booleans(), st.data())
def test_unpacking_gives_the_packed_codes_back(bits, signed, data):
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 1000))
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    codes = np.random.default_rng(seed).integers(low, high, shape, np.int8 if signed else np.uint8)
    if len(shape) > 1 and data.draw(st.booleans()):
        codes = codes.T
    packed = pack_bits(codes, bits)
    assert (*codes.shape[:-1], -(-codes.shape[-1] * bits // 8)) == packed.shape
    back = unpack_bits(packed, bits, codes.shape[-1], signed=signed)
    assert codes.dtype == back.dtype
    assert np.array_equal(codes, back)


def test_the_first_code_is_in_the_lowest_bits():
    assert [0x21, 0x03] == pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist()
    assert [0b11_10_01_00, 0b01] == pack_bits(np.array([0, 1, 2, 3, 1], np.uint8), 2).tolist()
    assert [0x8F] == pack_bits(np.array([-1, -8], np.int8), 4).tolist()


@pytest.mark.parametrize(
    ("bits", "signed", "kind", "dtype"),
    [
        (4, True, TensorProto.INT4, ml_dtypes.int4),
        (4, False, TensorProto.UINT4, ml_dtypes.uint4),
        (2, True, getattr(TensorProto, "INT2", None), ml_dtypes.int2),
        (2, False, getattr(TensorProto, "UINT2", None), ml_dtypes.uint2),
    ],
)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
def test_a_packed_tensor_is_what_onnx_stores(bits, signed, kind, dtype, count):
    if kind is None:
        pytest.skip("this onnx has no 2-bit types")
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    codes = np.random.default_rng(count).integers(low, high, count, np.int8 if signed else np.uint8)
    tensor = onnx.numpy_helper.from_array(codes.astype(dtype), "t")
    assert kind == tensor.data_type
    assert tensor.raw_data == pack_bits(codes, bits).tobytes()
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)


def test_blocks_are_what_onnx_runtime_packs_for_matmulnbits():
    from onnxruntime.capi import _pybind_state as theirs

    rows, columns, block = 6, 64, 32
    weights = np.random.default_rng(5).normal(size=(rows, columns)).astype(np.float32)
    data = np.zeros((rows, columns // block, block // 2), np.uint8)
    scales = np.zeros((rows, columns // block), np.float32)
    zero_points = np.zeros((rows, columns // block // 2), np.uint8)
    transposed = np.ascontiguousarray(weights.T)  # it takes [inputs, outputs]
    theirs.quantize_matmul_4bits(
        data, transposed, scales.reshape(-1), zero_points.reshape(-1), block, rows, columns, True
    )
    levels = np.rint(weights.reshape(rows, -1, block) / scales[:, :, None])
    codes = np.clip(levels + 8, 0, 15).astype(np.uint8)
    unpacked = unpack_bits(data, 4, block, signed=False)
    # theirs multiplies by an inverse and rounds half up: a few codes next to a tie may differ by one
    assert np.abs(unpacked.astype(int) - codes).max() <= 1
    assert np.mean(unpacked == codes) > 0.99
    assert np.array_equal(data, pack_bits(unpacked, 4))
    assert np.mean(pack(weights, bits=4, block=block).data == data) > 0.97


def test_a_bit_width_other_than_2_and_4_is_refused():
    for bits in (0, 1, 3, 8, "4"):
        with pytest.raises(InvalidSettingError, match="bits must be 2 or 4, got"):
            pack_bits(np.zeros(4, np.uint8), bits)
        with pytest.raises(InvalidSettingError, match="bits must be 2 or 4, got"):
            unpack_bits(np.zeros(4, np.uint8), bits, 1)


@pytest.mark.parametrize("codes", [[8], [-9]])
def test_a_code_too_wide_for_its_bits_is_refused_and_not_cut_off(codes):
    with pytest.raises(InvalidArrayError, match=r"int8 codes of 4 bits are in -8\.\.7"):
        pack_bits(np.array(codes, np.int8), 4)
    with pytest.raises(InvalidArrayError, match=r"in 0\.\.3, got 4\.\.4"):
        pack_bits(np.array([4], np.uint8), 2)


def test_what_is_no_row_of_codes_is_refused():
    for codes in (np.zeros(4, np.int32), np.zeros(4, np.float32), np.array(1, np.int8)):
        with pytest.raises(InvalidArrayError, match="int8 or uint8 codes"):
            pack_bits(codes, 4)
        with pytest.raises(InvalidArrayError, match="uint8 bytes"):
            unpack_bits(codes, 4, 1)


@pytest.mark.parametrize("count", [-1, 9])
def test_more_codes_than_there_are_cannot_be_unpacked(count):
    with pytest.raises(InvalidSettingError, match=r"0\.\.8, .* got"):
        unpack_bits(np.zeros((2, 4), np.uint8), 4, count)


def test_codes_of_a_quantized_matrix_pack_as_they_are():
    quantized = quantize(np.random.default_rng(6).normal(size=(4, 64)), dtype="int4", block_size=32)
    packed = pack_bits(quantized.data, 4)
    assert packed.nbytes + quantized.scale.nbytes == quantized.nbytes
    assert np.array_equal(quantized.data, unpack_bits(packed, 4, 64))
