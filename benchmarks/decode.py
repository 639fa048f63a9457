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
"""

import asyncio
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from _harness import arguments, print_figures, write_results

from seawall.inference import Decoder, models
from seawall.inference.runtime import ort

NAME = "smollm2-135m"
QUESTION = "Why is the sea salty?"
TEXT = Path(__file__).parents[1] / "tests/inference/oracle/harbour.txt"
ROUNDS = 7
NEW_TOKENS = 128
PREFILLED = ("int8", "int4", "fp32")
DISTRIBUTIONS = ("onnxruntime", "numpy", "tokenizers")


def run(json: Path | None, *, peers: bool) -> dict[str, float]:
    """Measure, print, and write what was measured."""
    models.add(NAME)
    decoders = {
        precision: Decoder.load(NAME, precision=precision) for precision in ("fp32", "int8", "int4", "int4-rtn")
    }
    decoders = {name.replace("-", "_"): decoder for name, decoder in decoders.items()}
    decoders["int8_kv8"] = Decoder.load(NAME, precision="int8", kv="int8")
    int8 = decoders["int8"]
    text = int8.encode(TEXT.read_text(encoding="utf-8"))
    samples: dict[str, Any] = {f"{precision}_tok_s": [] for precision in decoders}
    samples |= {
        **{f"{precision}_prefill_tok_s": [] for precision in PREFILLED},
        "ttft_ms": [],
        "int8_load_ms": [],
        "loop_idle_ms": [],
        "loop_ms": [],
        "python_share": [],
    }
    for decoder in decoders.values():  # warm-up
        decode(decoder, text[:64], 16)
    for _ in range(ROUNDS):
        for precision, decoder in decoders.items():
            samples[f"{precision}_tok_s"].append(decode(decoder, text[:64], NEW_TOKENS))
        for precision in PREFILLED:
            samples[f"{precision}_prefill_tok_s"].append(512 / first_token(decoders[precision], text[:512]))
        samples["ttft_ms"].append(first_token(int8, int8.encode_chat(QUESTION)) * 1e3)
        samples["int8_load_ms"].append(load() * 1e3)
        samples["python_share"].append(python_share(int8, text[:64]))
        samples["loop_idle_ms"] += asyncio.run(lateness(None, text[:64]))
        samples["loop_ms"] += asyncio.run(lateness(int8, text[:64]))
    for decoder in decoders.values():
        decoder.close()
    samples["rss_mb"] = [memory() for _ in range(3)]
    figures = {name: statistics.median(values) for name, values in samples.items() if not name.startswith("loop")}
    percentiles = statistics.quantiles(samples["loop_ms"], n=100)
    figures |= {"loop_p50_ms": percentiles[49], "loop_p99_ms": percentiles[98]}
    figures["loop_idle_p50_ms"] = statistics.median(samples["loop_idle_ms"])
    figures["int4_over_int8"] = figures["int4_tok_s"] / figures["int8_tok_s"]
    notes = ["Peers are not measured yet."] if peers else []
    print_figures("decode", figures, notes)
    if json is not None:
        write_results(json, figures, samples, DISTRIBUTIONS)
    return figures


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
    with Decoder.load(NAME):
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
    with Decoder.load(NAME) as decoder:
        decode(decoder, decoder.encode_chat(QUESTION), 64)
        print(psutil.Process().memory_info().rss / 1e6)


if __name__ == "__main__":
    if sys.argv[1:] == ["--memory"]:
        answer_once()
    else:
        options = arguments(__doc__)
        run(options.json, peers=options.peers)
