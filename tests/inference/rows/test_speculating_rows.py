"""Rows that draft: several at once in one run, or one alone with a model, and all of it changes nothing they say."""

from dataclasses import replace

import pytest

from seawall.inference import Decoder, Sampling, Speculation
from seawall.inference.errors import RuntimeExhaustedError
from seawall.inference.generate.rows import ContinuousBatch
from seawall.inference.generate.speculation import ModelDraft, Proposal
from tests.inference import tiny

from .conftest import CONTEXT, ENDLESS, answers, ask, content, drain, guessed, text
from .test_failing_rows import Failing

REPEATED = [
    ask(text(12, seed) * 3, 30, sampling=Sampling(seed=seed), logprobs=1, constraint=ENDLESS) for seed in range(4)
]


def drafting(request, **settings):
    return replace(request, speculation=Speculation(**settings))


@pytest.mark.parametrize("length", [None, 5, 16])
def test_rows_of_one_run_draft_and_are_rewound_each_for_itself(model, alone, length):
    asked = [guessed(alone, request, wrong=wrong, length=length) for wrong, request in enumerate(REPEATED, 2)]
    with ContinuousBatch(model, rows=4) as batch:
        rows = [batch.join(request) for request in asked]
        for request, steps in zip(asked, drain(batch, rows), strict=True):
            assert content(steps) == content(alone(request))
        if length is not None:
            assert all(0 < row.accepted_tokens < row.drafted_tokens for row in rows)
        for row in rows:
            statistics = row.speculation
            assert statistics.tokens == len(row.tokens) - 1
            assert statistics.drafted == row.drafted_tokens


def test_a_run_of_one_row_that_drafts_and_others_that_do_not_leaves_these_alone(model, alone):
    asked = [guessed(alone, REPEATED[0], length=5), *REPEATED[1:]]
    with ContinuousBatch(model, rows=4) as batch:
        for request, steps in zip(asked, answers(batch, asked), strict=True):
            assert content(steps) == content(alone(request))


def test_several_tokens_of_a_step_end_at_a_stop_string(model, alone):
    whole = "".join(step.text for step in alone(replace(REPEATED[1], speculation=Speculation(drafters=()))))
    stop = whole[6:9]
    asked = guessed(alone, replace(REPEATED[1], stop=(stop,)), wrong=100, length=16)
    everything = asked.speculation.drafters[0].answer = guessed(alone, REPEATED[1]).speculation.drafters[0].answer
    with ContinuousBatch(model, rows=1) as batch:
        row = batch.join(asked)
        assert content(drain(batch, [row])[0]) == content(alone(asked))
        assert len(row.tokens) < len(everything)
        assert row.accepted_tokens > len(row.tokens)  # the target agreed with more than the answer has


@pytest.fixture(scope="module")
def draft(model, tmp_path_factory):
    """Other weights of the same model: a draft model that guesses some of its tokens."""
    base = tmp_path_factory.mktemp("draft")
    path = tiny.write(base / "tiny.gguf", context_length=CONTEXT)
    with Decoder.load(path, cache_dir=base, context=CONTEXT, threads=1, kv=model.kv, precision="int8") as loaded:
        yield loaded


def test_a_model_drafts_for_a_row_while_that_is_alone(model, alone, draft):
    first, second = (drafting(request, drafters=[ModelDraft(decoder=draft)], length=3) for request in REPEATED[:2])
    with ContinuousBatch(model, rows=3) as batch:
        row, other = batch.join(first), batch.join(replace(REPEATED[2], max_tokens=9))
        late = None
        found = {id(row): [], id(other): []}
        while batch.rows_in_use:
            for advance in batch.step():
                found[id(advance.row)] += advance.steps
            if row.finished and late is None:
                late = batch.join(second)
                found[id(late)] = []
        assert content(found[id(row)]) == content(alone(first))
        assert content(found[id(other)]) == content(alone(replace(REPEATED[2], max_tokens=9)))
        assert content(found[id(late)]) == content(alone(second))
        assert row.speculation.drafters["model"].accepted > 0
        assert late.speculation.drafters["model"].accepted > 0
    assert draft.active_sequences == 0


def test_a_row_whose_model_drafts_in_its_cache_stays_where_that_is(model, alone, draft):
    pinned, other = drafting(REPEATED[0], drafters=[ModelDraft(decoder=draft)], length=3), REPEATED[1]
    with ContinuousBatch(model, rows=4) as batch:
        row = batch.join(pinned)
        while row.reading:
            batch.step()
        place = row.index
        late = batch.join(other)
        found = drain(batch, [late])
        assert (row.finished, row.index) == (True, place)
        assert content(found[0]) == content(alone(other))
        assert row.tokens == [step.token for step in alone(pinned) if step.token is not None]


class Unreliable:
    """A user's drafter that raises."""

    name = "unreliable"
    chances = (0.5,)

    def __init__(self, when):
        self.when = when
        self.closed = 0

    def cost(self):
        return 0.0

    def start(self, prompt, host):
        if self.when == "start":
            raise LookupError(self.when)
        return self

    def propose(self, turn):
        if self.when == "propose":
            raise LookupError(self.when)
        yield Proposal(3)

    def extend(self, token):
        if self.when == "extend":
            raise LookupError(self.when)

    def close(self):
        self.closed += 1
        if self.when == "close":
            raise LookupError(self.when)


@pytest.mark.parametrize("when", ["start", "propose", "extend", "close"])
@pytest.mark.parametrize("company", [True, False])
def test_a_drafter_that_raises_ends_its_row_with_that_and_no_other(model, alone, when, company):
    drafter = Unreliable(when)
    asked = [ask(text(5), 9, constraint=ENDLESS, speculation=Speculation(drafters=[drafter]))]
    asked += [REPEATED[0]] if company else []
    with ContinuousBatch(model, rows=2) as batch:
        found = answers(batch, asked)
        assert isinstance(found[0][-1], LookupError)
        if company:
            assert content(found[1]) == content(alone(REPEATED[0]))
        assert batch.rows_in_use == batch.committed_bytes == 0
    assert drafter.closed == (when != "start")


def test_a_batch_that_closes_lets_all_rows_go_even_if_a_drafter_raises(model):
    drafters = [Unreliable("close"), Unreliable("close")]
    batch = ContinuousBatch(model, rows=2)
    asked = ask(text(5), 9, constraint=ENDLESS)
    rows = [batch.join(drafting(asked, drafters=[drafter])) for drafter in drafters]
    while any(row.reading for row in rows):
        batch.step()
    with pytest.raises(LookupError, match="close"):
        batch.close()
    assert [drafter.closed for drafter in drafters] == [1, 1]
    assert batch.rows_in_use == 0


def test_a_row_that_is_left_gives_all_back_though_its_drafters_raise_as_they_close(model):
    drafters = [Unreliable("close"), Unreliable("close")]
    drafters[1].name = "another"
    with ContinuousBatch(model, rows=2) as batch:
        row = batch.join(drafting(ask(text(5), 9, constraint=ENDLESS), drafters=drafters))
        while row.reading:
            batch.step()
        with pytest.raises(LookupError, match="close"):
            batch.leave(row)
        assert [drafter.closed for drafter in drafters] == [1, 1]
        assert batch.rows_in_use == batch.committed_bytes == 0


def test_a_run_that_fails_costs_a_speculating_row_nothing(model, alone, monkeypatch):
    asked = [guessed(alone, request, length=4) for request in REPEATED[:2]]
    with ContinuousBatch(model, rows=2) as batch:
        rows = [batch.join(request) for request in asked]
        Failing(batch, monkeypatch, 2)
        found = {row: [] for row in rows}
        while batch.rows_in_use:
            try:
                for advance in batch.step():
                    found[advance.row] += advance.steps
            except RuntimeExhaustedError:
                continue
        for row in rows:
            assert content(found[row]) == content(alone(row.request))
