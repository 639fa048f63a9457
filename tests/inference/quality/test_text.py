"""Two decoders on the same texts."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.inference.errors import (
    EmptyPromptError,
    IncomparableModelsError,
    InvalidSettingError,
    NoQualityDataError,
    NotFiniteError,
)
from seawall.inference.quality import compare_texts, evaluation_text, perplexity
from seawall.inference.quality.text import encoded
from seawall.inference.quantize import kl_divergence

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10, 3, 5, 7, 9, 4, 6, 8, 10] * 8  # 128


class Scripted:
    """A decoder that gives the logits it was told to."""

    name = "scripted"

    def __init__(self, logits, context=1000, piece=64):
        self.table = np.asarray(logits, np.float32)
        self.vocabulary = self.table.shape[1]
        self.context = context
        self.piece = piece
        self.widest = 0

    def logits(self, tokens):
        assert len(tokens) <= self.context
        rows = self.table[np.array(tokens) % len(self.table)]
        for start in range(0, len(rows), self.piece):
            self.widest = max(self.widest, len(rows[start : start + self.piece]))
            yield rows[start : start + self.piece]

    def encode(self, text):
        return [ord(letter) % self.vocabulary for letter in text]


def table(seed, rows=50, vocabulary=20):
    return np.random.default_rng(seed).normal(0, 2, (rows, vocabulary))


def test_a_decoder_is_exactly_itself(decoders):
    scores = compare_texts(decoders["int8"], decoders["int8"], [TOKENS], window=32)
    assert (0.0, 0.0, 0.0, 1.0, 1.0) == (scores.kl, scores.kl_p99, scores.kl_max, scores.top1, scores.perplexity_ratio)
    assert 128 == scores.tokens


def test_fewer_bits_are_further_away(decoders):
    found = {name: compare_texts(decoders["fp32"], decoders[name], [TOKENS]).kl for name in ("int8", "int4-rtn")}
    assert 0 < found["int8"] < found["int4-rtn"] / 10


def test_scores_are_those_of_all_logits_at_once():
    first, second = Scripted(table(0)), Scripted(table(1), piece=64)
    tokens = list(np.random.default_rng(2).integers(0, 20, 300))
    scores = compare_texts(first, second, [tokens], window=1000)
    rows = [decoder.table[np.array(tokens) % 50] for decoder in (first, second)]
    nats = kl_divergence(*rows)
    assert math.isclose(nats.mean(), scores.kl)
    assert math.isclose(np.percentile(nats, 99), scores.kl_p99)
    assert nats.max() == scores.kl_max
    assert (rows[0].argmax(1) == rows[1].argmax(1)).mean() == scores.top1
    assert math.isclose(perplexity(second, tokens), scores.perplexity, rel_tol=1e-9)
    assert math.isclose(perplexity(first, tokens), scores.reference_perplexity, rel_tol=1e-9)


@settings(max_examples=30)
@given(st.integers(2, 100), st.lists(st.integers(1, 150), min_size=1, max_size=4))
def test_every_token_counts_once_however_texts_and_windows_fall(window, lengths):
    texts = [list(range(length)) for length in lengths]
    first, second = Scripted(table(0)), Scripted(table(1))
    texts = [[token % 20 for token in text] for text in texts]
    if max(lengths) < 2:
        with pytest.raises(NoQualityDataError):
            compare_texts(first, second, texts, window=window)
        return
    assert sum(lengths) == compare_texts(first, second, texts, window=window).tokens


def test_windows_fit_the_smaller_context_and_pieces_are_bounded():
    first, second = Scripted(table(0), context=200), Scripted(table(1), context=100)
    scores = compare_texts(first, second, [[1] * 1000], window=4000)
    assert 1000 == scores.tokens
    assert first.widest <= 64


def test_a_long_text_is_encoded_in_pieces_that_join_to_the_same_tokens():
    class Words(Scripted):
        """A token for each word with the space before it, as byte-level tokenizers have."""

        def encode(self, text):
            assert len(text) <= 50
            return re.findall(r"\s?\S+", text)

    text = "salt and water " * 100
    assert re.findall(r"\s?\S+", text) == encoded(Words(table(0), context=50), text)
    long_word = "x" * 200
    assert long_word == "".join(encoded(Words(table(0), context=50), long_word))


def test_other_vocabularies_cannot_be_compared():
    with pytest.raises(IncomparableModelsError, match="knows 20 tokens and the candidate 'scripted' 21"):
        compare_texts(Scripted(table(0)), Scripted(table(1, vocabulary=21)), "salt")


def test_other_tokenizers_cannot_be_compared():
    other = Scripted(table(1))
    other.encode = lambda text: [1, 2]
    with pytest.raises(IncomparableModelsError, match="text 0 becomes other tokens"):
        compare_texts(Scripted(table(0)), other, "salt")


@pytest.mark.parametrize("texts", [[], "", [""], [[1]], [[1], []]])
def test_nothing_to_predict_is_an_error_and_no_perfect_score(texts):
    with pytest.raises((NoQualityDataError, EmptyPromptError)):
        compare_texts(Scripted(table(0)), Scripted(table(1)), texts)


@pytest.mark.parametrize("bad", ["reference", "candidate"])
def test_nan_says_which_model_and_never_a_score(bad):
    broken = table(1)
    broken[7, 3] = np.nan
    pair = {"reference": Scripted(table(0)), "candidate": Scripted(table(1))} | {bad: Scripted(broken)}
    with pytest.raises(NotFiniteError, match=f"the {bad}'s logits"):
        compare_texts(pair["reference"], pair["candidate"], [list(range(20))])


@pytest.mark.parametrize("window", [1, 0, -5, 2.5, True])
def test_a_window_is_a_number_of_tokens(window):
    with pytest.raises(InvalidSettingError, match="window"):
        compare_texts(Scripted(table(0)), Scripted(table(1)), [[1, 2]], window=window)


def test_progress_ends_at_one():
    seen = []
    compare_texts(Scripted(table(0)), Scripted(table(1)), [[1] * 200], progress=lambda _, done: seen.append(done))
    assert sorted(seen) == seen
    assert 1.0 == seen[-1]


def test_the_evaluation_text_is_there_and_no_calibration_text():
    from importlib import resources

    other = resources.files("seawall.inference.generate").joinpath("calibration.txt").read_text(encoding="utf-8")
    text = evaluation_text()
    assert 15_000 < len(text)
    lines = {line for line in text.splitlines() if len(line) > 40}
    assert lines.isdisjoint(other.splitlines())
