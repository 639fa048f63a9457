"""Four-bit blocks of a file become weights of the fast kernel, and stay what they are."""

import gguf
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from seawall.inference import models
from seawall.inference.errors import CorruptModelError, InvalidSettingError
from seawall.inference.models.gguf_file import GGUFFile
from seawall.inference.models.llama import read_config
from seawall.inference.models.lossless import BLOCK, Blocks, adopt_q4, adopted_values, copies, stacked
from tests.inference import tiny
from tests.inference.test_graph import by_definition, caches, call, session

KINDS = gguf.GGMLQuantizationType
halves = st.floats(-100, 100, width=16)


def some_blocks(rows, blocks, seed=0):
    """Blocks as a quantiser makes them: of weights that are spread around 0."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.001, 0.02, (rows, blocks)).astype(np.float16).astype(np.float32)
    minima = (-scales * rng.uniform(5, 10, (rows, blocks))).astype(np.float16).astype(np.float32)
    return Blocks(rng.integers(0, 16, (rows, blocks, BLOCK), np.uint8), scales, minima)


@pytest.mark.parametrize(("blocks", "rounds"), [(1, 2), (2, 2), (18, 2), (31, 2), (32, 2), (64, 2), (33, 1), (48, 1)])
def test_a_round_leaves_at_most_an_eighth_of_what_no_whole_zero_point_can_hold(blocks, rounds):
    """That is half a step at most. Where not all means have a block for their second round, some have one round."""
    matrix = some_blocks(24, blocks)
    adopted = adopted_values(adopt_q4(matrix), blocks * BLOCK)
    half = matrix.scales.max(axis=1, keepdims=True) / 2
    assert (np.abs(adopted - matrix.values) <= half / 8**rounds + 1e-7).all()


def test_every_code_is_kept():
    matrix = some_blocks(8, 18)
    packed = adopt_q4(matrix)
    low, high = packed.data[:, :18] & 15, packed.data[:, :18] >> 4
    assert np.array_equal(np.stack((low, high), axis=3).reshape(matrix.codes.shape), matrix.codes)


@given(
    arrays.arrays(np.uint8, (3, 2, BLOCK), elements=st.integers(0, 15)),
    arrays.arrays(np.float32, (3, 2), elements=halves),
    arrays.arrays(np.float32, (3, 2), elements=halves),
)
def test_whatever_a_file_stores_the_remainders_are_kept_to_a_hundredth(codes, scales, minima):
    """Scales of 0, negative ones and minima far outside the codes' range included."""
    matrix = Blocks(codes, scales, minima)
    adopted = adopted_values(adopt_q4(matrix), 2 * BLOCK)
    magnitude = np.abs(scales).max(axis=1) * 15 + np.abs(minima).max(axis=1)
    assert (np.abs(adopted - matrix.values).max(axis=1) <= 0.01 * magnitude + 1e-30).all()


def test_a_second_copy_of_each_mean_lies_in_another_block():
    for blocks in range(1, 200):
        places = np.arange(blocks * copies(blocks)).reshape(-1, blocks) // BLOCK
        assert (places.min(axis=0) < places.max(axis=0)).all()


def test_stacked_matrices_keep_their_rows():
    one, two = some_blocks(3, 4, seed=1), some_blocks(5, 4, seed=2)
    assert np.array_equal(stacked([one, two]).values, np.concatenate((one.values, two.values)))
    order = np.array([2, 0, 1])
    assert np.array_equal(one.rows(order).values, one.values[order])


@pytest.mark.parametrize("kind", [KINDS.Q4_0, KINDS.Q4_1])
def test_blocks_are_read_as_the_gguf_package_expands_them(tmp_path, kind):
    path = tiny.write(tmp_path / "tiny.gguf", kind=kind)
    with GGUFFile(path) as opened:
        name = "blk.0.ffn_down.weight"
        np.testing.assert_allclose(opened.quantized_q4(name).values, opened.dequantized(name), rtol=1e-6, atol=1e-7)
        assert opened.quantized_q4("token_embd.weight") is None


def test_blocks_of_k_quants_are_read_as_the_gguf_package_expands_them(tmp_path):
    """Any bytes are blocks of Q4_K, as long as the two factors of each are finite."""
    rng = np.random.default_rng(3)
    stored = rng.integers(0, 256, (6, 2, 144), np.uint8)
    stored[:, :, :4] = rng.normal(0, 1e-3, (6, 2, 2)).astype("<f2").view(np.uint8).reshape(6, 2, 4)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("some.weight", stored.reshape(6, 288), raw_dtype=KINDS.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "k.gguf") as opened:
        blocks = opened.quantized_q4("some.weight")
        assert blocks.scales.shape == (6, 16)
        np.testing.assert_allclose(blocks.values, opened.dequantized("some.weight"), rtol=1e-5, atol=1e-7)
    adopted = adopted_values(adopt_q4(blocks), 512)
    worst = np.abs(blocks.scales).max(axis=1) * 15 + np.abs(blocks.minima).max(axis=1)
    assert (np.abs(adopted - blocks.values).max(axis=1) < 0.01 * worst).all()


def test_a_scale_that_is_not_finite_is_refused(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf")
    with GGUFFile(path) as opened:
        start = opened.tensors["blk.0.ffn_down.weight"].start
    content = bytearray(path.read_bytes())
    content[start : start + 2] = np.float16("inf").tobytes()
    path.write_bytes(content)
    with GGUFFile(path) as opened, pytest.raises(CorruptModelError, match="not finite"):
        opened.quantized_q4("blk.0.ffn_down.weight")


@pytest.mark.parametrize("kind", [KINDS.Q4_0, KINDS.Q4_1])
def test_int4_logits_are_as_near_those_of_the_definition_as_8_bit_ones(tmp_path, kind):
    """Plain rounding of the same weights to 4 bits is four times as far."""
    tokens = [1, 5, 12, 7, 3, 3, 9]
    distance = {}
    with GGUFFile(tiny.write(tmp_path / "tiny.gguf", kind=kind)) as opened:
        numbers = read_config(opened)
        expected = by_definition(opened, numbers, tokens)
        for precision in ("int4", "int8-block32", "int4-rtn"):
            (tmp_path / precision).mkdir()
            graph = session(opened, numbers, tmp_path / precision, precision)
            logits, _ = call(graph, [tokens], [7], caches(numbers, 1), range(7))
            distance[precision] = np.linalg.norm(logits - expected)
    assert distance["int4"] < 1.25 * distance["int8-block32"]
    if kind is KINDS.Q4_1:
        assert distance["int4"] < 0.5 * distance["int4-rtn"]


def test_what_is_stored_in_more_bits_gets_eight(tmp_path):
    """A file of mixed kinds: its 4-bit matrices are taken over, the others rounded to 8 bits."""
    kinds = {"ffn_down": KINDS.Q8_0, "attn_k": KINDS.F16}
    model = models.prepare(tiny.write(tmp_path / "mixed.gguf", kinds=kinds), precision="int4", cache_dir=tmp_path)
    nodes = onnx.load(model.folder / "model.onnx", load_external_data=False).graph.node
    bits = {node.name: onnx.helper.get_node_attr_value(node, "bits") for node in nodes if node.op_type == "MatMulNBits"}
    assert bits["layer.0.down.y"] == bits["layer.0.qkv.y"] == bits["logits"] == 8
    assert bits["layer.0.out.y"] == bits["layer.1.gate_up.y"] == 4


def test_a_file_without_4_bit_blocks_is_told_what_to_do(tmp_path):
    path = tiny.write(tmp_path / "wide.gguf", kind=KINDS.F16)
    with pytest.raises(InvalidSettingError, match="quantize_model"):
        models.prepare(path, precision="int4", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("kind", "usual"), [(KINDS.Q4_1, "int4"), (KINDS.Q8_0, "int8-block32"), (KINDS.F32, "int8-block32")]
)
def test_a_file_of_4_bit_blocks_is_taken_over_by_default_and_any_other_gets_careful_8_bits(tmp_path, kind, usual):
    path = tiny.write(tmp_path / "tiny.gguf", kind=kind)
    assert models.prepare(path, cache_dir=tmp_path).facts["precision"] == usual


def test_the_catalogue_says_truly_which_models_are_stored_in_4_bits(gguf):
    with GGUFFile(gguf) as stored:
        assert models.CATALOGUE["smollm2-135m"].four_bits == stored.stores_four_bits


def test_embedding_and_head_are_stored_once(tmp_path):
    tokens = [*tiny.TOKENS, *(f"word{number}" for number in range(100))]  # a table too large for the graph file
    path = tiny.write(tmp_path / "tiny.gguf", tokens=tokens, types=[*tiny.TYPES, *[1] * 100])
    model = models.prepare(path, precision="int4", cache_dir=tmp_path)
    tensors = onnx.load(model.folder / "model.onnx", load_external_data=False).graph.initializer
    places = {
        tensor.name: next((entry.value for entry in tensor.external_data if entry.key == "offset"), None)
        for tensor in tensors
    }
    assert places["head.q"] == places["embedding.q"] is not None
