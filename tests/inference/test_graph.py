"""The graph computes what the model's definition says, for one sequence and for ragged batches."""

import numpy as np
import onnx
import pytest

from seawall.inference.models.gguf_file import GGUFFile
from seawall.inference.models.graph import RECIPES, write_graph
from seawall.inference.models.kv_cache import with_query_seqlens
from seawall.inference.models.llama import LlamaConfig, layer_weights, read_config
from seawall.inference.runtime import ort
from tests.inference import tiny


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    with GGUFFile(tiny.write(tmp_path_factory.mktemp("graph") / "tiny.gguf")) as opened:
        yield opened


@pytest.fixture(scope="module")
def config(gguf) -> LlamaConfig:
    return read_config(gguf)


def session(gguf, config, folder, precision, *, ragged=False):
    write_graph(folder, gguf, config, RECIPES[precision])
    if not ragged:
        return ort.build_session(folder / "model.onnx", threads=1)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    with_query_seqlens(graph)
    return ort.build_session(graph.SerializeToString(), threads=1, folder=folder)


def caches(config, rows, capacity=32):
    shape = (rows, config.kv_heads, capacity, config.head_size)
    return {f"past.{i}.{part}": np.zeros(shape, np.float32) for i in range(config.layers) for part in "kv"}


def call(graph, ids, lengths, past, rows, *, ragged=None):
    """Run right-padded `ids` [B, S]; `lengths` are the totals after the run."""
    feeds = {
        "input_ids": np.array(ids, np.int64),
        "seqlens_k": np.array(lengths, np.int32) - 1,
        "total_len": np.array(max(lengths), np.int32),
        "logit_rows": np.array(rows, np.int64),
        **past,
    }
    if ragged is not None:
        feeds["query_seqlens"] = np.array(ragged, np.int32)
    logits, *present = graph.run(None, feeds)
    return logits, dict(zip(past, present, strict=True))


def by_definition(gguf, config, tokens):
    """Logits [tokens, vocabulary] of a Llama model, written from its definition in float64."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon) * scale

    def rotate(x, positions):  # [tokens, heads, head_size], halves
        half = config.head_size // 2
        angle = positions[:, None] * config.rope_base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    table = gguf.dequantized("token_embd.weight").astype(np.float64)
    x, count = table[tokens], len(tokens)
    heads, kv_heads, size = config.heads, config.kv_heads, config.head_size
    hidden_from_past = np.triu(np.full((count, count), -np.inf), 1)
    for layer in range(config.layers):
        w = layer_weights(gguf, config, layer)
        qkv = (norm(x, w.attention_norm) @ w.qkv.T.astype(np.float64)).reshape(count, -1, size)
        q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)
        q, k = (rotate(part, np.arange(count)) for part in (q, k))
        k, v = (part.repeat(heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size) + hidden_from_past
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", shares, v).reshape(count, -1) @ w.attention_out.T
        gate, up = np.split(norm(x, w.mlp_norm) @ w.gate_up.T.astype(np.float64), 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w.down.T
    return norm(x, gguf.dequantized("output_norm.weight")) @ table.T


def test_fp32_logits_are_those_of_the_definition(gguf, config, tmp_path):
    tokens = [1, 5, 12, 7, 3, 3, 9]
    graph = session(gguf, config, tmp_path, "fp32")
    logits, _ = call(graph, [tokens], [7], caches(config, 1), range(7))
    np.testing.assert_allclose(logits, by_definition(gguf, config, tokens), atol=2e-5)


@pytest.mark.parametrize("precision", ["int8", "int8-block32"])
def test_8_bit_logits_are_near_those_of_the_definition(gguf, config, tmp_path, precision):
    tokens = [1, 5, 12, 7, 3, 3, 9]
    logits, _ = call(session(gguf, config, tmp_path, precision), [tokens], [7], caches(config, 1), range(7))
    expected = by_definition(gguf, config, tokens)
    assert np.linalg.norm(logits - expected) < 0.1 * np.linalg.norm(expected)  # random weights amplify rounding


def test_only_the_wanted_rows_are_projected(gguf, config, tmp_path):
    graph = session(gguf, config, tmp_path, "fp32")
    every, _ = call(graph, [[1, 5, 12]], [3], caches(config, 1), [0, 1, 2])
    some, _ = call(graph, [[1, 5, 12]], [3], caches(config, 1), [2, 0])
    np.testing.assert_allclose(some, every[[2, 0]], atol=1e-6)


def test_with_query_seqlens_rows_of_several_lengths_run_over_their_own_caches(gguf, config, tmp_path):
    plain = session(gguf, config, tmp_path, "fp32")
    (tmp_path / "ragged").mkdir()
    ragged = session(gguf, config, tmp_path / "ragged", "fp32", ragged=True)
    starts, news = [[1, 5, 12, 7, 3], [4, 9]], [[6, 7], [8, 3, 10]]
    alone, past = [], {name: [] for name in caches(config, 1)}
    for start, new in zip(starts, news, strict=True):
        _, cached = call(plain, [start], [len(start)], caches(config, 1), [0])
        for name, value in cached.items():
            past[name].append(value)
        logits, _ = call(plain, [new], [len(start) + len(new)], cached, range(len(new)))
        alone.append(logits)
    joined = {name: np.concatenate(values) for name, values in past.items()}
    together, _ = call(ragged, [[6, 7, 0], [8, 3, 10]], [7, 5], joined, [0, 1, 3, 4, 5], ragged=[2, 3])
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
