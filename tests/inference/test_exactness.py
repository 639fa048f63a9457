"""The model computes what an independent implementation computes (see oracle/README.md)."""

import hashlib
import math

import numpy as np
import pytest

from seawall.inference import Decoder, models, perplexity

pytestmark = pytest.mark.model


def greedy_tokens(decoder, prompt, count):
    """Greedy tokens past any end token, as the oracle made them."""
    tokens = []
    with decoder.start(prompt, max_tokens=count) as sequence:
        sequence._answer._ends = frozenset()
        tokens += [step.token for step in sequence if step.token is not None]
    return tokens


@pytest.mark.parametrize("case", range(7))
def test_the_fp32_graph_gives_the_same_64_tokens_as_the_independent_reference(fp32, reference, case):
    expected = reference["cases"][case]
    assert greedy_tokens(fp32, expected["tokens"], 64) == expected["greedy"]


def test_the_reference_was_made_from_the_weights_that_are_installed(gguf, reference):
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == reference["made_with"]["gguf_sha256"]


def test_fp32_perplexity_equals_the_independent_reference(fp32, reference):
    measured = perplexity(fp32, reference["perplexity_text_tokens"])
    assert measured == pytest.approx(math.exp(reference["mean_loss"]), rel=1e-5)


def test_the_usual_precision_is_within_one_percent_of_the_perplexity_of_fp32(decoder, reference):
    measured = perplexity(decoder, reference["perplexity_text_tokens"])
    assert measured == pytest.approx(math.exp(reference["mean_loss"]), rel=0.01)


def test_prompts_are_encoded_as_the_committed_ones(decoder, reference):
    for case in reference["cases"]:
        encode = decoder.encode_chat if case["kind"] == "chat" else decoder.encode
        assert encode(case["text"]) == case["tokens"]


def test_a_prompt_read_in_several_chunks_answers_like_its_logits_say(fp32, reference):
    text = reference["perplexity_text_tokens"][:600]  # chunks of 256, 256 and 88
    last = list(fp32.logits(text))[-1][-1]
    assert greedy_tokens(fp32, text, 1) == [int(np.argmax(last))]


def test_a_cache_used_before_changes_nothing(decoder, reference):
    prompt = reference["cases"][0]["tokens"]
    first = greedy_tokens(decoder, prompt, 24)
    greedy_tokens(decoder, reference["perplexity_text_tokens"][:700], 3)  # fills the same cache further
    assert greedy_tokens(decoder, prompt, 24) == first


def test_sequences_that_take_turns_answer_as_they_do_alone(decoder, reference):
    prompts = [case["tokens"] for case in reference["cases"][:3]]
    alone = [greedy_tokens(decoder, prompt, 16) for prompt in prompts]
    sequences = [decoder.start(prompt, max_tokens=16) for prompt in prompts]
    assert decoder.active_sequences == 3
    for sequence in sequences:
        sequence._answer._ends = frozenset()
    for _ in range(17):
        for sequence in sequences:
            sequence.step()
    assert [sequence.tokens for sequence in sequences] == alone
    for sequence in sequences:
        sequence.close()


def test_an_int4_model_says_what_fp32_says_in_two_thirds_of_the_space_of_int8(fp32, reference):
    """Its blocks are the source's own: the KL divergence is that of 8-bit activations, 0.0027."""
    text = reference["perplexity_text_tokens"][:512]
    with Decoder.load("smollm2-135m", precision="int4", context=600) as small:
        found, expected = (_log_probabilities(decoder, text) for decoder in (small, fp32))
        assert (np.exp(expected) * (expected - found)).sum(axis=1).mean() < 0.005
        assert (expected.argmax(axis=1) == found.argmax(axis=1)).mean() > 0.93

    def size(precision):
        folder = models.prepare("smollm2-135m", precision=precision).folder
        return sum(file.stat().st_size for file in folder.iterdir())

    assert size("int4") < min(0.65 * size("int8"), 113_000_000)


def _log_probabilities(decoder, text):
    logits = np.concatenate(list(decoder.logits(text))).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
