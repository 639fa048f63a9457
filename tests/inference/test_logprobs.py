"""Logprobs are the model's own: what settings make of them, and whoever drafts, changes nothing."""

import numpy as np
import pytest

from seawall.inference import Choice, Decoder, Sampling
from seawall.inference.errors import InvalidSettingError
from seawall.inference.generate.choosing import Penalties, logprobs_of
from seawall.inference.generate.speculation import NGram, Speculation
from tests.inference import tiny

PROMPT = [3, 4, 5, 3, 4, 5, 3]
SETTINGS = {
    "greedy": {},
    "sampled": {"sampling": Sampling(temperature=0.7, top_k=5, seed=2)},
    "penalised": {"penalties": Penalties(repetition=1.5, presence=1.0)},
    "constrained": {"constraint": Choice(["abcabcabcabc", "haha"])},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    path = tiny.write(folder / "tiny.gguf")
    with Decoder.load(path, precision="fp32", cache_dir=folder, context=96, threads=1) as decoder:
        yield decoder
        assert decoder.active_sequences == 0


def steps(decoder, speculation=False, logprobs=3, **settings):
    with decoder.start(PROMPT, max_tokens=25, logprobs=logprobs, speculation=speculation, **settings) as sequence:
        return [step for step in sequence if step.token is not None]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_they_are_the_log_softmax_of_what_the_model_said_before_any_setting(small, settings):
    found = steps(small, **settings)
    text = PROMPT + [step.token for step in found]
    rows = np.concatenate([part.copy() for part in small.logits(text)])[len(PROMPT) - 1 :]
    for step, row in zip(found, rows, strict=False):
        expected = log_softmax(row)
        assert step.logprobs.chosen.token == step.token
        assert step.logprobs.chosen.logprob == pytest.approx(expected[step.token], abs=1e-4)
        likeliest = np.argsort(-expected, kind="stable")[:3]
        assert [one.token for one in step.logprobs.top] == likeliest.tolist()
        np.testing.assert_allclose([one.logprob for one in step.logprobs.top], expected[likeliest], atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_they_are_the_same_with_drafts_and_come_with_their_token(small, settings):
    alone = steps(small, Speculation(drafters=()), **settings)
    assert len(alone) > 2
    for length in (1, 4, 16):
        assert steps(small, Speculation(drafters=(NGram(),), length=length), **settings) == alone


def test_each_token_has_its_bytes_and_a_control_token_has_none(small):
    for step in steps(small, logprobs=14):
        for one in (step.logprobs.chosen, *step.logprobs.top):
            assert one.bytes == small._codec.bytes_of(one.token)
        assert {one.token for one in step.logprobs.top} == set(range(14))
        assert sum(np.exp(one.logprob) for one in step.logprobs.top) == pytest.approx(1, abs=1e-5)


def test_none_asked_for_none_told_and_zero_tells_the_chosen_alone(small):
    assert all(step.logprobs is None for step in steps(small, logprobs=None))
    found = steps(small, logprobs=0)
    assert all(step.logprobs.top == () for step in found)
    assert [step.logprobs.chosen.token for step in found] == [step.token for step in found]


def test_asking_changes_no_token(small):
    for settings in SETTINGS.values():
        free = [step.token for step in steps(small, logprobs=None, **settings)]
        assert [step.token for step in steps(small, logprobs=5, **settings)] == free


@pytest.mark.parametrize("value", [-1, 21, 1.0, True, "3"])
def test_a_number_that_cannot_be_is_refused_and_holds_nothing(small, value):
    with pytest.raises(InvalidSettingError, match="logprobs must be a whole number from 0 to 20, or None, got"):
        small.start(PROMPT, max_tokens=1, logprobs=value)


def test_of_equal_logits_the_first_come_first():
    logits = np.array([1, 2, 2, 0, 2], np.float32)
    found = logprobs_of(logits, 3, 2, lambda token: b"%d" % token)
    assert [one.token for one in found.top] == [1, 2]
    assert found.chosen.bytes == b"3"


def test_more_than_there_are_tokens_is_all_of_them(small):
    assert len(steps(small, logprobs=20)[0].logprobs.top) == small.vocabulary < 20
