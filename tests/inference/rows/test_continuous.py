"""Requests join, leave and pause between steps; every answer is the one that its request gets alone."""

from dataclasses import replace

import pytest

from seawall.inference import Decoder, JsonSchema, Sampling
from seawall.inference.errors import (
    DecoderClosedError,
    EmptyPromptError,
    InvalidSettingError,
    NoRoomError,
    PromptTooLongError,
)
from seawall.inference.generate.rows import ContinuousBatch
from tests.inference import tiny

from .conftest import CONTEXT, ENDLESS, REQUESTS, answers, ask, batch_page, content, drain, text


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


def test_a_request_keeps_the_prompt_that_it_was_made_of(model, alone):
    prompt = text(20)
    request = replace(ask([]), prompt=prompt)
    wanted = alone(replace(request, prompt=tuple(prompt)))
    with ContinuousBatch(model, rows=1) as batch:
        prompt[5] += 1
        assert content(answers(batch, [request])[0]) == content(wanted)


def test_what_is_wrong_with_a_request_is_said_before_it_takes_a_row(model):
    with ContinuousBatch(model, rows=1) as batch:
        for wrong, error in [
            (ask([]), EmptyPromptError),
            (ask(text(CONTEXT)), PromptTooLongError),
            (ask(text(3), logprobs=99), InvalidSettingError),
            (ask(text(3), sampling=0.8), InvalidSettingError),
            (ask(text(3), penalties=1.1), InvalidSettingError),
            (ask(text(3), constraint='{"type": "object"}'), InvalidSettingError),
            (ask(text(3), constraint=JsonSchema), InvalidSettingError),
            (ask(text(3), speculation=True), InvalidSettingError),
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


def test_a_row_of_another_batch_is_not_let_go_in_place_of_ones_own(model, alone):
    with ContinuousBatch(model, rows=1) as one, ContinuousBatch(model, rows=1) as other:
        mine, theirs = one.join(REQUESTS[0]), other.join(REQUESTS[1])
        with pytest.raises(InvalidSettingError, match="row must be of this batch"):
            other.leave(mine)
        assert (one.rows_in_use, other.rows_in_use) == (1, 1)
        for batch, row in ((one, mine), (other, theirs)):
            assert content(drain(batch, [row])[0]) == content(alone(row.request))


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
