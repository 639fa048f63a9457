"""Whether logits depend on the number of tokens in a run is tried out, told, and true of whole answers."""

import gc
import weakref

import numpy as np
import pytest

from seawall.inference import Decoder
from seawall.inference.errors import DecoderClosedError
from seawall.inference.generate.exactness import StepExactness, probe
from seawall.inference.generate.slot import CHUNK
from seawall.inference.runtime import ort
from tests.inference import tiny


class MadeBatch:
    """Rows whose logits are those of a Made, but for what `wrong` adds."""

    rows = 3

    def __init__(self, made, wrong=0.0, positions=16):
        self._made, self._wrong, self.positions = made, wrong, positions

    def run_all(self, parts, options):
        return [self._made.run_all(part.tokens, part.length, options) + np.float32(self._wrong) for part in parts]


class Made:
    """A slot whose logits say how they were computed."""

    def __init__(self, wrong=lambda count, place: 0.0):
        self._wrong = wrong
        self.longest = 0

    def run(self, tokens, length, options):
        self.longest = max(self.longest, len(tokens))
        assert len(tokens) <= CHUNK

    def run_all(self, tokens, length, options):
        self.longest = max(self.longest, len(tokens))
        rows = np.arange(len(tokens))[:, None] + length + np.zeros((1, 3), np.float32)
        return rows + np.float32(self._wrong(len(tokens), length))


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (lambda count, place: 0.0, "bitwise"),
        (lambda count, place: 0.25 * (count == 1), "padded"),
        (lambda count, place: 0.25 * (count == 1 and place == 303), "padded"),  # only the fourth single, far in
        (lambda count, place: 1e-3 * (count == 13), "none"),
        (lambda count, place: 1e-3 * (count > 1), "padded"),
        (lambda count, place: 1e-3 * (count == 2 and place > 100), "none"),
    ],
    ids=["always equal", "single", "fourth single", "thirteen", "several", "two, far in"],
)
def test_the_class_is_the_one_that_the_runs_show(wrong, kind):
    found = probe(Made(wrong), MadeBatch(Made(wrong)), 50, 1000)
    assert found.kind == kind
    assert found.rows
    assert found.runs > 15
    assert bool(found.cure) == (kind != "bitwise")
    assert (found.difference > 0) == (kind == "padded")
    assert str(found).startswith(kind)


@pytest.mark.parametrize("context", [2, 3, 17, 18, 40, 310])
def test_no_run_leaves_the_context(context):
    class Bounded(Made):
        def run_all(self, tokens, length, options):
            assert length + len(tokens) <= context
            return super().run_all(tokens, length, options)

    assert probe(Bounded(), MadeBatch(Made(), positions=min(16, context)), 50, context).kind == "bitwise"


def test_neighbours_that_change_a_row_are_found():
    found = probe(Made(), MadeBatch(Made(), wrong=1e-3), 50, 1000)
    assert not found.rows
    assert "others when other sequences share its run" in str(found)


@pytest.mark.parametrize(("kv", "kinds"), [("fp32", {"padded", "bitwise"}), ("int8", {"bitwise"})])
def test_a_decoder_is_tried_out_once_and_reports_it(tmp_path, kv, kinds):
    path = tiny.write(tmp_path / "tiny.gguf")
    with Decoder.load(path, cache_dir=tmp_path, context=120, threads=1, kv=kv) as decoder:
        assert decoder.report().exactness is None
        found = decoder.exactness()
        assert found.kind in kinds
        assert found.rows
        assert decoder.exactness() is found is decoder.report().exactness
        assert found.kind in str(decoder.report())
        assert decoder.active_sequences == 0
    closed = Decoder.load(path, cache_dir=tmp_path, context=120, threads=1, kv=kv)
    closed.close()
    with pytest.raises(DecoderClosedError):
        closed.exactness()


def test_a_report_says_how_weights_and_cache_are_stored(tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf")
    for precision, storage in (("fp32", "float"), ("int8", "native"), ("int4", "native")):
        with Decoder.load(path, cache_dir=tmp_path, context=64, threads=1, precision=precision) as decoder:
            report = decoder.report()
        assert (report.precision, report.storage, report.kv) == (precision, storage, "fp32")
        assert report.cache_bytes_per_token == 2 * 2 * 2 * 16 * 4
        assert report.providers == ("CPUExecutionProvider",)
        assert not report.telemetry
        assert report.operators["GroupQueryAttention"] == 2
        assert "not tried out" in str(report)


def test_a_closed_decoder_still_reports_and_holds_no_session(tmp_path):
    decoder = Decoder.load(
        tiny.write(tmp_path / "tiny.gguf"), cache_dir=tmp_path, context=64, threads=1, precision="fp8-e4m3"
    )
    session = weakref.ref(decoder._session)
    decoder.close()
    gc.collect()
    assert session() is None
    assert decoder.report().storage == "expanded"


def stepped(decoder, prompt, count, size):
    """Logits of the tokens after a prompt, `size` of them a run."""
    slot = decoder._lend()
    try:
        slot.run(prompt[:200], 0, ort.run_options())
        parts = [
            slot.run_all(prompt[place : place + size], place, ort.run_options())
            for place in range(200, 200 + count, size)
        ]
        return np.concatenate(parts)
    finally:
        decoder._take_back(slot)


@pytest.mark.model
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_with_an_8_bit_cache_single_steps_equal_long_runs_bit_for_bit(gguf, reference, precision):
    text = reference["perplexity_text_tokens"]
    with Decoder.load("smollm2-135m", precision=precision, kv="int8", context=512) as decoder:
        assert decoder.exactness().kind == "bitwise"
        assert np.array_equal(stepped(decoder, text, 48, 1), stepped(decoder, text, 48, 16))


@pytest.mark.model
def test_with_a_float_cache_the_cure_is_pairs(decoder, reference):
    text = reference["perplexity_text_tokens"]
    found = decoder.exactness()
    assert isinstance(found, StepExactness)
    assert found.kind in {"padded", "bitwise"}
    assert np.array_equal(stepped(decoder, text, 48, 2), stepped(decoder, text, 48, 16))
