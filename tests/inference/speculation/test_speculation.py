"""Speculation changes how fast an answer comes and not what it says; whatever ends it, nothing is left behind."""

import dataclasses
import gc
import itertools
import threading

import numpy as np
import pytest

from seawall.inference import Decoder, Sampling
from seawall.inference.errors import (
    DecoderClosedError,
    GenerationCancelledError,
    InvalidSettingError,
    RuntimeFailure,
)
from seawall.inference.generate.choosing import Penalties
from seawall.inference.generate.slot import Slot
from seawall.inference.generate.speculation import (
    Corpus,
    CorpusDraft,
    ModelDraft,
    NGram,
    Proposal,
    Speculation,
    SpeculationStatistics,
)
from seawall.inference.generate.speculation.model import ModelDrafting
from tests.inference import tiny

EXACT = Speculation(drafters=())
PROMPTS = [[5], [5, 6], [3, 4, 5, 3, 4, 5, 3, 4], [7] * 30, [3, 9, 4, 8, 5, 10, 6, 11, 12, 3, 9]]


class Guessing:
    """A drafter of one's own: random tokens, drawn from what it says it draws from."""

    name = "guessing"
    chances = (0.1,)

    def __init__(self, vocabulary, seconds=0.0):
        self.vocabulary = vocabulary
        self.seconds = seconds
        self.closed = 0
        self.rng = np.random.default_rng(0)  # one for all sequences, or all of them would draw the same

    def cost(self):
        return self.seconds

    def start(self, prompt, host):
        return self

    def propose(self, turn):
        flat = np.full(self.vocabulary, 1 / self.vocabulary)
        for _ in range(turn.most):
            yield Proposal(int(self.rng.integers(self.vocabulary)), 0, flat)

    def extend(self, token):
        pass

    def close(self):
        self.closed += 1


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def tinies(path):
    """The tiny model in four forms, each with a draft of itself in INT8."""
    forms = {"fp32": ("fp32", "fp32"), "int8": ("int8", "fp32"), "int4": ("int4", "fp32"), "int8-kv8": ("int8", "int8")}
    loaded = {
        name: Decoder.load(path, precision=precision, kv=kv, cache_dir=path.parent, context=96, threads=1)
        for name, (precision, kv) in forms.items()
    }
    yield loaded
    for decoder in loaded.values():
        assert decoder.active_sequences == 0
        decoder.close()


def drafters(decoder, tinies):
    corpus = Corpus([[3, 4, 5, 6, 7, 8], [5, 5, 5, 5], [3, 9, 4, 8]])
    return {
        "ngram": [NGram()],
        "corpus": [CorpusDraft(corpus=corpus, shortest=1)],
        "shared": [ModelDraft(decoder=tinies["int8"])],
        "own": [ModelDraft(decoder=tinies["int8"], share=False)],
        "itself": [ModelDraft(decoder=decoder)],
        "hybrid": [NGram(), ModelDraft(decoder=tinies["int4"])],
        "guessing": [Guessing(decoder.vocabulary)],
    }


def answer(decoder, prompt, speculation=None, tokens=40, **settings):
    with decoder.start(prompt, max_tokens=tokens, speculation=speculation, **settings) as sequence:
        steps = list(sequence)
        return sequence.tokens, steps, sequence.speculation


def everlasting(decoder):
    decoder._ends = frozenset()
    return decoder


@pytest.mark.parametrize("form", ["fp32", "int8", "int4", "int8-kv8"])
@pytest.mark.parametrize("length", [None, 1, 5, 16])
def test_greedy_answers_are_the_targets_own_with_every_drafter(tinies, form, length):
    decoder = everlasting(tinies[form])
    for prompt, (name, drafts) in itertools.product(PROMPTS, drafters(decoder, tinies).items()):
        alone, steps, _ = answer(decoder, prompt, EXACT)
        found, found_steps, statistics = answer(decoder, prompt, Speculation(drafters=drafts, length=length))
        assert found == alone, (name, prompt)
        assert [s.token for s in found_steps] == [s.token for s in steps]
        assert statistics.tokens == len(found) - 1
        if length == 5 and name == "itself" and form == "int8-kv8":
            assert statistics.acceptance_rate == 1


def test_a_model_whose_passes_agree_gives_its_plain_answer(tinies):
    decoder = everlasting(tinies["int8-kv8"])
    assert decoder.exactness().kind == "bitwise"
    for prompt in PROMPTS:
        plain = answer(decoder, prompt)[0]
        assert answer(decoder, prompt, Speculation(length=4))[0] == plain


SAMPLINGS = [
    Sampling(seed=5), Sampling(temperature=0.8, top_k=4, seed=1), Sampling(temperature=1.5, top_p=0.9, seed=2),
    Sampling(min_p=0.2, seed=3),
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("penalties", [None, Penalties(repetition=1.3, presence=0.5, frequency=0.2)])
def test_one_seed_gives_one_answer_drafted_or_not(tinies, sampling, penalties):
    decoder = everlasting(tinies["int8"])
    settings = {"sampling": sampling, "penalties": penalties}
    for prompt, drafts in itertools.product(PROMPTS[1:4], drafters(decoder, tinies).values()):
        alone = answer(decoder, prompt, EXACT, **settings)[0]
        assert answer(decoder, prompt, Speculation(drafters=drafts, length=6), **settings)[0] == alone


def test_greedy_answers_with_penalties_are_the_targets_own_too(tinies):
    decoder = everlasting(tinies["int8"])
    settings = {"penalties": Penalties(frequency=1.5)}
    plain = answer(decoder, PROMPTS[2], EXACT)[0]
    alone = answer(decoder, PROMPTS[2], EXACT, **settings)[0]
    assert alone != plain
    for drafts in drafters(decoder, tinies).values():
        assert answer(decoder, PROMPTS[2], Speculation(drafters=drafts, length=6), **settings)[0] == alone


def second_tokens(decoder, drafts, rule, seeds):
    """How often each token came second in many answers; the first comes with the prompt, without a draft."""
    found = np.zeros(decoder.vocabulary)
    for seed in seeds:
        speculation = Speculation(drafters=drafts, length=2, rule=rule)
        found[answer(decoder, [3, 4], speculation, tokens=3, sampling=Sampling(temperature=0.9, seed=seed))[0][1]] += 1
    return found


@pytest.fixture(scope="module")
def plain_second_tokens(tinies):
    return second_tokens(everlasting(tinies["int8"]), [], "chosen", range(10_000, 11_000))


@pytest.mark.parametrize("rule", ["drawn", "chosen"])
@pytest.mark.parametrize("drafter", ["guessing", "shared"])
def test_sampled_answers_follow_the_targets_distribution_by_either_rule(tinies, plain_second_tokens, rule, drafter):
    """A thousand answers with drafts and a thousand without come from one distribution."""
    decoder = everlasting(tinies["int8"])
    speculative = second_tokens(decoder, drafters(decoder, tinies)[drafter], rule, range(1000))
    both = speculative + plain_second_tokens
    common = both >= 10
    statistic = ((speculative - plain_second_tokens)[common] ** 2 / both[common]).sum()
    freedom = common.sum()
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_the_rejection_rule_replays_with_its_seed(tinies):
    decoder = everlasting(tinies["int8"])
    rules = {"sampling": Sampling(temperature=1.2, seed=9)}
    speculation = Speculation(drafters=[ModelDraft(decoder=tinies["int4"])], length=3, rule="drawn")
    assert answer(decoder, [5, 6], speculation, **rules)[0] == answer(decoder, [5, 6], speculation, **rules)[0]


def test_leniency_is_lossy_and_off_unless_asked_for(tinies):
    decoder = everlasting(tinies["int8"])
    drafts = [Guessing(decoder.vocabulary)]
    alone = answer(decoder, [5, 6], EXACT)[0]
    assert answer(decoder, [5, 6], Speculation(drafters=drafts, length=8, accept_above=1.0))[0] == alone
    anything, _, statistics = answer(decoder, [5, 6], Speculation(drafters=drafts, length=8, accept_above=1e-9))
    assert anything != alone
    assert statistics.acceptance_rate > 0.9


def test_stop_strings_and_end_tokens_end_the_answer_where_they_do_without_drafts(tinies):
    decoder = everlasting(tinies["int8"])
    tokens = answer(decoder, PROMPTS[2], EXACT)[0]
    text = decoder.decode(tokens)
    expected = answer(decoder, PROMPTS[2], EXACT, stop=[text[9:12]])[1]
    drafted = Speculation(drafters=[ModelDraft(decoder=decoder)], length=16)
    found = answer(decoder, PROMPTS[2], drafted, stop=[text[9:12]])[1]
    assert found == expected
    assert found[-1].finish == "stop"
    decoder._ends = frozenset({tokens[10]})
    ended, _, statistics = answer(decoder, PROMPTS[2], drafted)
    assert ended == tokens[: tokens.index(tokens[10]) + 1]
    assert statistics.tokens == len(ended) - 1  # what was drafted past the end is not counted


def test_an_answer_fills_the_context_to_the_last_token_and_not_beyond(tinies):
    decoder = everlasting(tinies["int8"])
    for drafts in drafters(decoder, tinies).values():
        found, steps, _ = answer(decoder, PROMPTS[2], Speculation(drafters=drafts, length=16), tokens=500)
        assert len(PROMPTS[2]) + len(found) == decoder.context
        assert steps[-1].finish == "length"


def test_a_limit_of_tokens_holds_within_a_round(tinies):
    decoder = everlasting(tinies["int8"])
    for limit in range(1, 9):
        speculation = Speculation(drafters=[ModelDraft(decoder=decoder)], length=4)
        assert len(answer(decoder, [5, 6], speculation, tokens=limit)[0]) == limit


def test_statistics_add_up(tinies):
    decoder = everlasting(tinies["int8"])
    speculation = Speculation(drafters=[NGram(), ModelDraft(decoder=tinies["int4"])], length=4)
    found, _, statistics = answer(decoder, PROMPTS[2], speculation)
    assert isinstance(statistics, SpeculationStatistics)
    assert statistics.tokens == len(found) - 1
    assert statistics.rounds == statistics.plain + statistics.rejected + statistics.partial + statistics.complete
    assert statistics.tokens == statistics.rounds + statistics.accepted
    assert statistics.drafted >= statistics.accepted
    assert statistics.tokens_per_pass == statistics.tokens / statistics.rounds
    for part in statistics.drafters.values():
        assert sum(part.drafted_at) == part.drafted
        assert sum(part.accepted_at) == part.accepted
        assert list(part.accepted_at) == sorted(part.accepted_at, reverse=True)
    assert statistics.target_seconds > 0
    assert statistics.predicted_speedup > 0


def test_without_speculation_there_are_no_statistics(tinies):
    assert answer(tinies["int8"], [5, 6])[2] is None


def test_a_draft_in_the_targets_cache_holds_no_cache_of_its_own(tinies):
    target, draft = tinies["fp32"], tinies["int8"]
    with target.start([5, 6], max_tokens=8, speculation=Speculation(drafters=[ModelDraft(decoder=draft)])) as sequence:
        sequence.step()
        assert draft.active_sequences == 0
    apart = Speculation(drafters=[ModelDraft(decoder=draft, share=False)])
    with target.start([5, 6], max_tokens=8, speculation=apart) as sequence:
        sequence.step()
        assert draft.active_sequences == 1
    assert draft.active_sequences == 0


def test_a_draft_with_a_cache_of_its_own_reads_no_token_twice(tinies, monkeypatch):
    decoder = everlasting(tinies["int8"])
    read = []
    real = ModelDrafting._run
    monkeypatch.setattr(
        ModelDrafting, "_run", lambda self, tokens, *rest: read.append(len(tokens)) or real(self, tokens, *rest)
    )
    answer(decoder, PROMPTS[4], Speculation(drafters=[ModelDraft(decoder=decoder, share=False)], length=3))
    assert read[0] == len(PROMPTS[4]) + 1
    assert max(read[1:]) <= 2  # the last drafted token, which it never read, and the target's own


def test_a_forgotten_sequence_gives_back_what_its_drafters_hold(tinies):
    target, draft = tinies["fp32"], tinies["int8"]
    apart = Speculation(drafters=[ModelDraft(decoder=draft, share=False)])
    sequence = target.start([5, 6], max_tokens=8, speculation=apart)
    sequence.step()
    del sequence
    gc.collect()
    assert (target.active_sequences, draft.active_sequences) == (0, 0)


def test_drafters_are_closed_once_however_a_sequence_ends(tinies):
    decoder = tinies["int8"]
    drafter = Guessing(decoder.vocabulary)
    sequence = decoder.start([5, 6], max_tokens=8, speculation=Speculation(drafters=[drafter]))
    sequence.step()
    sequence.close()
    sequence.close()
    assert drafter.closed == 1


@pytest.mark.parametrize("fails_at", range(6))
def test_a_run_that_fails_or_is_cancelled_at_any_point_of_a_round_leaves_nothing(tinies, monkeypatch, fails_at):
    target, draft = everlasting(tinies["fp32"]), tinies["int8"]
    apart = Speculation(drafters=[ModelDraft(decoder=draft, share=False)], length=3)
    alone = answer(target, [5, 6], EXACT, tokens=12)[0]
    with target.start([5, 6], max_tokens=12, speculation=apart) as sequence:
        sequence.step()
        real, calls = (Slot.run, Slot.run_all), itertools.count()

        def failing(original):
            def run(self, *arguments):
                if next(calls) == fails_at:
                    raise RuntimeFailure("running the model", "out of luck")
                return original(self, *arguments)

            return run

        monkeypatch.setattr(Slot, "run", failing(real[0]))
        monkeypatch.setattr(Slot, "run_all", failing(real[1]))
        with pytest.raises(RuntimeFailure, match="out of luck"):
            for _ in range(12):
                sequence.step()
        monkeypatch.undo()
        for _ in sequence:  # the same sequence goes on as if nothing had been
            pass
        assert sequence.tokens == alone
    assert (target.active_sequences, draft.active_sequences) == (0, 0)


def test_a_cancelled_sequence_stops_in_its_draft_too(tinies):
    target, draft = tinies["fp32"], tinies["int8"]

    class Slow(Guessing):
        def propose(self, turn):
            sequence.cancel()
            assert turn.options.terminate
            yield from super().propose(turn)

    speculation = Speculation(drafters=[Slow(target.vocabulary), ModelDraft(decoder=draft)])
    sequence = everlasting(target).start([5, 6], max_tokens=8, speculation=speculation)
    sequence.step()
    with pytest.raises(GenerationCancelledError):
        sequence.step()
    sequence.close()
    assert target.active_sequences == 0


def test_sequences_of_one_draft_model_in_several_threads_do_not_mix(tinies):
    target = everlasting(tinies["fp32"])
    speculation = Speculation(drafters=[NGram(), ModelDraft(decoder=tinies["int8"])], length=4)
    alone = [answer(target, prompt, EXACT)[0] for prompt in PROMPTS]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: found.update({i: answer(target, p, speculation)[0]}))
        for i, p in enumerate(PROMPTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(PROMPTS))] == alone


def first_step(decoder, speculation):
    with decoder.start([5], max_tokens=4, speculation=speculation) as sequence:
        sequence.step()


def test_a_draft_model_of_another_vocabulary_is_refused(tinies, tmp_path):
    other = tiny.write(tmp_path / "other.gguf", tokens=[*tiny.TOKENS[:-1], "ba"])
    with Decoder.load(other, cache_dir=tmp_path, context=64) as draft:
        foreign = Speculation(drafters=[ModelDraft(decoder=draft)])
        with pytest.raises(InvalidSettingError, match="must have the target's vocabulary"):
            first_step(tinies["int8"], foreign)


def test_a_closed_draft_model_is_refused(tinies, path):
    draft = Decoder.load(path, cache_dir=path.parent, context=96)
    draft.close()
    with pytest.raises(DecoderClosedError):
        first_step(tinies["fp32"], Speculation(drafters=[ModelDraft(decoder=draft)]))


def test_a_model_whose_passes_never_agree_cannot_be_exact(tinies, monkeypatch):
    decoder = tinies["int8"]
    monkeypatch.setattr(decoder, "_exactness", dataclasses.replace(decoder.exactness(), kind="none"))
    with pytest.raises(InvalidSettingError, match="exact must be False"):
        first_step(decoder, Speculation())
    assert len(answer(decoder, [5, 6], Speculation(exact=False), tokens=4)[0]) == 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"speculation": "auto"}, "int8"),
        ({"speculation": "auto", "precision": "fp32"}, "fp32"),
        ({"speculation": "auto", "kv": "fp32"}, "fp32"),
        ({"speculation": Speculation()}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_auto_keeps_the_cache_of_quantized_weights_in_8_bits_so_that_exactness_is_free(path, settings, expected):
    with Decoder.load(path, cache_dir=path.parent, context=96, **settings) as decoder:
        assert decoder.kv == expected
