"""A prepared decoder is quantized with texts, and the folder that comes out is one again."""

import json
from importlib import resources

import numpy as np
import pytest

from seawall.inference import Decoder, models
from seawall.inference.errors import InvalidSettingError
from seawall.inference.models import PreparedModel
from seawall.inference.models.cache import read_verified
from seawall.inference.quantize import errors, kl_divergence, plan, quantize_model, sensitivity
from tests.inference import tiny

TEXTS = ["abc def gh ab", "hgfe dcba", "aaaa bbbb cccc dddd"]


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    path = tiny.write(folder / "tiny.gguf")
    return models.prepare(path, precision="fp32", cache_dir=folder)


def logits(folder, tokens):
    with Decoder(PreparedModel(folder, read_verified(folder)), context=64, threads=1) as decoder:
        return np.concatenate(list(decoder.logits(tokens)))


@pytest.mark.parametrize("recipe", ["int8", "int4-gptq", "int4-awq", "fp8-e4m3"])
def test_it_decodes_nearly_as_the_float_model_does(recipe, float_model, tmp_path):
    done = quantize_model(float_model.folder, tmp_path / "q", recipe=recipe, calibration=TEXTS)
    assert {"model.onnx", "weights.bin", "tokenizer.json", "manifest.json"} == {p.name for p in done.folder.iterdir()}
    assert ["logits"] == [left.node for left in done.left], "a vocabulary of 14 tokens is too small"
    for fact in ("config", "end_tokens", "chat_template", "source_sha256", "licence"):
        assert float_model.facts[fact] == done.facts[fact]
    assert (recipe, "fp32") == (done.facts["precision"], done.facts["quantization"]["source_precision"])
    tokens = [3, 4, 5, 6, 7, 8, 9, 10, 3, 3]
    exact, kept = logits(float_model.folder, tokens), logits(done.folder, tokens)
    assert errors(exact, kept).sqnr_db > {"int8": 20, "int4-gptq": 5, "int4-awq": 5, "fp8-e4m3": 15}[recipe]


def test_texts_and_their_tokens_calibrate_alike(float_model, tmp_path):
    with Decoder(float_model, context=64, threads=1) as decoder:
        tokens = [decoder.encode(text) for text in TEXTS]
    for name, calibration in (("texts", TEXTS), ("tokens", iter(tokens))):
        quantize_model(float_model.folder, tmp_path / name, recipe="int4-gptq", calibration=calibration)
    assert (tmp_path / "texts" / "weights.bin").read_bytes() == (tmp_path / "tokens" / "weights.bin").read_bytes()


def test_a_budget_keeps_the_weights_wide_that_change_predictions_most(float_model, tmp_path):
    found = sensitivity(float_model.folder, calibration=TEXTS)
    assert 8 == len({one.node for one in found})  # two layers of four
    assert all(one.loss >= 0 for one in found)
    least = sum(one.bytes for one in found if one.grid.bits == 4)
    chosen = plan(found, least + 20_000)
    done = quantize_model(float_model.folder, tmp_path / "q", recipe="mixed", calibration=TEXTS, budget=least + 20_000)
    assert json.loads(json.dumps(chosen.grids)) == done.facts["recipe"]["plan"]
    narrow = quantize_model(float_model.folder, tmp_path / "narrow", recipe="int4-kquant")
    tokens = [3, 4, 5, 6, 7, 8, 9, 10, 3, 3]
    exact = logits(float_model.folder, tokens)
    mixed, lossy = (kl_divergence(exact, logits(one.folder, tokens)).mean() for one in (done, narrow))
    assert mixed < lossy


def test_a_decoder_reads_the_bundled_text_where_none_is_given(float_model, tmp_path):
    text = resources.files("seawall.inference.generate").joinpath("calibration.txt").read_text(encoding="utf-8")
    for name, calibration in (("ours", None), ("given", [text])):
        quantize_model(float_model.folder, tmp_path / name, recipe="int4-awq-gptq", calibration=calibration)
    ours, given = (json.loads((tmp_path / name / "manifest.json").read_text())["facts"] for name in ("ours", "given"))
    assert ours == given
    assert 64 == len(ours["quantization"]["calibration"]["sha256"])
    assert (
        {} == quantize_model(float_model.folder, tmp_path / "none", recipe="int8").facts["quantization"]["calibration"]
    )


def test_an_empty_text_calibrates_nothing(float_model, tmp_path):
    with pytest.raises(InvalidSettingError, match="the list is empty"):
        quantize_model(float_model.folder, tmp_path / "q", recipe="int4-gptq", calibration=[""])
