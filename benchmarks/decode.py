"""The bundled model in this process: tokens per second, time to first token, memory, and what the loop feels.

Precisions take turns within each round, so that a busy neighbour slows all of them alike; figures are medians
over rounds. Memory is that of a fresh process which loads the int8 model and answers one prompt.

    figure               unit
    PRECISION_tok_s      new tokens per second, greedy, 128 tokens after a prompt of 64
    int8_kv8_tok_s       the same with weights and cache in 8 bits
    PRECISION_prefill_tok_s  prompt tokens read per second, 512 of them
    int4_over_int8       decoding speed: 4-bit blocks taken over against rounded 8-bit ones
    ttft_ms              from `start` to the first token, a chat prompt of 36 tokens, int8
    int8_load_ms         `Decoder.load`, verification of the files by digest included
    rss_mb               resident memory, int8
    loop_p50/p99_ms      how late a 1 ms sleep on the event loop is while int8 decodes in a worker thread
    python_share         part of an int8 decoding step that is spent outside ONNX Runtime

With --peers, which take their turns in each round, every one in its own process, with two threads, the same prompts,
and weights made from the same file (see `_peer_models.py`):

    genai_PRECISION_tok_s, llamacpp_q4/f16_tok_s, transformers_fp32_tok_s, and the same with _prefill
    A_over_PEER          ratio of decoding speeds, the median of the ratios within rounds, like all of these
    A_over_best_peer     to whichever peer decoded fastest, of any precision
    prefill_over_best_peer           int8 to whichever quantized peer read a prompt fastest
    int4_prefill_over_best_peer      the same of int4
    PEER_equal_tokens    of the peer's first 64 tokens, how many are those of our fp32 before the first other one
"""

import asyncio
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import _peer_models
import psutil
from _harness import arguments, print_figures, write_results
from _peer_workers import Peer

from seawall.inference import Decoder, models
from seawall.inference.runtime import ort

NAME = "smollm2-135m"
QUESTION = "Why is the sea salty?"
TEXT = Path(__file__).parents[1] / "tests/inference/oracle/harbour.txt"
ROUNDS = 7
NEW_TOKENS = 128
PREFILLED = ("int8", "int8_block32", "int4", "fp32")
DISTRIBUTIONS = ("onnxruntime", "numpy", "tokenizers")
PEERS = {  # name of the figure: kind of worker, form of the model
    "genai_int4": ("genai", "genai-int4"),
    "genai_int8": ("genai", "genai-int8"),
    "genai_fp32": ("genai", "genai-fp32"),
    "llamacpp_q4": ("llamacpp", "q4"),
    "llamacpp_f16": ("llamacpp", "f16"),
    "transformers_fp32": ("transformers", "hf"),
}
FLOAT_PEERS = ("genai_fp32", "transformers_fp32")
QUANTIZED_PEERS = ("genai_int4", "genai_int8", "llamacpp_q4")
PEER_DISTRIBUTIONS = ("onnxruntime-genai", "llama-cpp-python", "transformers", "torch")


def run(json: Path | None, *, peers: bool) -> dict[str, float]:
    """Measure, print, and write what was measured."""
    gguf = models.add(NAME)
    decoders = {
        precision: Decoder.load(NAME, precision=precision)
        for precision in ("fp32", "int8", "int8-block32", "int4", "int4-rtn")
    }
    decoders = {name.replace("-", "_"): decoder for name, decoder in decoders.items()}
    decoders["int8_kv8"] = Decoder.load(NAME, precision="int8", kv="int8")
    text = decoders["int8"].encode(TEXT.read_text(encoding="utf-8"))
    samples: dict[str, Any] = {
        name: [] for name in ("ttft_ms", "int8_load_ms", "loop_idle_ms", "loop_ms", "python_share")
    }
    for decoder in decoders.values():  # warm-up
        decode(decoder, text[:64], 16)
    with ExitStack() as stack:
        others = started(gguf, stack) if peers else {}
        equal = {name: equal_tokens(peer, decoders["fp32"], text[:64]) for name, peer in others.items()}
        measure(decoders, others, text, samples)
    for decoder in decoders.values():
        decoder.close()
    samples["rss_mb"] = [memory() for _ in range(3)]
    figures = {name: statistics.median(values) for name, values in samples.items() if not name.startswith("loop")}
    percentiles = statistics.quantiles(samples["loop_ms"], n=100)
    figures |= {"loop_p50_ms": percentiles[49], "loop_p99_ms": percentiles[98]}
    figures["loop_idle_p50_ms"] = statistics.median(samples["loop_idle_ms"])
    figures["int4_over_int8"] = over(samples, "int4_tok_s", "int8_tok_s")
    if peers:
        figures |= comparison(samples)
        figures |= {f"{name}_equal_tokens": float(count) for name, count in equal.items()}
    print_figures("decode", figures)
    if json is not None:
        write_results(json, figures, samples, (*DISTRIBUTIONS, *(PEER_DISTRIBUTIONS if peers else ())))
    return figures


def measure(decoders: dict[str, Decoder], peers: dict[str, Peer], text: list[int], samples: dict[str, Any]) -> None:
    """All rounds, into `samples`."""
    int8 = decoders["int8"]
    for number in range(ROUNDS):
        turns = [*decoders, *peers]
        random.Random(number).shuffle(turns)
        for name in turns:
            if name in peers:
                rate = peers[name].answer(text[:64], NEW_TOKENS).rate
            else:
                rate = decode(decoders[name], text[:64], NEW_TOKENS)
            samples.setdefault(f"{name}_tok_s", []).append(rate)
        for name in turns:
            if name in peers:
                seconds = peers[name].answer(text[:512], 1).first
            elif name in PREFILLED:
                seconds = first_token(decoders[name], text[:512])
            else:
                continue
            samples.setdefault(f"{name}_prefill_tok_s", []).append(512 / seconds)
        samples["ttft_ms"].append(first_token(int8, int8.encode_chat(QUESTION)) * 1e3)
        samples["int8_load_ms"].append(load() * 1e3)
        samples["python_share"].append(python_share(int8, text[:64]))
        samples["loop_idle_ms"] += asyncio.run(lateness(None, text[:64]))
        samples["loop_ms"] += asyncio.run(lateness(int8, text[:64]))


def started(gguf: Path, stack: ExitStack) -> dict[str, Peer]:
    """Every peer, ready and warm."""
    files = _peer_models.prepared(gguf)
    return {name: stack.enter_context(Peer(name, kind, files[form])) for name, (kind, form) in PEERS.items()}


def equal_tokens(peer: Peer, fp32: Decoder, prompt: list[int]) -> int:
    """How many of the peer's tokens are ours; a peer in float32 must say the same all along."""
    with fp32.start(prompt, max_tokens=64) as sequence:
        for _ in sequence:
            pass
    found = peer.answer(prompt, 64).tokens
    pairs = zip(found, sequence.tokens, strict=False)
    equal = next((place for place, (theirs, ours) in enumerate(pairs) if theirs != ours), len(found))
    if peer.name in FLOAT_PEERS and equal < len(sequence.tokens):
        sys.exit(f"{peer.name} answers otherwise from token {equal} on: it does not run the same model")
    return equal


def over(samples: dict[str, Any], ours: str, *theirs: str) -> float:
    """Median over rounds of our rate over theirs: over whichever of them is fastest, by its median."""
    best = max(theirs, key=lambda name: statistics.median(samples[name]))
    ratios: list[float] = [a / b for a, b in zip(samples[ours], samples[best], strict=True)]
    return statistics.median(ratios)


def comparison(samples: dict[str, Any]) -> dict[str, float]:
    """Our rates over those of the peers."""
    pairs = {
        "int8_over_genai_int8": ("int8", "genai_int8"),
        "int8_over_llamacpp_q4": ("int8", "llamacpp_q4"),
        "int4_over_genai_int4": ("int4", "genai_int4"),
        "int4_rtn_over_genai_int4": ("int4_rtn", "genai_int4"),
        "int4_over_llamacpp_q4": ("int4", "llamacpp_q4"),
        "fp32_over_genai": ("fp32", "genai_fp32"),
        "fp32_over_transformers": ("fp32", "transformers_fp32"),
    }
    found = {name: over(samples, f"{ours}_tok_s", f"{theirs}_tok_s") for name, (ours, theirs) in pairs.items()}
    every = [f"{name}_tok_s" for name in PEERS]
    quantized = [f"{name}_prefill_tok_s" for name in QUANTIZED_PEERS]
    return found | {
        "int8_over_best_peer": over(samples, "int8_tok_s", *every),
        "int4_over_best_peer": over(samples, "int4_tok_s", *every),
        "prefill_over_best_peer": over(samples, "int8_prefill_tok_s", *quantized),
        "int4_prefill_over_best_peer": over(samples, "int4_prefill_tok_s", *quantized),
        "fp32_prefill_over_genai": over(samples, "fp32_prefill_tok_s", "genai_fp32_prefill_tok_s"),
    }


def decode(decoder: Decoder, prompt: list[int], count: int) -> float:
    """Tokens per second after the first token."""
    with decoder.start(prompt, max_tokens=count) as sequence:
        while not sequence.tokens:
            sequence.step()
        begun = time.perf_counter()
        for _ in sequence:
            pass
        return (len(sequence.tokens) - 1) / (time.perf_counter() - begun)


def first_token(decoder: Decoder, prompt: list[int]) -> float:
    """Seconds from `start` to the first token."""
    begun = time.perf_counter()
    with decoder.start(prompt, max_tokens=1) as sequence:
        for _ in sequence:
            pass
        return time.perf_counter() - begun


def load() -> float:
    """Seconds to load the int8 model, its files being in the page cache."""
    begun = time.perf_counter()
    with Decoder.load(NAME, precision="int8"):
        return time.perf_counter() - begun


def python_share(decoder: Decoder, prompt: list[int]) -> float:
    """The part of decoding steps that is not ONNX Runtime's run."""
    inside = 0.0
    real = ort.run

    def timed(*run: Any) -> None:
        nonlocal inside
        begun = time.perf_counter()
        real(*run)
        inside += time.perf_counter() - begun

    with decoder.start(prompt, max_tokens=64) as sequence, mock.patch.object(ort, "run", timed):
        sequence.step()
        inside = 0.0
        begun = time.perf_counter()
        for _ in sequence:
            pass
        return 1 - inside / (time.perf_counter() - begun)


async def lateness(decoder: Decoder | None, prompt: list[int]) -> list[float]:
    """How late a sleep of 1 ms returns, in ms, while the decoder works in a worker thread; None: while idle."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append((time.perf_counter() - begun - 0.001) * 1e3)

    ticking = asyncio.create_task(tick())
    if decoder is None:
        await asyncio.sleep(0.5)
    else:
        with decoder.start(prompt, max_tokens=NEW_TOKENS) as sequence:
            while await asyncio.to_thread(sequence.step):
                pass
    ticking.cancel()
    return late


def memory() -> float:
    """Resident megabytes of a fresh process that has answered one prompt."""
    done = subprocess.run([sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True)
    return float(done.stdout)


def answer_once() -> None:
    """What `memory` runs in a process of its own."""
    with Decoder.load(NAME, precision="int8") as decoder:
        decode(decoder, decoder.encode_chat(QUESTION), 64)
        print(psutil.Process().memory_info().rss / 1e6)


if __name__ == "__main__":
    if sys.argv[1:] == ["--memory"]:
        answer_once()
    else:
        options = arguments(__doc__)
        run(options.json, peers=options.peers)
