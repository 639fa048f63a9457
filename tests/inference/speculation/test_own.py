"""What a user brings to speculation, settings and drafters of his own: what is wrong is refused, and named."""

import itertools
from functools import partial

import numpy as np
import pytest

from seawall.inference import Decoder
from seawall.inference.errors import DecoderClosedError, InvalidSettingError, RuntimeFailure
from seawall.inference.generate.choosing import Chooser
from seawall.inference.generate.rows import ContinuousBatch, Request
from seawall.inference.generate.speculation import Corpus, CorpusDraft, ModelDraft, NGram, Proposal, Speculation
from tests.inference import tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def decoder(path):
    with Decoder.load(path, precision="int8", kv="int8", cache_dir=path.parent, context=96, threads=1) as loaded:
        loaded._ends = frozenset()
        yield loaded
        assert loaded.active_sequences == 0


class Saying:
    """Proposes the same for ever, however much was asked for."""

    name = "saying"
    chances = (0.9,)

    def __init__(self, token):
        self.token = token

    def cost(self):
        return 0.0

    def start(self, prompt, host):
        return self

    def propose(self, turn):
        return map(Proposal, itertools.repeat(self.token))

    def extend(self, token):
        pass

    def close(self):
        pass


def answer(decoder, speculation):
    with decoder.start([3, 4, 5], max_tokens=20, speculation=speculation) as sequence:
        for _ in sequence:
            pass
        return sequence.tokens, sequence.speculation


@pytest.mark.parametrize("length", [None, 4])
@pytest.mark.parametrize("token", [3, np.int64(3)])
def test_a_drafter_that_knows_no_end_is_asked_for_what_may_be_drafted(decoder, length, token):
    tokens, found = answer(decoder, Speculation(drafters=[Saying(token)], length=length))
    assert tokens == answer(decoder, False)[0]
    assert 0 < len(found.drafters["saying"].drafted_at) <= 16


@pytest.mark.parametrize("token", [-1, 10**12, "3", None, 1.5])
def test_a_proposal_that_is_no_token_of_the_models_ends_that_answer_and_says_whose_it_was(decoder, token):
    drafts = Speculation(drafters=[Saying(token)])
    with decoder.start([3, 4], max_tokens=9, speculation=drafts) as sequence:
        sequence.step()
        with pytest.raises(InvalidSettingError, match=f"drafter 'saying' proposed token {token!r}, which"):
            sequence.step()
    with ContinuousBatch(decoder, rows=2) as batch:
        wrong = batch.join(Request(prompt=(3, 4), max_tokens=9, speculation=drafts))
        other = batch.join(Request(prompt=(3, 4, 5), max_tokens=20, speculation=False))
        while batch.rows_in_use:
            batch.step()
    assert "proposed token" in str(wrong.error)
    assert other.tokens == answer(decoder, False)[0]


def says(decoder, proposals, **settings):
    drafter = Saying(3)
    drafter.propose = lambda turn: iter(proposals)
    return answer(decoder, Speculation(drafters=[drafter], length=2, **settings))


@pytest.mark.parametrize("wrong", [3, (3, 0, None), None])
def test_what_is_no_proposal_is_refused_by_the_name_of_its_drafter(decoder, wrong):
    with pytest.raises(InvalidSettingError, match=r"drafter 'saying' proposed .*, which is no Proposal\(token\)"):
        says(decoder, [wrong])


@pytest.mark.parametrize("strength", [-1, -99, "strong", 1.5, None])
def test_a_strength_is_a_class_counted_from_0(decoder, strength):
    with pytest.raises(InvalidSettingError, match=f"proposed strength {strength!r}, which is none of its classes"):
        says(decoder, [Proposal(3, strength)])
    assert says(decoder, [Proposal(3, 10**30)])[0] == answer(decoder, False)[0]


def test_what_a_token_was_drawn_from_must_be_a_distribution_where_the_rule_needs_one(decoder):
    words = decoder.vocabulary
    share = np.full(words, 1 / words)
    for wrong in (share * 2, share[1:], share[None], share * np.nan, -share, share * 0, share.tolist(), "even"):
        proposals = [Proposal(3, 0, wrong)] * 2
        with pytest.raises(InvalidSettingError, match="proposed token 3 as drawn from what is no distribution"):
            says(decoder, proposals, rule="drawn")
        assert says(decoder, proposals)[0] == answer(decoder, False)[0]
    assert len(says(decoder, [Proposal(3, 0, share.astype(np.float32))] * 2, rule="drawn")[0]) == 20


@pytest.mark.parametrize("rule", ["chosen", "drawn"])
def test_tokens_of_an_answer_are_pythons_own_whatever_was_proposed(decoder, rule):
    tokens = says(decoder, [Proposal(np.int64(3))] * 2, accept_above=1e-30, rule=rule)[0]
    assert tokens.count(3) > 4
    assert {type(token) for token in tokens} == {int}


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0, None, "free", True])
def test_a_cost_is_a_number_of_seconds(decoder, cost):
    drafter = Saying(3)
    drafter.cost = lambda: cost
    with pytest.raises(InvalidSettingError, match=f"cost of drafter 'saying' must be seconds, 0 or more, got {cost!r}"):
        answer(decoder, Speculation(drafters=[drafter]))


def test_a_drafter_that_raises_while_it_closes_keeps_nobody_elses_cache(decoder, path):
    class Clinging(Saying):
        def close(self):
            raise LookupError("mine")

    with Decoder.load(path, precision="int8", cache_dir=path.parent, context=96, threads=1) as draft:
        drafters = [Clinging(3), ModelDraft(decoder=draft)]
        with pytest.raises(LookupError, match="mine"):
            answer(decoder, Speculation(drafters=drafters))
        assert (decoder.active_sequences, draft.active_sequences) == (0, 0)


def test_drafters_of_the_wrong_things_are_refused_where_they_are_made():
    with pytest.raises(InvalidSettingError, match="decoder must be a loaded Decoder, got 'smollm2-135m'"):
        ModelDraft(decoder="smollm2-135m")
    with pytest.raises(InvalidSettingError, match="corpus must be Corpus"):
        CorpusDraft(corpus=[[1, 2]])


@pytest.mark.parametrize("speculation", [False, Speculation(length=4)], ids=["plain", "drafted"])
@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_logits_that_are_not_numbers_for_once_cost_a_step_and_no_token(decoder, monkeypatch, speculation, fails_at):
    wanted, real, calls = answer(decoder, False)[0], Chooser.choose, itertools.count(1)

    def choose(self, logits, drafted=()):
        return real(self, np.full_like(logits, np.nan) if next(calls) == fails_at else logits, drafted)

    with decoder.start([3, 4, 5], max_tokens=20, speculation=speculation) as sequence:
        monkeypatch.setattr(Chooser, "choose", choose)
        with pytest.raises(RuntimeFailure, match="nan"):
            list(sequence)
        list(sequence)
        assert sequence.tokens == wanted


def test_an_answer_whose_drafter_has_raised_is_over(decoder):
    class Forgetful(Saying):
        def extend(self, token):
            raise LookupError("mine")

    with decoder.start([3, 4], max_tokens=9, speculation=Speculation(drafters=[Forgetful(3)])) as sequence:
        with pytest.raises(LookupError, match="mine"):
            sequence.step()
        with pytest.raises(DecoderClosedError, match="this sequence has failed"):
            sequence.step()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("most", 0), ("most", 17), ("most", True), ("length", 0), ("length", 1.5), ("rule", "guess"),
     ("accept_above", 0), ("accept_above", 1.5), ("accept_above", "0.5"), ("exact", "no"),
     ("drafters", [NGram(), NGram()]), ("drafters", NGram()), ("drafters", [NGram]),
     ("drafters", "ngram"), ("drafters", None)],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(setting, value):
    with pytest.raises(InvalidSettingError, match=f"{setting} must"):
        Speculation(**{setting: value})


@pytest.mark.parametrize("chances", [(1.0,), (), 0.9, ("0.9",), None, "half", (True,), (float("nan"),)])
def test_chances_of_a_drafter_must_be_probabilities(chances):
    drafter = Saying(4)
    drafter.chances = chances
    with pytest.raises(InvalidSettingError, match="chances of drafter 'saying'"):
        Speculation(drafters=[drafter])


@pytest.mark.parametrize("shortest", [0, True, 1.5, "2", None])
def test_a_match_has_a_whole_number_of_tokens(shortest):
    for drafter in (NGram, partial(CorpusDraft, corpus=Corpus([[1, 2]]))):
        with pytest.raises(InvalidSettingError, match="shortest must be a whole number"):
            drafter(shortest=shortest)
    with pytest.raises(InvalidSettingError, match="from 1 to 16, got 17"):  # it would never be found
        CorpusDraft(corpus=Corpus([[1, 2]]), shortest=17)


@pytest.mark.parametrize("speculation", [True, "auto", NGram(), [NGram()]])
def test_what_is_no_speculation_is_refused_where_it_is_given(decoder, path, speculation):
    with pytest.raises(InvalidSettingError, match="speculation must be"):
        decoder.start([1], max_tokens=4, speculation=speculation)
    if speculation != "auto":
        with pytest.raises(InvalidSettingError, match="speculation must be"):
            Decoder.load(path, precision="int8", cache_dir=path.parent, speculation=speculation)
