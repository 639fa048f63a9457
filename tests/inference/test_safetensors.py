"""A safetensors file says the truth about itself, or is not read."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.inference.errors import CorruptModelError
from seawall.inference.models.safetensors_file import SafetensorsFile
from tests.inference import tiny_bert

GOOD = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16), "c": np.ones(2, np.int64)}


def file_of(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_floats_of_every_width_come_back_as_float32(tmp_path):
    kinds = {
        "F16": np.float16([1.5, -2]), "F32": np.float32([1.5, -2]), "F64": np.float64([1.5, -2]),
        "BF16": (np.float32([1.5, -2]).view(np.uint32) >> 16).astype(np.uint16),
    }  # fmt: skip
    path = file_of(tmp_path, tiny_bert.safetensors(kinds, {name: name for name in kinds}))
    with SafetensorsFile(path) as found:
        for name in kinds:
            values = found.floats(name, (2,))
            assert values.dtype == np.float32
            assert values.tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"1234567", "shorter than its own header"),
        (struct.pack("<Q", 1 << 62), "header claims"),
        (struct.pack("<Q", 9) + b"{}", "header claims 9"),
        (raw(b"[]"), "no JSON object"),
        (raw(b"{"), "no JSON object"),
        (raw(b"\xff\xfe"), "no JSON object"),
        (raw(b"[" * 100_000), "no JSON object"),
        (raw(b'{"a": 1, "a": 2}'), "repeated"),
        (raw({"a": 1}), "not described"),
        (raw({"a": {}}), "unknown type None"),
        (raw({"a": entry(dtype="F8")}, bytes(8)), "unknown type 'F8'"),
        (raw({"a": entry(dtype=[])}, bytes(8)), "unknown type"),
        (raw({"a": entry(shape=(-2,))}, bytes(8)), "shape"),
        (raw({"a": entry(shape=(2.0,))}, bytes(8)), "shape"),
        (raw({"a": entry(shape=(True, 2))}, bytes(8)), "shape"),
        (raw({"a": entry(shape=(1,) * 17)}, bytes(8)), "shape"),
        (raw({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(8)), "lies at"),
        (raw({"a": entry(begin=8, end=0)}, bytes(8)), "lies at"),
        (raw({"a": entry(end=16)}, bytes(16)), "lies at"),
        (raw({"a": entry()}, bytes(4)), "end at byte"),
        (raw({"a": entry()}, bytes(9)), "end at byte"),
        (raw({"a": entry(4, 12)}, bytes(12)), "begins at byte"),
        (raw({"a": entry(), "b": entry()}, bytes(8)), "begins at byte"),
        (raw({"a": entry(), "b": entry(4, 12)}, bytes(12)), "begins at byte"),
        (raw({"a": entry(), "b": entry(12, 20)}, bytes(20)), "begins at byte"),
    ],
)
def test_a_header_that_does_not_add_up_is_refused(tmp_path, content, why):
    with pytest.raises(CorruptModelError, match=why):
        SafetensorsFile(file_of(tmp_path, content))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    path = file_of(tmp_path, tiny_bert.safetensors({"a": np.array([1, value], np.float32)}))
    with SafetensorsFile(path) as found, pytest.raises(CorruptModelError, match="not finite"):
        found.floats("a", (2,))


def test_a_tensor_of_another_type_or_shape_is_refused(tmp_path):
    with SafetensorsFile(file_of(tmp_path, tiny_bert.safetensors(GOOD))) as found:
        for name, shape in (("a", (3, 2)), ("c", (2,)), ("missing", (1,))):
            with pytest.raises(CorruptModelError, match=name):
                found.floats(name, shape)


@given(at=st.integers(0, 400), bit=st.integers(0, 7), keep=st.integers(0, 500))
def test_no_damage_ends_in_anything_but_a_typed_error(tmp_path_factory, at, bit, keep):
    content = bytearray(tiny_bert.safetensors(GOOD))
    content[at % len(content)] ^= 1 << bit
    path = file_of(tmp_path_factory.mktemp("damaged"), bytes(content[: max(keep, 1)]))
    try:
        with SafetensorsFile(path) as found:
            for name, stored in found.tensors.items():
                if stored.dtype in {"F16", "BF16", "F32", "F64"}:
                    found.floats(name, stored.shape)
    except CorruptModelError:
        pass
