"""The bundled model and a sentence encoder, quantized, measured, recorded, verified and loaded."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from seawall.inference import Backend, Decoder
from seawall.inference.quality import (
    GATES,
    compare_texts,
    evaluation_text,
    gate_for,
    quality_report,
    record,
    verify,
)
from seawall.inference.quantize import quantize_model

pytestmark = pytest.mark.model
TEXT = evaluation_text()[:1500]  # some 330 tokens; half of them tell the precisions apart


def test_four_bits_taken_over_keep_the_gate_of_eight_and_four_bits_rounded_do_not(fp32):
    scores = {}
    for precision in ("int4", "int4-rtn"):
        with Decoder.load("smollm2-135m", precision=precision, context=1024) as candidate:
            found = compare_texts(fp32, candidate, TEXT[:800])
        scores[precision] = {"kl": found.kl, "top1": found.top1}
    assert scores["int4"]["kl"] < GATES["int4-lossless"].kl
    assert [] == GATES["int8"].failures({**scores["int4"], "top1": 1.0})
    assert ["kl", "top1"] == [failure.measure for failure in GATES["int4"].failures(scores["int4-rtn"])]


def test_an_encoder_is_quantized_measured_recorded_verified_and_served(embedding_model, tmp_path):
    source = embedding_model.folder
    small = quantize_model(source, tmp_path / "small", recipe="int8-block32").folder
    sentences = [each for each in TEXT.replace("\n", " ").split(". ") if len(each) > 20][:12]
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_padding()
    batches = []
    for start in range(0, len(sentences), 4):
        encoded = tokenizer.encode_batch(sentences[start : start + 4])
        batches.append({
            "input_ids": np.array([each.ids for each in encoded], np.int64),
            "attention_mask": np.array([each.attention_mask for each in encoded], np.int64),
        })  # fmt: skip
    with Backend.load(source) as reference, Backend.load(small) as candidate:
        report = quality_report(reference, candidate, batches, weights=True)
    gate = gate_for("int8-block32", text=False)
    assert [] == gate.failures(report.scores)
    assert min(weight.errors.sqnr_db for weight in report.weights) > 35
    assert 36 < len(report.weights)  # six layers of six products, and the table
    assert [] == record(small, report, gate)
    assert verify(small).passed
    Backend.load(small).close()
