"""Packed weights stand for the weights they came from, to within half a step."""

import numpy as np
import pytest

from seawall.inference.models.packing import adopt_q8, pack, unpack


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("columns", [64, 192, 100])
def test_every_weight_is_off_by_at_most_half_a_step(bits, block, columns):
    weights = np.random.default_rng(1).normal(size=(9, columns)).astype(np.float32)
    packed = pack(weights, bits=bits, block=block)
    blocks = -(-columns // block)
    assert packed.data.shape == (9, blocks, block * bits // 8)
    assert packed.data.dtype == np.uint8
    steps = np.repeat(np.abs(packed.scales), block, axis=1)[:, :columns]
    # the end of the range opposite to the largest value is one step short
    assert np.all(np.abs(unpack(packed) - weights) <= steps * 1.0001)
    assert np.mean(np.abs(unpack(packed) - weights) <= steps * 0.5001) > 0.98


def test_the_value_of_largest_magnitude_is_kept_exactly_whatever_its_sign():
    for sign in (1, -1):
        weights = np.array([[sign * 3.0, -sign * 1.0] + [0.0] * 30], dtype=np.float32)
        assert unpack(pack(weights, bits=4, block=32))[0, 0] == sign * 3.0


def test_a_block_of_zeros_stays_zero():
    assert not unpack(pack(np.zeros((2, 64), dtype=np.float32), bits=4, block=32)).any()


def test_eight_bit_blocks_of_the_source_are_taken_over_unrounded():
    rng = np.random.default_rng(2)
    values = rng.integers(-128, 128, (5, 96), dtype=np.int8)
    scales = rng.random((5, 3), dtype=np.float32)
    assert np.array_equal(unpack(adopt_q8(values, scales)), values * np.repeat(scales, 32, axis=1))
