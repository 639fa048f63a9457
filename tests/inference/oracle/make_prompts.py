"""Writes `prompts.json`: the tokens of the prompts and of the text that `make_reference.py` runs.

PYTHONPATH=src python tests/inference/oracle/make_prompts.py
"""

import json
from pathlib import Path

from seawall.inference import Decoder

HERE = Path(__file__).parent
CHATS = [
    "Why is the sea salty?",
    "Write a short poem about a lighthouse.",
    "Explain what a circuit breaker does in software, in two sentences.",
    "List five things to pack for a trip to Norway.",
    "Write a Python function that reverses a list.",
    "Übersetze ins Deutsche: The storm is over. 🌊",
]
PLAIN = ["Once upon a time, in 1895, there lived an old clockmaker who"]

with Decoder.load("smollm2-135m", precision="fp32") as decoder:
    prompts = [{"text": text, "kind": "chat", "tokens": decoder.encode_chat(text)} for text in CHATS]
    prompts += [{"text": text, "kind": "plain", "tokens": decoder.encode(text)} for text in PLAIN]
    text_tokens = decoder.encode((HERE / "harbour.txt").read_text(encoding="utf-8"))
content = {"prompts": prompts, "text_tokens": text_tokens}
(HERE / "prompts.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
