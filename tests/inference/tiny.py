"""A Llama model of a few kilobytes in a GGUF file, written by the gguf package, for tests about files."""

import gguf
import numpy as np

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "Ġ", "ab", "Ċ"]
TYPES = [3, 3, 3] + [1] * (len(TOKENS) - 3)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def write(path, *, change=lambda writer: None, **overrides):
    """Write the model; keyword arguments replace numbers of its header, `change` adds to it.

    Matrices are stored as `kind`, those that `kinds` names, such as "ffn_down", as it says.
    """
    facts = {
        "block_count": 2, "embedding_length": 64, "feed_forward_length": 96, "head_count": 4,
        "head_count_kv": 2, "context_length": 128, "pre": "smollm", "architecture": "llama", "eos": 2,
        "tokens": TOKENS, "types": TYPES, "merges": ["a b"], "template": TEMPLATE, "poison": None,
        "kind": gguf.GGMLQuantizationType.Q4_1, "kinds": {},
    } | overrides  # fmt: skip
    writer = gguf.GGUFWriter(path, facts["architecture"])
    writer.add_block_count(facts["block_count"])
    writer.add_context_length(facts["context_length"])
    writer.add_embedding_length(facts["embedding_length"])
    writer.add_feed_forward_length(facts["feed_forward_length"])
    writer.add_head_count(facts["head_count"])
    writer.add_head_count_kv(facts["head_count_kv"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(facts["pre"])
    writer.add_token_list(facts["tokens"])
    writer.add_token_types(facts["types"])
    writer.add_token_merges(facts["merges"])
    writer.add_eos_token_id(facts["eos"])
    writer.add_chat_template(facts["template"])
    change(writer)
    _add_tensors(writer, facts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensors(writer, facts):
    rng = np.random.default_rng(7)
    vocabulary = len(facts["tokens"])
    matrices = {"token_embd": (vocabulary, 64)}
    norms = ["output_norm"]
    for layer in range(2):
        at = f"blk.{layer}"
        norms += [f"{at}.attn_norm", f"{at}.ffn_norm"]
        matrices |= {
            f"{at}.attn_q": (64, 64), f"{at}.attn_k": (32, 64), f"{at}.attn_v": (32, 64),
            f"{at}.attn_output": (64, 64), f"{at}.ffn_gate": (96, 64), f"{at}.ffn_up": (96, 64),
            f"{at}.ffn_down": (64, 96),
        }  # fmt: skip
    for name in norms:
        values = np.ones(64, dtype=np.float32)
        if facts["poison"] is not None:
            values[3] = facts["poison"]
        writer.add_tensor(f"{name}.weight", values)
    for name, shape in matrices.items():
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        stored = {"token_embd": gguf.GGMLQuantizationType.Q8_0} | facts["kinds"]
        kind = stored.get(name.rpartition(".")[2], facts["kind"])
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
