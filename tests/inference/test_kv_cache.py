"""A cache of 8 or 4 bits: scales that hold at every position, the graph that uses them, and what it costs."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from seawall.inference import Decoder, models
from seawall.inference.errors import (
    CorruptModelError,
    GenerationCancelledError,
    InvalidSettingError,
    ModelCacheError,
)
from seawall.inference.generate.calibration import load_scales, save_scales
from seawall.inference.models.kv_cache import (
    at_all_positions,
    cache_scales,
    cache_width,
    rotated,
    with_quantized_cache,
    with_query_seqlens,
)
from seawall.inference.runtime import ort
from tests.inference import tiny

BASE = 10_000.0


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("kv") / "tiny.gguf")


def load(path, cache, **settings):
    return Decoder.load(path, cache_dir=cache, context=100, threads=1, **settings)


def answer(decoder, prompt, count=20):
    with decoder.start(prompt, max_tokens=count) as sequence:
        sequence._ends = frozenset()
        for _ in sequence:
            pass
        return sequence.tokens


@given(st.integers(0, 5000), st.integers(0, 5000))
@settings(deadline=None)
def test_rotating_twice_is_rotating_by_the_sum(first, second):
    keys = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    twice = rotated(rotated(keys, np.array([first]), BASE), np.array([second]), BASE)
    np.testing.assert_allclose(twice, rotated(keys, np.array([first + second]), BASE), atol=1e-4)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_scales_of_32_positions_hold_for_the_same_keys_anywhere_in_the_context(kv):
    """As an oracle the keys are turned to positions that calibration did not try."""
    rng = np.random.default_rng(1)
    bare = rng.normal(0, 1, (3, 32, 16)).astype(np.float32) * rng.uniform(0.1, 10, 16).astype(np.float32)
    measured = rotated(bare, np.arange(32), BASE)
    cache = np.stack((measured, bare))[None]
    scales = cache_scales([cache], kv=kv, rope_base=BASE, context=4096)
    for position in (0, 31, 777, 2049, 4000):
        later = np.abs(rotated(bare, np.array([position]), BASE))
        clipped = (later > 127 * scales[0, 0][:, None]).mean()
        if kv == "int8":
            assert clipped == 0
    assert scales.shape == (2, 1, 3, 16)


def test_a_scale_from_the_measured_positions_alone_does_not_hold_later():
    """What the calibration avoids: the same keys, measured at 32 positions and met at another."""
    bare = np.zeros((1, 32, 16), np.float32)
    bare[..., 4] = 1.0  # a pair that turns 0.1 radian each 10 positions
    measured = np.abs(rotated(bare, np.arange(32), BASE)).max(axis=1)
    later = np.abs(rotated(bare, np.array([160]), BASE)).max(axis=1)
    assert later[0, 12] > 2 * measured[0, 12]
    everywhere = np.abs(at_all_positions(rotated(bare, np.arange(32), BASE), BASE, 4096)).max(axis=1)
    assert later[0, 12] <= 1.01 * everywhere[0, 12]


def test_channels_of_a_pair_that_never_turns_keep_their_own_scales():
    bare = np.zeros((1, 8, 16), np.float32)
    bare[..., 7], bare[..., 15] = 1.0, 0.01
    cache = np.stack((rotated(bare, np.arange(8), 1e9), bare))[None]
    scales = cache_scales([cache], kv="int8", rope_base=1e9, context=64)
    assert scales[0, 0, 0, 7] > 50 * scales[0, 0, 0, 15]


def test_4_bits_clip_rare_values_to_gain_finer_steps():
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, (1, 4096, 8)).astype(np.float32)
    values[0, 0] = 30.0
    cache = np.stack((values, values))[None]
    scales = cache_scales([cache], kv="int4", rope_base=BASE, context=4096)
    assert (scales[1] < 30 / 7 / 2).all()


def test_a_channel_of_zeros_has_a_scale_all_the_same():
    scales = cache_scales([np.zeros((1, 2, 1, 4, 8), np.float32)], kv="int8", rope_base=BASE, context=64)
    assert (scales == 1).all()


@pytest.mark.parametrize(
    ("kv", "dtype", "share"), [("fp32", np.float32, 1), ("int8", np.int8, 4), ("int4", np.uint8, 8)]
)
def test_a_token_takes_the_bytes_that_the_decoder_says(tiny_path, tmp_path, kv, dtype, share):
    with load(tiny_path, tmp_path, kv=kv) as decoder:
        slot = decoder._lend()
        assert slot.cache.dtype == dtype
        assert slot.cache.nbytes == 100 * decoder.cache_bytes_per_token == 100 * 2 * 2 * 2 * 16 * 4 // share
        assert slot.cache.shape[-1] == cache_width(kv, 16)
        assert decoder.report().kv == kv
        decoder._take_back(slot)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_a_quantized_cache_stores_the_keys_and_values_of_a_float_one(tiny_path, tmp_path, kv):
    """Unpacked and scaled, what the kernel stored is what the float cache holds, to half a step; the low half of a
    byte of two comes first, and its zero is 8.
    """  # noqa: D205
    prompt = [1, 5, 12, 7, 3, 3, 9, 8]
    stored = {}
    for kind in ("fp32", kv):
        with load(tiny_path, tmp_path, precision="fp32", kv=kind) as decoder:
            slot = decoder._lend()
            slot.run(prompt, 0, ort.run_options())
            stored[kind] = slot.cache[0, :, 0, :, : len(prompt)].copy()  # of the first layer, whose inputs are the same
            decoder._take_back(slot)
    folder = next(tmp_path.glob(f"files/cache-{kv}-*"))
    scales = load_scales(folder, (2, 2, 2, 16))[:, 0][:, :, None]
    codes = stored[kv]
    if kv == "int4":
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], -1).astype(np.float32) - 8
    top = 7 if kv == "int4" else 127
    expected = np.clip(stored["fp32"], -(top + 1) * scales, top * scales)
    assert (np.abs(codes * scales - expected) <= scales * 0.501).all()


def test_an_8_bit_cache_answers_like_a_float_one_and_rewinds(tiny_path, tmp_path):
    prompt = [1, 5, 12, 7]
    with load(tiny_path, tmp_path, precision="fp32") as reference, load(tiny_path, tmp_path, kv="int8") as decoder:
        near = next(reference.logits([*prompt, 3, 9]))
        found = next(decoder.logits([*prompt, 3, 9]))
        assert np.linalg.norm(found - near) < 0.2 * np.linalg.norm(near)
        first = answer(decoder, prompt)
        answer(decoder, [2, 2, 9, 9, 9, 4], 60)  # the same memory, filled further
        assert answer(decoder, prompt) == first


def test_going_back_in_an_8_bit_cache_leaves_no_trace(tiny_path, tmp_path):
    with load(tiny_path, tmp_path, kv="int8") as decoder:
        slot = decoder._lend()
        slot.run([1, 5, 12, 7, 3], 0, ort.run_options())
        expected = slot.run([9, 8], 5, ort.run_options()).copy()
        slot.run([4, 4, 4, 4, 4, 4], 5, ort.run_options())  # rejected
        assert np.array_equal(slot.run([9, 8], 5, ort.run_options()), expected)
        decoder._take_back(slot)


def test_a_cancelled_step_over_an_8_bit_cache_gives_it_back(tiny_path, tmp_path):
    with load(tiny_path, tmp_path, kv="int8") as decoder:
        sequence = decoder.start([1, 5], max_tokens=5)
        sequence.cancel()
        with pytest.raises(GenerationCancelledError):
            sequence.step()
        sequence.close()
        assert decoder.active_sequences == 0


def test_scales_are_measured_once_and_kept(tiny_path, tmp_path, monkeypatch):
    with load(tiny_path, tmp_path, kv="int8") as decoder:
        first = answer(decoder, [1, 5])

    def refuse(*_args):
        raise AssertionError("measured again")

    monkeypatch.setattr("seawall.inference.generate.loading.calibrated_scales", refuse)
    with load(tiny_path, tmp_path, kv="int8") as decoder:
        assert answer(decoder, [1, 5]) == first


def test_damaged_scales_are_measured_again(tiny_path, tmp_path):
    with load(tiny_path, tmp_path, kv="int8"):
        pass
    folder = next(tmp_path.glob("files/cache-int8-*"))
    file = folder / "scales.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert load_scales(folder, (2, 2, 2, 16)) is None
    with load(tiny_path, tmp_path, kv="int8"):
        assert load_scales(folder, (2, 2, 2, 16)) is not None


def test_scales_of_another_model_are_not_taken(tmp_path):
    save_scales(tmp_path / "scales", np.ones((2, 2, 2, 16), np.float32))
    assert load_scales(tmp_path / "scales", (2, 2, 2, 16)) is not None
    assert load_scales(tmp_path / "scales", (2, 3, 2, 16)) is None


def test_a_cache_folder_that_cannot_be_written_only_costs_time(tiny_path, tmp_path, monkeypatch):
    def refuse(folder, needed_bytes):
        raise ModelCacheError(folder, OSError(30, "Read-only file system"))

    models.prepare(tiny_path, cache_dir=tmp_path)
    monkeypatch.setattr("seawall.inference.generate.calibration.publishing", refuse)
    with load(tiny_path, tmp_path, kv="int8") as decoder:
        assert answer(decoder, [1, 5])
    assert not list(tmp_path.glob("files/cache-int8-*"))


@pytest.mark.parametrize("kv", ["int2", "fp8-e4m3", "INT8", "", 8])
def test_an_unknown_cache_is_refused_with_those_that_are_known(tiny_path, tmp_path, kv):
    with pytest.raises(InvalidSettingError, match="kv must be one of fp32, int8, int4"):
        load(tiny_path, tmp_path, kv=kv)


@pytest.mark.parametrize(
    "change", [with_query_seqlens, lambda model: with_quantized_cache(model, np.ones((2, 1, 1, 8)), "int8")]
)
def test_a_graph_without_attention_over_named_caches_is_refused(change):
    port = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [port], [port])
    with pytest.raises(CorruptModelError, match="GroupQueryAttention"):
        change(helper.make_model(graph))


def test_the_graph_takes_several_rows_of_several_lengths_on_request(tiny_path, tmp_path):
    graph = onnx.load(models.prepare(tiny_path, cache_dir=tmp_path).folder / "model.onnx", load_external_data=False)
    with_query_seqlens(graph)
    nodes = [node for node in graph.graph.node if node.op_type == "GroupQueryAttention"]
    assert {tuple(node.input).index("query_seqlens") for node in nodes} == {16}
    assert "query_seqlens" in {port.name for port in graph.graph.input}


@pytest.mark.parametrize("precision", ["fp8-e4m3", "fp8-e5m2"])
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_8_bit_floats_are_expanded_when_they_are_loaded(tiny_path, tmp_path, precision, kv):
    """Stored in a byte each, computed in fast kernels, as near to the truth as the format allows."""
    with load(tiny_path, tmp_path, precision="fp32") as reference:
        expected = next(reference.logits([1, 5, 12, 7]))
    with load(tiny_path, tmp_path, precision=precision, kv=kv) as decoder:
        report = decoder.report()
        found = next(decoder.logits([1, 5, 12, 7]))
    assert (report.storage, report.precision) == ("expanded", precision)
    assert report.operators["MatMulNBits"] == 9
    assert "DequantizeLinear" not in report.operators
    assert np.linalg.norm(found - expected) < {"fp8-e4m3": 0.25, "fp8-e5m2": 0.5}[precision] * np.linalg.norm(expected)
    folder = next(tmp_path.glob(f"files/{precision}-*"))
    kinds = {one.data_type for one in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer}
    assert {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2} & kinds


@pytest.mark.model
def test_8_bits_lose_next_to_nothing_beyond_the_calibrated_length(fp32, reference):
    """Calibration reads 827 tokens; `benchmarks/kv_cache.py` goes to four times as many."""
    text = (reference["perplexity_text_tokens"] * 2)[:1200]
    with Decoder.load("smollm2-135m", precision="fp32", kv="int8", context=1200) as decoder:
        expected, found = (log_probabilities_beyond(1100, one, text) for one in (fp32, decoder))
    assert (np.exp(expected) * (expected - found)).sum(axis=1).mean() < 0.01


def log_probabilities_beyond(place, decoder, text):
    logits = np.concatenate(list(decoder.logits(text)))[place:].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
