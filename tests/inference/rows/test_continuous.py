"""Requests join, leave, pause and fail between steps; every answer is the one that its request gets alone."""

import gc
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from seawall.inference import Decoder, Penalties, Sampling, Speculation
from seawall.inference.errors import (
    DecoderClosedError,
    EmptyPromptError,
    GenerationCancelledError,
    InvalidSettingError,
    NoRoomError,
    NotFiniteOutputError,
    PromptTooLongError,
    RuntimeExhaustedError,
)
from seawall.inference.generate.rows import ContinuousBatch
from seawall.inference.runtime import ort
from tests.inference import tiny

from .conftest import CONTEXT, ENDLESS, ask, guessed

VOCABULARY = len(tiny.TOKENS)


def text(length, seed=0):
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()


def answers(batch, requests):
    """Join all, step until nobody is left; the steps of each that handed out a token, or its error."""
    rows = [batch.join(request) for request in requests]
    return drain(batch, rows)


def drain(batch, rows):
    found = {id(row): [] for row in rows}
    while batch.rows_in_use:
        for advance in batch.step():
            if id(advance.row) in found:
                found[id(advance.row)] += [advance.error] if advance.error else advance.steps
    return [[step for step in found[id(row)] if isinstance(step, Exception) or step.token is not None] for row in rows]


def content(steps):
    """What a user sees, to the last bit of the logprobs; not how many steps read the prompt."""
    return [step._replace(read=0) for step in steps if step.token is not None]


REQUESTS = [
    ask(text(5), logprobs=2),
    ask(text(130, 1), 20, sampling=Sampling(seed=1), logprobs=2),
    ask(text(1, 2), logprobs=2),
    ask(text(257, 3), 12, sampling=Sampling(seed=2, top_k=5), logprobs=2),
    ask(text(20, 4), 20, penalties=Penalties(presence=0.5, repetition=1.3), logprobs=2),
    ask(text(258, 5), 9, logprobs=2),
    ask(text(40, 6), 25, stop=("ab", "h"), sampling=Sampling(seed=5), logprobs=2),
    ask(text(30, 7) * 2, 20, speculation=Speculation(length=4), logprobs=2),
    ask(text(30, 8) * 2, 20, speculation=Speculation(), sampling=Sampling(seed=6), logprobs=2),
    ask(text(1, 9), 20, speculation=Speculation(length=2), sampling=Sampling(seed=7), logprobs=2),
]


@pytest.mark.parametrize("chunk", [None, 4, 7, 64, 256])
def test_rows_answer_what_they_answer_alone_to_the_last_bit(model, alone, chunk):
    with ContinuousBatch(model, rows=len(REQUESTS), prefill_chunk=chunk) as batch:
        for request, steps in zip(REQUESTS, answers(batch, REQUESTS), strict=True):
            assert content(steps) == content(alone(request))


def test_a_row_that_finishes_makes_room_for_another_at_once(model, alone):
    todo = [*REQUESTS, *REQUESTS]
    with ContinuousBatch(model, rows=2) as batch:
        rows = []
        while todo or batch.rows_in_use:
            while todo and batch.fits(todo[0]):
                rows.append(batch.join(todo.pop(0)))
            batch.step()
        for row in rows:
            assert row.finished
            assert row.tokens == [step.token for step in alone(row.request) if step.token is not None]


def test_a_step_reads_a_bounded_part_of_a_prompt_while_others_get_a_token_each(model):
    with ContinuousBatch(model, rows=3, prefill_chunk=16) as batch:
        one, two = (batch.join(ask(text(4, seed), 40, sampling=Sampling(seed=seed))) for seed in (3, 6))
        while one.reading or two.reading:
            batch.step()
        late = batch.join(ask(text(100)))
        while late.reading and not (one.finished or two.finished):
            done = {advance.row: advance.steps for advance in batch.step()}
            assert len(done[one]) == len(done[two]) == 1
            assert sum(step.read for step in done.get(late, [])) <= 16


def test_two_prompts_are_read_in_turns(model):
    with ContinuousBatch(model, rows=2, prefill_chunk=16) as batch:
        long, short = batch.join(ask(text(300))), batch.join(ask(text(20, 1)))
        while short.reading:
            batch.step()
        assert long.reading


def test_samples_of_a_prompt_share_what_one_of_them_reads(model, alone):
    page = batch_page(model)
    asked = [ask(text(page + 9), sampling=Sampling(seed=seed), logprobs=2, constraint=ENDLESS) for seed in range(4)]
    with ContinuousBatch(model, rows=4, prefill_chunk=64) as batch:
        rows = [batch.join(request) for request in asked]
        found = {row: [] for row in rows}
        while any(row.reading for row in rows):
            for row, steps, _ in batch.step():
                found[row] += steps
        assert sum(step.read for steps in found.values() for step in steps) == page + 9
        assert [row.cached_tokens for row in rows] == [0, *[page + 9] * 3]
        shared = page * model.cache_bytes_per_token
        assert batch.committed_bytes == shared * (1 + sum(not row.finished for row in rows))
        while batch.rows_in_use:
            for row, steps, _ in batch.step():
                found[row] += steps
        for row in rows:
            assert content(found[row]) == content(alone(row.request))


def batch_page(model):
    with ContinuousBatch(model, rows=1) as batch:
        return batch._pool.page


def test_a_prompt_that_begins_like_one_that_is_being_read_waits_for_it(model, alone):
    page = batch_page(model)
    common = text(page)
    asked = [ask([*common, *text(30, seed)], sampling=Sampling(seed=seed), logprobs=2) for seed in range(3)]
    with ContinuousBatch(model, rows=3, prefill_chunk=32) as batch:
        found = answers(batch, asked)
        assert batch.prefix.hits == 2
        assert batch.prefix.hit_tokens == 2 * page
        for request, steps in zip(asked, found, strict=True):
            assert content(steps) == content(alone(request))


def test_a_follower_reads_on_by_itself_when_the_row_it_waited_for_leaves(model, alone):
    request = ask(text(300), logprobs=2)
    with ContinuousBatch(model, rows=2, prefill_chunk=32) as batch:
        first, second = batch.join(request), batch.join(request)
        batch.step()
        assert second.length == 0
        batch.leave(first)
        assert content(drain(batch, [second])[0]) == content(alone(request))


@pytest.mark.parametrize("later", ["same", "longer", "shorter", "other end"])
def test_a_known_beginning_is_not_computed_again_and_changes_no_bit(model, alone, later):
    page = batch_page(model)
    first = text(page + 20)
    prompt = {
        "same": first,
        "longer": [*first, *text(9, 1)],
        "shorter": first[: page + 1 if model.kv == "int8" else page + 2],
        "other end": [*first[: page + 3], *text(30, 2)],
    }[later]
    with ContinuousBatch(model, rows=2) as batch:
        answers(batch, [ask(first)])
        row = batch.join(ask(prompt, logprobs=3))
        assert row.cached_tokens == page
        assert content(drain(batch, [row])[0]) == content(alone(row.request))


def test_a_prompt_is_found_again_only_under_its_own_salt(model):
    prompt = text(batch_page(model) + 20)
    with ContinuousBatch(model, rows=2) as batch:
        answers(batch, [ask(prompt, salt=b"one")])
        assert batch.join(ask(prompt, salt=b"two")).cached_tokens == 0
        assert batch.join(ask(prompt, salt=b"one")).cached_tokens > 0


def test_rows_of_different_salts_do_not_wait_for_each_other(model):
    prompt = text(300)
    with ContinuousBatch(model, rows=2) as batch:
        rows = [batch.join(ask(prompt, salt=salt)) for salt in (b"one", b"two")]
        batch.step()
        batch.step()
        assert all(row.length for row in rows)


def test_a_conversation_goes_on_from_what_its_last_answer_left_where_runs_are_bitwise(model):
    page = batch_page(model)
    prompt = text(page - 4)
    with ContinuousBatch(model, rows=1) as batch:
        row = batch.join(ask(prompt, 40, sampling=Sampling(seed=3)))
        drain(batch, [row])
        again = batch.join(ask([*prompt, *row.tokens, *text(9)]))
        reached = len(prompt) + len(row.tokens) > page
        assert again.cached_tokens == (page if model.kv == "int8" and reached else 0)


def test_a_request_joins_only_where_its_whole_answer_would_fit(model):
    page = batch_page(model)
    token = model.cache_bytes_per_token
    with ContinuousBatch(model, rows=3, cache_bytes=2 * page * token, prefix_cache_bytes=0) as batch:
        batch.join(ask(text(5), page - 5))
        large = ask(text(5), page - 4)
        assert batch.could_fit(large)
        assert not batch.fits(large)
        with pytest.raises(NoRoomError, match="are left") as refused:
            batch.join(large)
        assert (refused.value.needed, refused.value.free) == (2 * page * token, page * token)
        assert refused.value.retryable
        batch.join(ask(text(5), page - 5))
        assert not batch.fits(ask(text(1), 1))
        assert not batch.could_fit(ask(text(5), 2 * page))
        assert batch.promised_bytes == batch.cache_bytes


def test_kept_prompts_make_room_for_requests(model):
    page = batch_page(model)
    with ContinuousBatch(model, rows=2, cache_bytes=3 * page * model.cache_bytes_per_token) as batch:
        answers(batch, [ask(text(page + 1, 1), 1)])
        assert batch.cached_bytes == page * model.cache_bytes_per_token
        batch.join(ask(text(page + 1, 2), 2 * page - 1))
        assert batch.cached_bytes == 0
        assert batch.prefix.evicted == 1


def test_no_row_is_left_for_one_more(model):
    with ContinuousBatch(model, rows=1) as batch:
        batch.join(ask(text(3)))
        assert not batch.fits(ask(text(3)))
        with pytest.raises(NoRoomError, match="all 1 rows are in use"):
            batch.join(ask(text(3)))


def test_rows_that_decode_close_up_for_a_run_computes_the_places_in_between(model, alone):
    asked = [replace(request, constraint=ENDLESS, max_tokens=30) for request in REQUESTS[:3]]
    with ContinuousBatch(model, rows=6) as batch:
        rows = [batch.join(request) for request in asked]
        while any(row.reading for row in rows):
            batch.step()
        for _ in range(3):
            batch.step()
        assert {row.index for row in rows} == {0, 1, 2}
        first = next(row for row in rows if row.index == 0)
        batch.leave(first)
        batch.step()
        left = [row for row in rows if row is not first]
        assert {row.index for row in left} == {0, 1}
        drain(batch, left)
        for row in left:
            assert row.tokens == [step.token for step in alone(row.request) if step.token is not None]


def test_a_paused_row_keeps_its_place_and_goes_on_later(model, alone):
    request = REQUESTS[1]
    with ContinuousBatch(model, rows=2) as batch:
        row = batch.join(request)
        other = batch.join(REQUESTS[3])
        found = []
        for number in range(200):
            row.paused = number % 3 > 0
            found += [step for advance in batch.step() if advance.row is row for step in advance.steps]
        assert content(found) == content(alone(request))
        assert other.finished
        paused = batch.join(REQUESTS[0])
        paused.paused = True
        assert batch.step() == []


def poisoned(model, batch, monkeypatch, row):
    """The logits of one row become NaN."""
    run = batch._stepping._batch._run

    def bad(parts, options, *, every):
        found = run(parts, options, every=every)
        for part, logits in zip(parts, found, strict=True):
            if part.row == row.index:
                logits[..., 3] = math.nan
        return found

    monkeypatch.setattr(batch._stepping._batch, "_run", bad)


def test_a_row_whose_logits_are_not_numbers_ends_alone_and_nobody_begins_with_what_it_read(model, alone, monkeypatch):
    prompt = text(batch_page(model) + 20)
    with ContinuousBatch(model, rows=2) as batch:
        row, other = batch.join(ask(prompt)), batch.join(REQUESTS[4])
        poisoned(model, batch, monkeypatch, row)
        found = drain(batch, [row, other])
        assert isinstance(found[0][-1], NotFiniteOutputError)
        assert row.error is found[0][-1]
        assert content(found[1]) == content(alone(REQUESTS[4]))
        monkeypatch.undo()
        assert batch.join(ask(prompt)).cached_tokens == 0


class Breaks:
    """A user's constraint that fails at the third token."""

    def __init__(self):
        self.told = 0

    def matcher(self, vocabulary):
        return self

    def allowed(self):
        if self.told == 2:
            raise ZeroDivisionError("a bug in somebody's grammar")
        return np.arange(VOCABULARY) > 2  # no end token

    def consume(self, token):
        self.told += 1
        return True

    def rollback(self, tokens):
        self.told -= tokens

    def forced(self):
        return ()


def test_a_constraint_that_raises_ends_its_row_with_that_very_exception(model, alone):
    with ContinuousBatch(model, rows=2) as batch:
        asked = [ask(text(4, 3), 20, sampling=Sampling(seed=1), constraint=Breaks()), REQUESTS[4]]
        found = answers(batch, asked)
        assert isinstance(found[0][-1], ZeroDivisionError)
        assert len(found[0]) == 3
        assert content(found[1]) == content(alone(REQUESTS[4]))


class Failing:
    """Lets every so many runs of a batch fail, before or after ONNX Runtime has written into the caches."""

    def __init__(self, batch, monkeypatch, every):
        self.calls = 0
        run = batch._stepping._batch._run

        def sometimes(parts, options, **how):
            self.calls += 1
            found = run(parts, options, **how)
            if self.calls % every == 0:
                raise RuntimeExhaustedError("running the model", "out of memory")
            return found

        monkeypatch.setattr(batch._stepping._batch, "_run", sometimes)


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_that_fails_is_raised_and_the_next_step_does_it_again(model, alone, monkeypatch, every):
    with ContinuousBatch(model, rows=len(REQUESTS), prefill_chunk=64) as batch:
        rows = [batch.join(request) for request in REQUESTS]
        Failing(batch, monkeypatch, every)
        found = {row.number: [] for row in rows}
        failures = 0
        while batch.rows_in_use:
            try:
                done = batch.step()
            except RuntimeExhaustedError:
                failures += 1
                assert batch.last_run
                continue
            for advance in done:
                found[advance.row.number] += advance.steps
        for row in rows:
            assert content(found[row.number]) == content(alone(row.request))
        assert failures > 10


def test_a_row_that_is_shed_after_a_failure_takes_its_undelivered_steps_with_it(model, monkeypatch):
    with ContinuousBatch(model, rows=2, prefill_chunk=16) as batch:
        row = batch.join(ask(text(4, 3), 30, sampling=Sampling(seed=3)))
        batch.step()
        late = batch.join(ask(text(100)))
        Failing(batch, monkeypatch, 2)  # decoding succeeds, reading fails
        with pytest.raises(RuntimeExhaustedError):
            batch.step()
        assert batch.last_run == (late,)
        batch.leave(row)
        assert all(advance.row is not row for advance in batch.step())


def test_a_step_that_is_told_to_stop_changes_nothing(model, alone):
    with ContinuousBatch(model, rows=2) as batch:
        rows = [batch.join(request) for request in REQUESTS[:2]]
        found = {row.number: [] for row in rows}
        number = 0
        while batch.rows_in_use:
            options = ort.run_options()
            options.terminate = number % 2 == 0
            number += 1
            try:
                done = batch.step(options)
            except GenerationCancelledError:
                assert options.terminate
                continue
            assert not options.terminate
            for advance in done:
                found[advance.row.number] += advance.steps
        for row in rows:
            assert content(found[row.number]) == content(alone(row.request))


def test_what_is_wrong_with_a_request_is_said_before_it_takes_a_row(model):
    with ContinuousBatch(model, rows=1) as batch:
        for wrong, error in [
            (ask([]), EmptyPromptError),
            (ask(text(CONTEXT)), PromptTooLongError),
            (ask(text(3), logprobs=99), InvalidSettingError),
        ]:
            with pytest.raises(error):
                batch.join(wrong)
        assert batch.rows_in_use == 0
        assert batch.promised_bytes == 0
    for settings_ in ({"max_tokens": 0}, {"max_tokens": True}, {"stop": "ab"}, {"stop": ("",)}, {"salt": "text"}):
        with pytest.raises(InvalidSettingError, match=next(iter(settings_))):
            replace(ask(text(3)), **settings_)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 0},
        {"rows": True},
        {"cache_bytes": 5},
        {"prefix_cache_bytes": -1},
        {"prefill_chunk": 3},
        {"prefill_chunk": 300},
    ],
)
def test_settings_out_of_range_are_refused(model, wrong):
    with pytest.raises(InvalidSettingError, match=f"{next(iter(wrong))} must be"):
        ContinuousBatch(model, **wrong)


def test_a_closed_batch_holds_nothing_and_takes_nothing(model):
    batch = ContinuousBatch(model, rows=2)
    row = batch.join(ask(text(100)))
    batch.step()
    batch.close()
    batch.close()
    assert row.finished
    assert batch.rows_in_use == 0
    for call in (batch.step, lambda: batch.join(ask(text(3))), lambda: batch.fits(ask(text(3)))):
        with pytest.raises(DecoderClosedError):
            call()
    batch.leave(row)


def test_a_batch_ends_with_its_decoder(tmp_path):
    decoder = Decoder.load(tiny.write(tmp_path / "tiny.gguf"), cache_dir=tmp_path, context=64, threads=1)
    with ContinuousBatch(decoder, rows=2) as batch:
        batch.join(ask(text(5)))
        decoder.close()
        with pytest.raises(DecoderClosedError):
            batch.step()


class Traffic(RuleBasedStateMachine):
    """Whatever requests come, go, pause, fail and begin alike: each answers as alone, and no byte too many is held."""

    model = alone = None  # set below, once for each kind of cache

    @initialize(rows=st.integers(1, 4), chunk=st.sampled_from([None, 4, 20, 100]), pages=st.integers(2, 12))
    def begin(self, rows, chunk, pages):
        token = self.model.cache_bytes_per_token
        page = 4096 // (token // (2 * 2 * 2))
        self.batch = ContinuousBatch(
            self.model,
            rows=rows,
            prefill_chunk=chunk,
            cache_bytes=pages * page * token,
            prefix_cache_bytes=3 * page * token,
        )
        self.found = {}

    @rule(
        drafts=st.sampled_from([False, False, Speculation(), {"length": 3}, {"length": 9, "wrong": 3}, {}]),
        seed=st.integers(0, 2),
        common=st.integers(0, 300),
        more=st.integers(1, 60),
        tokens=st.integers(1, 25),
        drawn=st.booleans(),
        salt=st.sampled_from([b"", b"one"]),
    )
    def join(self, drafts, seed, common, more, tokens, drawn, salt):
        prompt = [*text(300, 7)[:common], *text(more, seed)]
        sampling = {"sampling": Sampling(seed=seed)} if drawn else {}
        request = ask(prompt, tokens, salt=salt, logprobs=1, **sampling)
        if isinstance(drafts, dict):
            request = guessed(type(self).alone, request, **drafts)
        else:
            request = replace(request, speculation=drafts)
        if self.batch.fits(request):
            self.found[self.batch.join(request)] = []
        else:
            with pytest.raises(NoRoomError):
                self.batch.join(request)

    @rule(options=st.sampled_from(["go", "go", "go", "stop"]))
    def step(self, options):
        given = ort.run_options()
        given.terminate = options == "stop"
        try:
            done = self.batch.step(given)
        except GenerationCancelledError:
            return
        self.take(done)

    def take(self, done):
        for row, steps, error in done:
            assert error is None
            self.found[row] += steps
            if row.finished:
                assert content(self.found.pop(row)) == content(type(self).alone(replace(row.request, salt=b"")))

    @rule(which=st.integers(0, 3))  # nothing drawn may depend on who is left: drafts and parts follow the clock
    def leave(self, which):
        for row in list(self.found)[which : which + 1]:
            self.batch.leave(row)
            del self.found[row]

    @rule(which=st.integers(0, 3))
    def pause(self, which):
        for row in list(self.found)[which : which + 1]:
            row.paused = not row.paused

    @invariant()
    def books_balance(self):
        if not hasattr(self, "batch"):
            return
        batch = self.batch
        assert batch.rows_in_use == len(self.found)
        assert batch.used_bytes <= batch.committed_bytes <= batch.promised_bytes <= batch.cache_bytes
        assert batch.cached_bytes == batch.prefix.bytes <= batch.cache_bytes

    def teardown(self):
        if not hasattr(self, "batch"):
            return
        for row in self.found:
            row.paused = False
        while self.batch.rows_in_use:
            self.take(self.batch.step())
        assert self.batch.used_bytes == self.batch.committed_bytes == 0
        assert self.batch.promised_bytes == self.batch.cached_bytes
        self.batch.close()


def test_any_traffic(model, alone):
    Traffic.model, Traffic.alone = model, staticmethod(alone)
    try:
        run_state_machine_as_test(
            Traffic,
            settings=settings(
                max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
    finally:
        Traffic.model = Traffic.alone = None
    gc.collect()
