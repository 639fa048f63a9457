"""Model files are hostile input: whatever they hold, the answer is a typed error that says what is wrong."""

import contextlib
import struct

import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seawall.inference import Decoder
from seawall.inference.errors import CorruptModelError, UnknownModelError, UnknownPrecisionError
from seawall.inference.models.convert import prepare
from seawall.inference.models.gguf_file import GGUFFile
from seawall.inference.models.llama import layer_weights, read_config
from seawall.inference.models.tokenizer import build_tokenizer
from tests.inference import tiny


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def good(good_file):
    return good_file.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("bad") / "bad.gguf"


def read_everything(path):
    with GGUFFile(path) as gguf:
        config = read_config(gguf)
        build_tokenizer(gguf.metadata, path)
        for layer in range(config.layers):
            layer_weights(gguf, config, layer)


def test_the_tiny_model_is_a_good_one_and_answers(good, scratch, tmp_path):
    scratch.write_bytes(good)
    for precision in ("int8-block32", "int8", "int4", "fp32"):
        with (
            Decoder.load(scratch, precision=precision, cache_dir=tmp_path, context=32) as decoder,
            decoder.start(decoder.encode_chat("ab"), max_tokens=4) as sequence,
        ):
            assert [step.token for step in sequence]


def test_the_header_reads_as_the_gguf_packages_own_reader_reads_it(good, scratch):
    scratch.write_bytes(good)
    expected = GGUFReader(scratch)
    with GGUFFile(scratch) as found:
        fields = {key: field.contents() for key, field in expected.fields.items() if not key.startswith("GGUF.")}
        assert found.metadata == fields
        for tensor in expected.tensors:
            info = found.tensors[tensor.name]
            assert (info.start, info.size) == (tensor.data_offset, tensor.n_bytes)
            assert info.shape == tuple(tensor.shape[::-1])


def test_a_file_cut_short_anywhere_is_refused(good, scratch):
    for size in [*range(0, 2600, 37), *range(2600, len(good), 2311)]:
        scratch.write_bytes(good[:size])
        with pytest.raises(CorruptModelError):
            read_everything(scratch)


@given(at=st.integers(0, 4000), value=st.integers(0, 255))
@settings(max_examples=250, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_with_any_byte_changed_is_read_or_refused_but_never_crashes(good_file, scratch, at, value):
    damaged = bytearray(good_file.read_bytes())
    damaged[at] = value
    scratch.write_bytes(damaged)
    with contextlib.suppress(CorruptModelError):
        read_everything(scratch)


@given(at=st.integers(4, 4000), value=st.sampled_from([2**63 - 1, 2**64 - 1, 2**32, 2**20, 0]))
@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_that_claims_absurd_sizes_costs_neither_time_nor_memory(good_file, scratch, at, value):
    damaged = bytearray(good_file.read_bytes())
    damaged[at : at + 8] = struct.pack("<Q", value)
    scratch.write_bytes(damaged)
    with contextlib.suppress(CorruptModelError):
        read_everything(scratch)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"architecture": "qwen2"}, "only 'llama' is read"),
        ({"pre": "llama-bpe"}, "pre-tokenizer is 'llama-bpe'"),
        ({"head_count": 5}, "do not divide"),
        ({"head_count_kv": 3}, "do not divide"),
        ({"block_count": 100_000}, "must be from 1 to 512"),
        ({"block_count": 3}, "blk.2"),
        ({"block_count": 1}, "expected None"),
        ({"context_length": 0}, "must be from 1 to"),
        ({"eos": 99}, "not in its vocabulary"),
        ({"tokens": ["x"] * len(tiny.TOKENS), "merges": []}, "a repeated token"),
        ({"types": [1]}, "token types"),
        ({"merges": ["q z"]}, "merge 'q z'"),
        ({"poison": float("nan")}, "not finite"),
        ({"poison": float("inf")}, "not finite"),
        ({"change": lambda writer: writer.add_string("llama.rope.scaling.type", "yarn")}, "rotary positions"),
        ({"template": "{% for %}"}, "chat template"),
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(tmp_path, overrides, why):
    path = tiny.write(tmp_path / "odd.gguf", **overrides)
    with pytest.raises(CorruptModelError, match=why):
        Decoder.load(path, precision="fp32", cache_dir=tmp_path / "cache", context=32)


def test_a_chat_template_cannot_reach_out_of_its_sandbox(tmp_path):
    reach = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    path = tiny.write(tmp_path / "hostile.gguf", template=reach)
    with (
        Decoder.load(path, cache_dir=tmp_path, context=32) as decoder,
        pytest.raises(ValueError, match="refuses"),
    ):
        decoder.encode_chat("a")


def test_an_unknown_model_is_named_with_those_that_are_known(tmp_path):
    for name in ("smollm3", str(tmp_path / "missing.gguf"), str(tmp_path), "a\0b", "x" * 5000, "~nobody-here/x", None):
        with pytest.raises(UnknownModelError, match="'smollm2-135m'"):
            prepare(name, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp8", "", "INT8"])
def test_an_unknown_precision_is_named_with_those_that_are_known(tmp_path, precision):
    with pytest.raises(UnknownPrecisionError, match="'int8', 'int8-block32', 'int4', 'int4-rtn'"):
        prepare("smollm2-135m", precision=precision, cache_dir=tmp_path)
