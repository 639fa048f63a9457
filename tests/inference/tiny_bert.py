"""A BERT encoder of a few kilobytes in sentence-transformers' layout, and its answer computed in float64."""

import json
import math
import struct

import numpy as np

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "sea", "salt", "##y", "why", "rock", "?"]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 10,
    "max_position_embeddings": 16, "type_vocab_size": 2,
}  # fmt: skip
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
MODULES = ("Transformer", "Pooling", "Normalize")


def tensors(seed=3):
    rng = np.random.default_rng(seed)
    hidden, wide = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (SIZES["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (SIZES["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for layer in range(SIZES["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        linears = {f"attention.self.{role}": (hidden, hidden) for role in ("query", "key", "value")}
        linears |= {"attention.output.dense": (hidden, hidden), "intermediate.dense": (wide, hidden)}
        linears |= {"output.dense": (hidden, wide)}
        for name, shape in linears.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{at}.{name}.weight": (hidden,), f"{at}.{name}.bias": (hidden,)}
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def safetensors(arrays, kinds=None):
    """The bytes of a file; `kinds` replaces the names of the types."""
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, array in arrays.items():
        blob = array.tobytes()
        kind = (kinds or {}).get(name, {"f": "F", "i": "I", "u": "U"}[array.dtype.kind] + str(array.itemsize * 8))
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def write(folder, *, arrays=None, config=None, pooling=MEAN, modules=MODULES, longest=12):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(safetensors(tensors() if arrays is None else arrays))
    facts = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, **SIZES, **(config or {})}
    kinds = [{"type": f"sentence_transformers.models.{name}"} for name in modules]
    for name, content in {
        "config.json": facts, "modules.json": kinds, "sentence_bert_config.json": {"max_seq_length": longest},
        "1_Pooling/config.json": pooling,
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(content))
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)  # as published files carry it
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def vectors(arrays, tokens, *, heads, layers, pooling="mean", normalize=True):
    """Embedding of one text in float64, written from the paper (Devlin et al. 2018) and not from the graph."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    size = x.shape[-1] // heads
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        q, k, v = (linear(x, f"{at}.attention.self.{role}") for role in ("query", "key", "value"))
        parts = []
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            scores = q[:, cut] @ k[:, cut].T / math.sqrt(size)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            parts.append(weights / weights.sum(-1, keepdims=True) @ v[:, cut])
        attended = linear(np.concatenate(parts, -1), f"{at}.attention.output.dense")
        x = norm(x + attended, f"{at}.attention.output.LayerNorm")
        up = linear(x, f"{at}.intermediate.dense")
        gelu = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        x = norm(x + linear(gelu, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    pooled = x[0] if pooling == "cls" else x.mean(0)
    return pooled / np.linalg.norm(pooled) if normalize else pooled
