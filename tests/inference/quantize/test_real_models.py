"""The bundled language model and a sentence encoder, quantized, answer as the recipe promises."""

import numpy as np
import pytest

from seawall.inference import Backend, Decoder, models
from seawall.inference.models import PreparedModel
from seawall.inference.models.tokenizer import load_tokenizer
from seawall.inference.quality.text import compare_texts, evaluation_text
from seawall.inference.quantize import quantize_model

pytestmark = pytest.mark.model
TEXT = evaluation_text()[:800]


@pytest.mark.parametrize(
    ("recipe", "kl", "megabytes"),
    [("int8-block32", 0.008, 155), ("fp8-e4m3", 0.08, 139)],
)
def test_the_language_model_stays_near_itself_at_the_size_it_should_have(recipe, kl, megabytes, gguf, fp32, tmp_path):
    source = models.prepare("smollm2-135m", precision="fp32")
    done = quantize_model(source.folder, tmp_path / recipe, recipe=recipe)
    assert not done.left
    assert done.bytes < megabytes * 1e6
    with Decoder(PreparedModel(done.folder, done.facts), context=1500) as decoder:
        scores = compare_texts(fp32, decoder, TEXT)
    assert scores.kl < kl


def embeddings(path, feeds):
    with Backend.load(path) as backend:
        kinds = dict(backend.report().kinds)
        return np.concatenate([backend.run_sync(feed)["sentence_embedding"] for feed in feeds]), kinds


@pytest.fixture(scope="module")
def sentences(embedding_model):
    """Batches of tokens of 64 sentences."""
    tokenizer = load_tokenizer(embedding_model.folder / "tokenizer.json")
    lines = [line for line in evaluation_text().splitlines() if len(line) > 80][:64]
    feeds = []
    for start in range(0, len(lines), 8):
        ids = [tokenizer.encode(line).ids[:96] for line in lines[start : start + 8]]
        padded = np.zeros((len(ids), max(map(len, ids))), np.int64)
        mask = np.zeros_like(padded)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        feeds.append({"input_ids": padded, "attention_mask": mask})
    return feeds


@pytest.mark.parametrize(
    ("recipe", "cosine", "kinds"),
    [
        ("int8-static", 0.99, {"fused": 36, "native": 1}),
        ("int8", 0.998, {"native": 37}),
        ("fp8-e4m3", 0.99, {"expanded": 36, "native": 1}),
    ],
)
def test_sentences_keep_their_direction(recipe, cosine, kinds, embedding_model, sentences, tmp_path):
    """Calibrated on half of the sentences, and judged on the others."""
    done = quantize_model(embedding_model.folder, tmp_path / recipe, recipe=recipe, calibration=sentences[::2])
    exact, _ = embeddings(embedding_model.folder, sentences[1::2])
    kept, found = embeddings(done.folder, sentences[1::2])
    assert kinds == found
    similarity = (exact * kept).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(kept, axis=1)
    assert similarity.min() > cosine
    assert done.bytes < 26e6  # of 90
