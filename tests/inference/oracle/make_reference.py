"""Computes `reference.json`: greedy tokens by an implementation that shares no code with seawall.

Run by hand, in an environment of its own, never by the tests:

    python -m venv oracle && oracle/bin/pip install torch transformers gguf
    oracle/bin/python tests/inference/oracle/make_reference.py SmolLM2-135M-Instruct.Q4_1.gguf

Weights are dequantised by the `gguf` package, loaded into transformers' LlamaForCausalLM in float32, and
decoded greedily. The prompts are tokens, written by `make_prompts.py`, so that a difference is a difference
of the model and not of the tokenizer. `smallest_gap` is the smallest distance between the two best logits
on the way: how close the nearest tie was.
"""

import argparse
import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
NEW_TOKENS = 64


def tensor(reader, name):
    found = next(one for one in reader.tensors if one.name == name)
    shape = tuple(int(size) for size in reversed(found.shape))
    return torch.from_numpy(np.array(gguf.quants.dequantize(found.data, found.tensor_type)).reshape(shape).copy())


def unpermute(weights, heads):
    """The inverse of `permute` in llama.cpp's converter, written from that function's definition."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def build(path):
    reader = gguf.GGUFReader(path)

    def value(key):
        return reader.fields[f"llama.{key}"].contents()

    config = transformers.LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
        attention_bias=False,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.float32).eval()
    state = {
        "model.embed_tokens.weight": tensor(reader, "token_embd.weight"),
        "model.norm.weight": tensor(reader, "output_norm.weight"),
    }
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for stored, name in names.items():
            weights = tensor(reader, f"blk.{layer}.{stored}.weight")
            if stored in heads:
                weights = unpermute(weights, heads[stored])
            state[f"model.layers.{layer}.{name}.weight"] = weights
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    assert model.model.rotary_emb.inv_freq[1].item() < 1
    return model


@torch.no_grad()
def greedy(model, prompt):
    """Greedy continuation, the final top logits, and the smallest gap between the best two on the way."""
    tokens, cache, gaps = [], None, []
    feed = torch.tensor([prompt])
    for _ in range(NEW_TOKENS):
        out = model(feed, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        best = logits.topk(2).values
        gaps.append(float(best[0] - best[1]))
        tokens.append(int(logits.argmax()))
        feed = torch.tensor([[tokens[-1]]])
    return tokens, min(gaps)


@torch.no_grad()
def mean_loss(model, tokens):
    logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:])))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    path = parser.parse_args().gguf
    prompts = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
    model = build(path)
    cases = []
    for case in prompts["prompts"]:
        tokens, gap = greedy(model, case["tokens"])
        cases.append({**case, "greedy": tokens, "smallest_gap": round(gap, 5)})
    reference = {
        "made_with": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
        "cases": cases,
        "perplexity_text_tokens": prompts["text_tokens"],
        "mean_loss": mean_loss(model, prompts["text_tokens"]),
    }
    (HERE / "reference.json").write_text(json.dumps(reference) + "\n", encoding="utf-8")


main()
