"""The record of everything, and its table."""

import json
import math
from dataclasses import replace

import pytest

from seawall.inference import Backend
from seawall.inference.errors import InvalidSettingError, QualityError
from seawall.inference.quality import QualityReport, quality_report

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10, 3, 5, 7, 9, 4, 6, 8, 10] * 3


@pytest.fixture(scope="module")
def report(decoders):
    return quality_report(decoders["fp32"], decoders["int8"], [TOKENS], weights=True, speed=True, memory=True)


def test_it_has_scores_costs_weights_and_who_was_compared(report, folders):
    assert "fp32" == report.reference.precision
    assert "tiny int8" == report.name
    assert {"kl", "kl_p99", "top1", "perplexity_ratio"} == report.scores.keys()
    assert 48 == report.compared == report.text.tokens
    assert 8 == len(report.weights)
    for costs, precision in ((report.reference_costs, "fp32"), (report.costs, "int8")):
        assert sum(path.stat().st_size for path in folders[precision].iterdir()) == costs.file_bytes
        assert costs.prefill_tok_s > 0
        assert costs.load_s > 0
        assert 20e6 < costs.rss_bytes < 2e9
    assert report.costs.file_bytes < report.reference_costs.file_bytes
    assert "onnxruntime" in report.versions


def test_the_table_says_it_in_words_and_fits_a_terminal(report):
    table = str(report)
    for words in ("KL divergence, nats", "same first choice", "perplexity", "tokens compared", "size", "memory",
                  "weights (8)", "MatMulNBits", "reading a prompt"):  # fmt: skip
        assert words in table
    assert max(map(len, table.splitlines())) <= 79


def test_json_and_back_is_the_same_record(report):
    assert report == QualityReport.from_json(report.to_json())


def test_infinity_survives_json_that_any_parser_reads(decoders):
    same = quality_report(decoders["fp32"], decoders["fp32"], [TOKENS], weights=True)
    assert math.inf == same.weights[0].errors.sqnr_db
    json.loads(same.to_json(), parse_constant=pytest.fail)
    assert same == QualityReport.from_json(same.to_json())


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"reference": 1}', "[" * 5000, '{"text": {"kl": []}}', b"\xff"]
)
def test_anything_else_is_no_report(text):
    with pytest.raises(QualityError, match="no quality report"):
        QualityReport.from_json(text)


def test_a_field_too_many_or_too_few_is_no_report(report):
    for change in ({"costs": {"nonsense": 1}}, {"text": {}}, {"outputs": [{"name": "y"}]}):
        with pytest.raises(QualityError):
            QualityReport.from_json(json.dumps({**json.loads(report.to_json()), **change}))


def test_a_decoder_and_a_backend_cannot_be_compared(decoders, folders):
    with Backend.load(folders["int8"]) as backend, pytest.raises(InvalidSettingError, match="two Decoders or two Back"):
        quality_report(decoders["fp32"], backend, [TOKENS])
    with pytest.raises(InvalidSettingError, match="logits goes with backends"):
        quality_report(decoders["fp32"], decoders["int8"], [TOKENS], logits=["y"])


def test_of_several_outputs_the_worst_counts(report):
    from seawall.inference.quality import OutputScores
    from seawall.inference.quantize import Errors

    good = OutputScores("a", 4, Errors(0, 0, 0, 50), 0.99, 0.9, 0.01, 0.1, 0.95)
    bad = OutputScores("b", 4, Errors(1, 1, 1, 9), 0.5, 0.4, 0.2, 0.3, 0.4)
    found = replace(report, text=None, outputs=(good, bad)).scores
    assert {"cosine": 0.5, "sqnr_db": 9, "kl": 0.2, "top1": 0.4} == found


def test_a_model_that_does_not_load_in_a_fresh_process_says_why(tmp_path):
    from seawall.inference.quality import fresh_costs

    (tmp_path / "model.onnx").write_bytes(b"salt")
    with pytest.raises(QualityError, match=r"fresh process could not load .*: .*CorruptModelError"):
        fresh_costs(tmp_path, text=False)
