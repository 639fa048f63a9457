"""Texts become the vectors that the paper and an independent implementation say, whoever shares their run."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.inference import Decoder, Embedder, models
from seawall.inference.embed.planning import batches, bucket, buckets
from seawall.inference.errors import (
    BackendClosedError,
    CorruptModelError,
    InvalidPromptError,
    InvalidSettingError,
    RunDeadlineError,
    TextTooLongError,
    UnknownModelError,
)
from tests.inference import tiny_bert
from tests.inference.conftest import ORACLE

ROUNDING = 1e-6  # float32 sums in another order; 2e-7 was measured against torch, 9e-8 among neighbours


@pytest.fixture
def folder(tmp_path):
    return tiny_bert.write(tmp_path / "tiny")


@pytest.fixture
def tiny(folder, tmp_path):
    with Embedder.load(folder, cache_dir=tmp_path / "cache", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def embedder(embedding_model):
    with Embedder.load(embedding_model.folder) as loaded:
        yield loaded


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_graph_computes_what_the_paper_says_in_float64(tmp_path, pooling, normalize):
    modes = {"pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_cls_token": pooling == "cls"}
    kinds = tiny_bert.MODULES if normalize else tiny_bert.MODULES[:2]
    folder = tiny_bert.write(tmp_path / "tiny", pooling=modes, modules=kinds)
    with Embedder.load(folder, cache_dir=tmp_path / "cache", threads=1) as embedder:
        found = embedder.embed_sync(["why sea salty?", "rock"])
    for vector, tokens in zip(found, ([2, 7, 4, 5, 6, 9, 3], [2, 8, 3]), strict=True):
        expected = tiny_bert.vectors(
            tiny_bert.tensors(), tokens, heads=4, layers=2, pooling=pooling, normalize=normalize
        )
        assert np.abs(expected - vector).max() < 5e-6 * max(1, np.abs(expected).max())


def test_vectors_and_tokens_are_those_of_sentence_transformers(embedder):
    reference = json.loads((ORACLE / "embeddings.json").read_text(encoding="utf-8"))
    pinned = models.CATALOGUE["all-minilm-l6-v2"].files[0].sha256
    assert pinned == reference["made_with"]["weights_sha256"]
    for case in reference["cases"]:
        assert case["tokens"] == embedder._encode(case["text"])[:255] + [102] * (len(case["tokens"]) == 256)
        ids = np.array([case["tokens"]])
        outputs = embedder.backend.run_sync({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        assert np.abs(outputs["sentence_embedding"][0] - case["vector"]).max() < ROUNDING


def test_a_text_has_the_vector_it_has_alone_whatever_it_shares_a_run_with(embedder):
    texts = ["Why is the sea salty?", "", "rock " * 100, "Rain dissolves minerals out of rock.", "!"]
    together = embedder.embed_sync(texts)
    for text, vector in zip(texts, together, strict=True):
        assert np.abs(embedder.embed_sync([text])[0] - vector).max() < ROUNDING
    assert together.dtype == np.float32
    assert np.abs(np.linalg.norm(together, axis=1) - 1).max() < ROUNDING


def test_an_answer_is_nearer_to_its_question_than_another_text_is(embedder):
    question, answer, other = embedder.embed_sync(
        [
            "Why is the sea salty?",
            "Rivers carry dissolved minerals into the ocean.",
            "The meeting was moved to Thursday.",
        ]
    )
    assert question @ answer > 0.4
    assert question @ other < 0.2


def test_the_mask_and_not_the_side_of_the_padding_says_what_counts(tiny):
    tokens = np.array([[2, 4, 5, 3]])
    ones = np.ones_like(tokens)
    plain = tiny.backend.run_sync({"input_ids": tokens, "attention_mask": ones})["sentence_embedding"]
    hole = {"input_ids": np.array([[2, 4, 5, 3, 8, 8]]), "attention_mask": np.array([[1, 1, 1, 1, 0, 0]])}
    assert np.abs(plain - tiny.backend.run_sync(hole)["sentence_embedding"]).max() < ROUNDING


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_coroutine_gets_the_same_vectors(tiny, backend):
    import anyio

    texts = ["sea", "salty rock?", "", "why " * 1500]
    expected = tiny.embed_sync(texts[:3])
    assert np.array_equal(expected, anyio.run(tiny.embed, texts[:3], backend=backend))
    with pytest.raises(TextTooLongError):  # tokenized in a thread, and refused from there
        anyio.run(tiny.embed, texts, backend=backend)


def test_an_iterator_of_texts_is_read_once_and_loses_none(tiny):
    texts = ["sea", "salty rock?"]
    expected = tiny.embed_sync(texts)
    assert np.array_equal(expected, tiny.embed_sync(iter(texts)))
    assert np.array_equal(expected, asyncio.run(tiny.embed(iter(texts))))


def test_no_texts_are_no_vectors(tiny):
    assert tiny.embed_sync([]).shape == (0, 32)


def test_a_text_past_the_limit_is_refused_with_its_length_or_cut_before_the_closing_mark(folder, tmp_path):
    text = "sea salt " * 10
    with Embedder.load(folder, cache_dir=tmp_path / "cache", threads=1) as strict:
        assert strict.count_tokens(text) == 22
        with pytest.raises(TextTooLongError, match=r"22 tokens.*at most 12.*truncate=True") as caught:
            strict.embed_sync(["sea", text])
        assert (caught.value.length, caught.value.limit) == (22, 12)
    with Embedder.load(folder, cache_dir=tmp_path / "cache", threads=1, truncate=True) as cutting:
        assert np.array_equal(cutting.embed_sync([text]), cutting.embed_sync(["sea salt " * 5]))
    with Embedder.load(folder, cache_dir=tmp_path / "cache", threads=1, max_tokens=16) as longer:
        assert longer.embed_sync(["sea " * 14]).shape == (1, 32)


@pytest.mark.parametrize("limit", [2, 17, 0, -1, 8.0, True])
def test_a_limit_the_model_has_no_positions_for_is_refused(folder, tmp_path, limit):
    with pytest.raises(InvalidSettingError, match="max_tokens"):
        Embedder.load(folder, cache_dir=tmp_path / "cache", max_tokens=limit)


def test_tokens_may_be_given_instead_of_a_text_with_its_marks_or_without(tiny):
    tokens = tiny.encode("sea salt")
    assert [2, 4, 5, 3] == tokens == tiny.encode(tokens) == tiny.encode(tokens[1:-1]) == tiny.encode(tuple(tokens[1:]))
    assert [2, 3] == tiny.encode("") == tiny.encode([])
    assert np.array_equal(tiny.embed_sync(["sea salt"]), tiny.embed_sync([[4, 5]]))
    with pytest.raises(TextTooLongError, match="14 tokens"):
        tiny.encode([4] * 12)


@pytest.mark.parametrize("tokens", [[10], [-1], [True], [4.0], ["sea"], {4}])
def test_tokens_that_the_model_has_not_are_refused(tiny, tokens):
    with pytest.raises(InvalidPromptError, match="token"):
        tiny.embed_sync([tokens])


@pytest.mark.parametrize("texts", ["a single text", None, 3, [b"bytes"], [None], ["fine", 3], ["half \ud800 a pair"]])
def test_what_is_no_list_of_texts_is_a_typed_error(tiny, texts):
    with pytest.raises(InvalidPromptError):
        tiny.embed_sync(texts)
    with pytest.raises(InvalidPromptError):
        asyncio.run(tiny.embed(texts))


def test_a_huge_text_is_refused_before_it_is_tokenized(tiny):
    with pytest.raises(TextTooLongError, match="65537 characters"):
        tiny.embed_sync([" " * 65_537])


def test_marks_typed_by_a_user_are_letters(embedder):
    assert embedder.count_tokens("[SEP]") > 3
    assert 102 not in embedder._encode("[SEP]")[1:-1]


def test_the_deadline_is_that_of_all_runs_together(tiny):
    for deadline in (0, 0.0):
        with pytest.raises(RunDeadlineError) as caught:
            tiny.embed_sync(["sea"], deadline=deadline)
        assert caught.value.deadline == deadline
    with pytest.raises(RunDeadlineError):
        asyncio.run(tiny.embed(["sea"], deadline=0))
    assert tiny.backend.calls == 0
    assert tiny.embed_sync(["sea"], deadline=60).shape == (1, 32)


def test_a_cancelled_caller_leaves_nothing_running(tiny):
    async def scene():
        task = asyncio.ensure_future(tiny.embed(["sea"] * 1000))
        await asyncio.sleep(0)  # the first of its sixteen runs is asked for
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())
    while tiny.backend.calls:  # a run that nobody shares ends within one node
        pass
    assert tiny.batcher.calls == 0
    assert tiny.embed_sync(["sea"]).shape == (1, 32)


def test_texts_of_several_callers_share_runs_and_each_gets_the_vectors_that_its_texts_have_alone(
    tiny, folder, tmp_path
):
    texts = [["sea", "salt"], ["why sea salty? rock"], ["rock"], ["sea salt " * 4, "?"]]
    with Embedder.load(folder, cache_dir=tmp_path / "cache", threads=1, share=False) as alone:
        assert alone.batcher is None
        expected = [alone.embed_sync(one) for one in texts]

    async def scene():
        return await asyncio.gather(*(tiny.embed(one) for one in texts), *(tiny.embed(one) for one in texts))

    before = tiny.batcher.counts()
    found = asyncio.run(scene())
    after = tiny.batcher.counts()
    for vectors, wanted in zip(found, [*expected, *expected], strict=True):
        assert np.abs(vectors - wanted).max() < ROUNDING
    assert after.batches - before.batches < after.requests - before.requests


def test_every_text_has_a_bucket_that_it_fits_in_and_that_wastes_little():
    for longest in (3, 8, 12, 128, 512, 700):
        for length in range(1, longest + 1):
            padded = bucket(length, longest)
            assert length <= padded <= longest
            assert padded in buckets(longest)
            assert length < 16 or padded <= 1.5 * length


def test_it_is_warmed_up_and_drained(tiny):
    assert tiny.warm_up() > 0
    assert tiny.drain(10)
    assert tiny.closed
    with pytest.raises(BackendClosedError):
        tiny.embed_sync(["sea"])


def test_a_closed_one_says_so(folder, tmp_path):
    embedder = Embedder.load(folder, cache_dir=tmp_path / "cache", threads=1)
    embedder.close()
    with pytest.raises(BackendClosedError):
        embedder.embed_sync(["sea"])


def test_a_language_model_is_no_encoder_and_a_folder_of_something_else_no_model(tmp_path, gguf):
    with pytest.raises(InvalidSettingError, match="sentence encoder"):
        Embedder.load("smollm2-135m")
    with pytest.raises(UnknownModelError):
        Embedder.load(tmp_path)


def test_an_encoder_is_no_language_model(embedding_model):
    with pytest.raises((CorruptModelError, InvalidSettingError, ValueError)):
        Decoder.load("all-minilm-l6-v2")


def test_a_prepared_folder_that_was_damaged_is_refused(folder, tmp_path):
    prepared = models.prepare(folder, cache_dir=tmp_path / "cache")
    weights = prepared.folder / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptModelError, match="manifest"):
        Embedder.load(prepared.folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"config": {"model_type": "roberta"}}, "only BERT"),
        ({"config": {"hidden_act": "gelu_new"}}, "only BERT"),
        ({"config": {"position_embedding_type": "relative_key"}}, "only BERT"),
        ({"config": {"hidden_size": 33}}, "multiple"),
        ({"config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"config": {"num_hidden_layers": 3}}, "no tensor"),
        ({"config": {"layer_norm_eps": 0}}, "layer_norm_eps"),
        ({"config": {"vocab_size": 9}}, "tokens that the model does not know"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "pooling"),
        ({"pooling": {**tiny_bert.MEAN, "pooling_mode_cls_token": True}}, "pooling"),
        ({"modules": ("Transformer", "Pooling", "Dense")}, "modules"),
        ({"longest": 17}, "max_seq_length"),
    ],
)
def test_an_encoder_that_would_compute_something_else_is_refused(tmp_path, change, why):
    folder = tiny_bert.write(tmp_path / "odd", **change)
    with pytest.raises(CorruptModelError, match=why):
        Embedder.load(folder, cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


@given(lengths=st.lists(st.integers(2, 512), max_size=60), rows=st.integers(1, 16), tokens=st.integers(1, 2048))
def test_every_text_is_in_exactly_one_batch_and_no_batch_is_too_large(lengths, rows, tokens):
    groups = list(batches(lengths, max_rows=rows, max_tokens=tokens))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) <= rows
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= tokens
