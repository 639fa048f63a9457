"""The bundled model says the same with drafts as without; the long run is benchmarks/soak_speculation.py."""

import pytest

from seawall.inference import Decoder, Sampling
from seawall.inference.generate.speculation import Corpus, CorpusDraft, ModelDraft, NGram, Speculation

pytestmark = pytest.mark.model


def answer(decoder, prompt, speculation, **settings):
    with decoder.start(prompt, max_tokens=32, speculation=speculation, **settings) as sequence:
        for _ in sequence:
            pass
        return sequence.tokens, sequence.speculation


def cases(reference):
    return [case["tokens"] for case in reference["cases"][:3]]


@pytest.mark.parametrize(
    "sampling", [{}, {"sampling": Sampling(temperature=0.8, top_p=0.95, seed=3)}], ids=["greedy", "sampled"]
)
def test_an_fp32_model_drafted_for_by_its_own_8_bits_says_the_same(fp32, decoder, reference, sampling):
    corpus = Corpus([decoder.encode("The sea is salty because it contains salt.")])
    drafted = Speculation(drafters=[NGram(), CorpusDraft(corpus=corpus), ModelDraft(decoder=decoder)], length=4)
    for prompt in cases(reference):
        alone, _ = answer(fp32, prompt, Speculation(drafters=()), **sampling)
        found, statistics = answer(fp32, prompt, drafted, **sampling)
        assert found == alone
        assert statistics.tokens_per_pass > 1


def test_its_usual_precision_guesses_nine_of_ten_tokens_of_the_fp32_model(fp32, decoder, reference):
    fixed = Speculation(drafters=[ModelDraft(decoder=decoder)], length=4)
    found = [answer(fp32, prompt, fixed)[1] for prompt in cases(reference)]
    assert sum(s.accepted for s in found) / sum(s.drafted for s in found) > 0.85


def test_an_8_bit_model_with_an_8_bit_cache_says_the_same_as_plainly(gguf, reference):
    with Decoder.load("smollm2-135m", precision="int8", kv="int8", context=512, speculation="auto") as decoder:
        for prompt in cases(reference):
            plain, nothing = answer(decoder, prompt, False)
            assert nothing is None
            assert answer(decoder, prompt, None)[0] == plain
            assert answer(decoder, prompt, Speculation(length=4))[0] == plain


def test_auto_loads_a_draft_of_the_same_model_beside_an_fp32_target_and_closes_it(gguf, reference):
    target = Decoder.load("smollm2-135m", precision="fp32", context=512, speculation="auto")
    draft = target._draft
    assert draft.precision == "int4"
    _, statistics = answer(target, cases(reference)[0], None)
    assert set(statistics.drafters) == {"ngram", "model"}
    target.close()
    assert draft._session is None
