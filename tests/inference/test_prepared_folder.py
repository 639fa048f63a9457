"""A decoder loads from a folder that somebody prepared or quantized, or says what is wrong with it."""

import json
import shutil
import sys

import numpy as np
import pytest

from seawall.inference import Decoder, models
from seawall.inference.errors import CorruptModelError, InvalidSettingError, MissingExtraError
from seawall.inference.models.cache import read_verified, write_manifest
from seawall.inference.models.convert import open_prepared
from seawall.inference.quantize import quantize_model
from tests.inference import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prepared model in fp32."""
    base = tmp_path_factory.mktemp("folders")
    return models.prepare(tiny.write(base / "tiny.gguf"), precision="fp32", cache_dir=base).folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "prepared")


def load(folder, **settings):
    return Decoder.load(folder, context=64, threads=1, **settings)


def test_a_prepared_folder_loads_as_what_it_is(folder):
    with load(folder) as decoder:
        assert decoder.precision == "fp32"
        assert decoder.name == "tiny"
    with load(str(folder), precision="fp32", kv="int8") as decoder:
        assert decoder.kv == "int8"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["prepared"]  # nothing was written beside it


@pytest.mark.parametrize("recipe", ["int8-block32", "int4-rtn", "fp8-e4m3"])
def test_a_quantized_folder_loads_with_the_recipe_as_its_precision(folder, tmp_path, recipe):
    quantize_model(folder, tmp_path / "small", recipe=recipe)
    with load(folder) as reference, load(tmp_path / "small") as decoder:
        assert decoder.precision == recipe
        assert decoder.report().storage == ("expanded" if recipe == "fp8-e4m3" else "native")
        expected, found = next(reference.logits([1, 5, 12])), next(decoder.logits([1, 5, 12]))
        assert np.linalg.norm(found - expected) < np.linalg.norm(expected)
    with load(tmp_path / "small", kv="int8") as decoder:
        assert next(decoder.logits([1, 5, 12])).shape == (3, decoder.vocabulary)


def test_another_precision_than_the_folder_holds_is_refused(folder):
    with pytest.raises(InvalidSettingError, match=r"precision is 'int8', but .* holds 'fp32'"):
        load(folder, precision="int8")


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json"])
@pytest.mark.parametrize("how", ["flipped", "missing", "cut"])
def test_a_damaged_file_is_found_before_it_is_used(folder, name, how):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[:-1])
    with pytest.raises(CorruptModelError, match="not those that its manifest"):
        load(folder)


def test_a_folder_without_a_manifest_is_no_prepared_one(tmp_path):
    with pytest.raises(CorruptModelError, match=r"holds no manifest\.json"):
        open_prepared(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"config": None}, "holds no decoder"),
        ({"config": {"hidden": 64}}, "holds no decoder"),
        ({"chat_template": 3, "end_tokens": "2"}, "end_tokens, chat_template"),
        ({"precision": None}, "precision"),
        ({"end_tokens": [2, "2"]}, "end_tokens"),
        ({"end_tokens": [2, 99]}, "end_tokens"),
    ],
)
def test_a_manifest_of_something_else_is_told_from_a_decoder(folder, change, told):
    reseal(folder, change)
    with pytest.raises(CorruptModelError, match=told):
        load(folder)


@pytest.mark.parametrize("name", ["layers", "kv_heads", "head_size", "vocabulary", "context", "rope_base"])
@pytest.mark.parametrize("value", [0, -3, "2", None, True])
def test_absurd_numbers_in_a_manifest_are_refused(folder, name, value):
    reseal(folder, {"config": {**read_verified(folder)["config"], name: value}})
    with pytest.raises(CorruptModelError, match=name):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"), [("layers", 1), ("layers", 3), ("kv_heads", 4), ("head_size", 32), ("vocabulary", 99)]
)
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_a_manifest_of_another_graph_is_refused_before_a_run_can_write_outside(folder, name, value, kv):
    reseal(folder, {"config": {**read_verified(folder)["config"], name: value}})
    with pytest.raises(CorruptModelError, match="not those of the decoder in its manifest"):
        load(folder, kv=kv)


def tokenizer(folder, **parts):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    reseal(folder, {})


def test_a_tokenizer_neither_cuts_a_prompt_nor_pads_it(folder):
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padded = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None,
              "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}  # fmt: skip
    tokenizer(folder, truncation=cut, padding=padded)
    with load(folder) as decoder:
        assert decoder.decode(decoder.encode("abcd")) == "abcd"


def test_a_tokenizer_that_makes_its_library_panic_is_a_corrupt_model(folder):
    tokenizer(folder, pre_tokenizer={"type": "FixedLength", "length": 0})  # a PanicException, which is no Exception
    with load(folder) as decoder, pytest.raises(CorruptModelError, match="its tokenizer fails"):
        decoder.encode("abcd")
    tokenizer(folder, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(CorruptModelError, match="the tokenizer cannot be read"):
        load(folder)


def test_a_graph_that_is_none_is_refused(folder):
    (folder / "model.onnx").write_bytes(b"\xff" * 99)
    reseal(folder, {})
    with pytest.raises(CorruptModelError, match="no ONNX model"):
        load(folder)


def test_onnx_is_named_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match="onnx"):
        load(folder)


def reseal(folder, change):
    """Write a manifest that fits the files as they are now, with other facts."""
    facts = json.loads((folder / "manifest.json").read_text())["facts"] | change
    (folder / "manifest.json").unlink()
    write_manifest(folder, facts)
