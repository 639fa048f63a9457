"""Several sequences in one run: each gets what it would get alone, whatever the others do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall.inference import Decoder
from seawall.inference.errors import (
    DecoderClosedError,
    GenerationCancelledError,
    InvalidSettingError,
    RuntimeMisuseError,
)
from seawall.inference.generate.batch import Part
from seawall.inference.generate.slot import CHUNK
from seawall.inference.runtime import ort
from tests.inference import tiny

VOCABULARY = len(tiny.TOKENS)
STEPS = [[Part(0, [1, 5], 0), Part(1, [4, 4, 6], 0)], [Part(0, [2], 2), Part(1, [3], 3)], [Part(1, [9, 9], 4)]]
options = ort.run_options


@pytest.fixture(scope="module", params=["fp32", "int8"])
def model(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("batch")
    path = tiny.write(base / "tiny.gguf")
    with Decoder.load(path, cache_dir=base, context=64, threads=1, kv=request.param) as loaded:
        yield loaded


def alone(decoder, steps):
    """Logits of each step of one sequence, run in a slot of its own."""
    slot = decoder._lend()
    try:
        return [slot.run_all(list(tokens), length, options()) for tokens, length in steps]
    finally:
        decoder._take_back(slot)


def same(decoder, found, expected):
    """Bit for bit where the decoder's class promises it, to rounding otherwise."""
    if decoder.kv == "int8" or len(expected) > 1:
        assert np.array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_rows_with_their_own_pasts_and_numbers_of_tokens_get_what_they_get_alone(model):
    batch = model.batch(3)
    steps = {
        0: [([1, 5, 12, 7], 0), ([3, 9, 8], 4), ([4], 7)],
        1: [([2, 2], 0), ([6, 1], 2), ([7, 7, 7, 3], 4)],
        2: [([9, 3, 4, 8, 5, 10, 11], 0), ([2, 6], 7), ([5, 1], 9)],
    }
    expected = {row: alone(model, parts) for row, parts in steps.items()}
    for number in range(3):
        parts = [Part(row, *steps[row][number]) for row in (2, 0, 1)]
        for part, logits in zip(parts, batch.run_all(parts, options()), strict=True):
            same(model, logits, expected[part.row][number])


sequences = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5), min_size=1, max_size=6)


@given(st.lists(sequences, min_size=2, max_size=4), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=25)
def test_whatever_rows_join_and_leave_none_changes_another(model, rows, random):
    """Each row has its own list of steps; in each run some of the rows, in any order, do their next one."""
    if model.kv != "int8":  # there a single token has bits of its own in a run with longer parts
        rows = [[step * 2 if len(step) == 1 else step for step in steps] for steps in rows]
    batch = model.batch(len(rows))
    todo = {row: list(steps) for row, steps in enumerate(rows)}
    lengths = dict.fromkeys(todo, 0)
    found = {row: [] for row in todo}
    while todo:
        parts = [
            Part(row, todo[row].pop(0), lengths[row])
            for row in random.sample(sorted(todo), random.randint(1, len(todo)))
        ]
        for part, logits in zip(parts, batch.run_all(parts, options()), strict=True):
            found[part.row].append(logits)
            lengths[part.row] += len(part.tokens)
        todo = {row: steps for row, steps in todo.items() if steps}
    for row, steps in enumerate(rows):
        places = np.cumsum([0, *map(len, steps)])[:-1].tolist()
        for logits, expected in zip(found[row], alone(model, zip(steps, places, strict=True)), strict=True):
            assert np.array_equal(logits, expected)


def test_an_idle_row_keeps_its_cache(model):
    batch = model.batch(3)
    batch.run([Part(1, [5, 6, 7], 0)], options())
    before = batch.memory[:, :, 1, :, :3].copy()
    batch.run([Part(0, [1, 2], 0), Part(2, [3, 4, 5], 0)], options())
    assert np.array_equal(batch.memory[:, :, 1, :, :3], before)


def test_a_short_part_beside_a_long_one_writes_no_further_than_its_own_tokens(model):
    batch = model.batch(3)
    batch.memory[:, :, :, :, 1:] = 7
    batch.run([Part(0, [3] * 10, 1), Part(1, [3], 1), Part(2, [3], 1, padding=1)], options())
    for row, stop in enumerate((11, 2, 3)):
        assert (batch.memory[:, :, row, :, stop:] == 7).all()
        assert (batch.memory[:, :, row, :, 1:stop] != 7).any(axis=(0, 1, 2, 4)).all()


def test_a_token_with_padding_runs_as_two_do(model):
    batch = model.batch(2)
    padded = batch.run_all([Part(0, [5], 0, padding=1)], options())[0]
    assert padded.shape == (1, VOCABULARY)
    assert np.array_equal(padded[0], batch.run_all([Part(1, [5, 9], 0)], options())[0][0])


def test_a_row_goes_back_by_naming_a_smaller_length(model):
    batch = model.batch(2)
    batch.run([Part(0, [1, 5, 12], 0), Part(1, [4, 4], 0)], options())
    first = batch.run_all([Part(0, [7, 3], 3), Part(1, [9, 9], 2)], options())
    batch.run([Part(0, [8, 8, 8, 8], 3), Part(1, [2, 2], 2)], options())  # rejected
    again = batch.run_all([Part(0, [7, 3], 3), Part(1, [9, 9], 2)], options())
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))


def test_the_last_logits_are_those_of_the_last_token(model):
    batch = model.batch(2)
    parts = [Part(0, [1, 5, 12], 0), Part(1, [4, 4], 0)]
    every, last = batch.run_all(parts, options()), batch.run(parts, options())
    assert [logits.shape for logits in every] == [(3, VOCABULARY), (2, VOCABULARY)]
    for one, all_of_it in zip(last, every, strict=True):
        np.testing.assert_allclose(one, all_of_it[-1], atol=1e-5)


def test_a_row_that_is_nearly_full_runs_alone_where_the_longest_part_would_not_fit(model):
    """The kernel wants room for the longest part in every row."""
    batch = model.batch(2)
    prompt = [number % VOCABULARY for number in range(62)]
    batch.run([Part(0, prompt, 0)], options())
    found = batch.run_all([Part(0, [3, 4], 62), Part(1, [5, 6, 7, 8, 9], 0)], options())
    expected = alone(model, [(prompt, 0), ([3, 4], 62)])[1], alone(model, [([5, 6, 7, 8, 9], 0)])[0]
    assert all(np.array_equal(one, two) for one, two in zip(found, expected, strict=True))


def test_an_onnxruntime_without_query_seqlens_gives_the_same_answers(tmp_path, monkeypatch):
    """As 1.31 refuses the input, the graph is loaded without it, and only single tokens of all rows run together."""
    real = ort.build_session

    def older(model, **settings):
        if isinstance(model, bytes) and b"query_seqlens" in model:
            raise RuntimeMisuseError("loading", "InvalidGraph: more inputs (17) than declared (16)")
        return real(model, **settings)

    path = tiny.write(tmp_path / "tiny.gguf")
    settings = {"cache_dir": tmp_path, "context": 64, "threads": 1, "kv": "int8"}
    with Decoder.load(path, **settings) as decoder:
        batch = decoder.batch(2)
        expected = [batch.run_all(step, options()) for step in STEPS]
    monkeypatch.setattr(ort, "build_session", older)
    with Decoder.load(path, **settings) as decoder:
        batch = decoder.batch(2)
        assert not batch._ragged
        call, calls = batch._call, []
        monkeypatch.setattr(batch, "_call", lambda *rows, **more: calls.append(rows[:2]) or call(*rows, **more))
        found = [batch.run_all(step, options()) for step in STEPS]
        assert decoder.exactness().rows
    assert calls[:4] == [(0, 1), (1, 2), (0, 2), (1, 2)]
    for ones, others in zip(found, expected, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(ones, others, strict=True))


def test_a_cancelled_run_leaves_the_batch_usable(model):
    batch = model.batch(2)
    parts = [Part(0, [1, 5, 12], 0), Part(1, [4, 4], 0)]
    expected = batch.run_all(parts, options())
    stopped = options()
    stopped.terminate = True
    with pytest.raises(GenerationCancelledError):
        batch.run(parts, stopped)
    assert all(np.array_equal(one, two) for one, two in zip(batch.run_all(parts, options()), expected, strict=True))


def test_memory_of_ones_own_is_used_in_place(model):
    first = model.batch(2)
    memory = np.zeros((*first.memory.shape[:4], 20, first.memory.shape[5]), first.memory.dtype)
    batch = model.batch(2, memory)
    assert (batch.rows, batch.positions) == (2, 20)
    batch.run([Part(1, [5, 6], 0)], options())
    assert memory[:, :, 1, :, :2].any()
    assert not memory[:, :, 0].any()


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ([], "different rows"),
        ([Part(0, [1], 0), Part(0, [2], 0)], "different rows"),
        ([Part(2, [1], 0)], "row must be from 0 to 1"),
        ([Part(-1, [1], 0)], "row must be from 0 to 1"),
        ([Part(0, [], 0)], "1 to 256 tokens"),
        ([Part(0, [1] * (CHUNK + 1), 0)], "1 to 256 tokens"),
        ([Part(1, [1, 2], 63)], "room for 64 tokens"),
        ([Part(1, [1], -1)], "room for 64 tokens"),
        ([Part(1, [1], 63, padding=1)], "room for 64 tokens"),
        ([Part(1, [1], 5, padding=-1)], "room for 64 tokens"),
    ],
)
def test_what_no_run_can_do_is_refused_before_it(model, parts, rule):
    with pytest.raises(InvalidSettingError, match=rule):
        model.batch(2).run(parts, options())


def test_unusable_memory_is_refused(model):
    good = model.batch(2).memory
    for memory in (good[0], good.astype(np.float64), good[:, :, :1], np.asfortranarray(good), good[..., :4]):
        with pytest.raises(InvalidSettingError, match="memory must be contiguous"):
            model.batch(2, memory)
    for rows in (0, -1, True, 2000, "2"):
        with pytest.raises(InvalidSettingError, match="rows must be"):
            model.batch(rows)


def test_a_closed_decoder_gives_no_batch(tmp_path):
    decoder = Decoder.load(tiny.write(tmp_path / "tiny.gguf"), cache_dir=tmp_path, context=16, threads=1)
    decoder.close()
    with pytest.raises(DecoderClosedError):
        decoder.batch(2)


@pytest.mark.model
def test_rows_of_the_real_model_are_bit_equal_to_single_ones(gguf, reference):
    """Four sequences decode greedily, one token and then three a run; each as it does alone."""
    prompts = [case["tokens"][:40] for case in reference["cases"][:4]]
    with Decoder.load("smollm2-135m", precision="int4", kv="int8", context=128) as decoder:
        batch = decoder.batch(4)
        expected = [
            alone(
                decoder, [(prompt[:-6], 0), *(([token], len(prompt) - 6 + n) for n, token in enumerate(prompt[-6:-3]))]
            )
            for prompt in prompts
        ]
        batch.run([Part(row, prompt[:-6], 0) for row, prompt in enumerate(prompts)], options())
        for step in range(3):
            parts = [Part(row, [prompt[step - 6]], len(prompt) - 6 + step) for row, prompt in enumerate(prompts)]
            for row, logits in enumerate(batch.run(parts, options())):
                assert np.array_equal(logits, expected[row][step + 1][0])
