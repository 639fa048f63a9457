"""A target gives a token the same bits, alone or among others, where it is asked to."""

import numpy as np
import pytest

from seawall.inference import Decoder
from seawall.inference.generate.speculation import SlotTarget
from seawall.inference.generate.speculation.target import measure
from seawall.inference.runtime import ort
from tests.inference import tiny

TEXT = [3, 9, 4, 8, 5, 10, 6, 11, 12, 3, 9, 7, 7, 5, 4, 3] * 4


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    path = tiny.write(folder / "tiny.gguf")
    with Decoder.load(path, precision="int8", cache_dir=folder, context=96, threads=1) as loaded:
        yield loaded


@pytest.fixture
def slot(decoder):
    lent = decoder._lend()
    yield lent
    decoder._take_back(lent)


def rows(target, sizes):
    """Logits after every token of the text, read in parts of these sizes."""
    target.rewind(0)
    found, place = [], 0
    for size in sizes:
        found.append(target.extend(TEXT[place : place + size], ort.run_options()).copy())
        place += size
    return np.concatenate(found)


def test_padded_singles_have_the_bits_of_longer_passes(decoder, slot):
    assert decoder.exactness().kind != "none"
    together = rows(SlotTarget(slot, padded=True), [8] * 8)
    np.testing.assert_array_equal(rows(SlotTarget(slot, padded=True), [1] * 64), together)
    np.testing.assert_array_equal(rows(SlotTarget(slot, padded=True), [1, 2, 5] * 8), together)


def test_without_padding_singles_have_bits_of_their_own(decoder, slot):
    if decoder.exactness().kind == "bitwise":
        pytest.skip("this processor's kernels agree")
    together = rows(SlotTarget(slot, padded=False), [8] * 8)
    assert (rows(SlotTarget(slot, padded=False), [1] * 64) != together).any()


def test_a_rewound_target_never_saw_what_was_rejected(slot):
    target = SlotTarget(slot, padded=True)
    clean = rows(target, [8] * 8)
    target.rewind(8)
    target.extend([7] * 12, ort.run_options())
    target.rewind(8)
    assert target.length == 8
    np.testing.assert_array_equal(target.extend(TEXT[8:16], ort.run_options()), clean[8:16])


def test_costs_are_measured_where_a_context_is_hardly_longer_than_a_pass(slot):
    for context in (2, 3, 9, 96):
        pace = measure(slot, padded=True, context=context)
        assert 0 < pace.plain <= pace.pair
        assert pace.more >= 0


def test_costs_are_measured_once(decoder):
    assert decoder.pace(padded=True) is decoder.pace(padded=True)
    assert decoder.pace() is not decoder.pace(padded=True)
