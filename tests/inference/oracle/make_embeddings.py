"""Computes `embeddings.json`: vectors by an implementation that shares no code with seawall.

Run by hand, in an environment of its own, never by the tests:

    python -m venv oracle && oracle/bin/pip install torch sentence-transformers
    oracle/bin/python tests/inference/oracle/make_embeddings.py FOLDER

FOLDER holds the files of the catalogue's all-minilm-l6-v2 (the `source` folder in the cache). The tokens are
recorded as well, so that a difference of the tokenizer shows as one.
"""

import argparse
import hashlib
import json
from pathlib import Path

import sentence_transformers
import torch
import transformers

HERE = Path(__file__).parent
TEXTS = [
    "",
    "Why is the sea salty?",
    "Rain dissolves minerals out of rock, and rivers carry them into the ocean.",
    "The harbour master closed the gate at dusk.",
    "Crème brûlée, naïve café: déjà vu!",
    "海水为什么是咸的",
    "x = [i**2 for i in range(10)]  # squares",
    "antidisestablishmentarianism " + "y" * 120,
    "Resilience is the ability to absorb a failure and go on. " * 60,
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    vectors = model.encode(TEXTS, batch_size=1, convert_to_numpy=True)
    cases = []
    for text, vector in zip(TEXTS, vectors, strict=True):
        tokens = model.preprocess([text])["input_ids"][0].tolist()
        cases.append({"text": text, "tokens": tokens, "vector": [float(f"{value:.8g}") for value in vector]})
    weights = (folder / "model.safetensors").read_bytes()
    reference = {
        "made_with": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentence_transformers": sentence_transformers.__version__,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        },
        "cases": cases,
    }
    (HERE / "embeddings.json").write_text(json.dumps(reference) + "\n", encoding="utf-8")


main()
