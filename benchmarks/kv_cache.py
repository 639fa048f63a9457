"""The key/value cache in fewer bits: bytes, speed, and what it loses, up to four times the calibrated length.

Weights are fp32 where loss is measured, so that only the cache differs, and int8 where speed is. Scales come from
827 tokens of one text; loss is measured on the first 3,308 tokens of another. Speed: caches take turns within each
round; figures are medians over rounds.

    figure                       unit
    CACHE_bytes_token            bytes that a token fills
    CACHE_kl                     mean KL divergence from the float cache's predictions, nats
    CACHE_kl_last_quarter        the same over the last 827 tokens
    CACHE_ppl_ratio              perplexity over that of the float cache
    CACHE_top1                   fraction of equal first choices
    CACHE_N_tok_s                decoding after N tokens, weights int8
    int8_sqnr_db, e4m3_sqnr_db   power of the float cache's contents over the error of storing them: 8-bit integers with
                                 the calibrated scales, 8-bit floats with a scale per channel of these very contents
"""

import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from _harness import arguments, print_figures, write_results

from seawall.inference import Decoder, models
from seawall.inference.generate.calibration import load_scales
from seawall.inference.generate.slot import CHUNK, Slot
from seawall.inference.models.kv_cache import CACHES
from seawall.inference.quality import evaluation_text
from seawall.inference.quantize import decode_e4m3, encode_e4m3, errors
from seawall.inference.runtime import ort

NAME = "smollm2-135m"
TOKENS = 4 * 827
ROUNDS = 15
STEPS = 8
FILLED = (64, 512, 2000)


def run(json: Path | None) -> dict[str, float]:
    """Measure, print, and write what was measured."""
    models.add(NAME)
    figures: dict[str, float] = {}
    samples: dict[str, Any] = {}
    with Decoder.load(NAME, precision="fp32", context=TOKENS + CHUNK) as reference:
        text = reference.encode(evaluation_text())[:TOKENS]
        for kv in CACHES:
            with Decoder.load(NAME, precision="fp32", kv=kv, context=TOKENS + CHUNK) as decoder:
                figures[f"{kv}_bytes_token"] = decoder.cache_bytes_per_token
                if kv != "fp32":
                    found = loss(reference, decoder, text)
                    figures |= {f"{kv}_{name}": value for name, value in found.items()}
        figures |= storage(reference, text)
    samples |= speed(text)
    figures |= {name: statistics.median(values) for name, values in samples.items()}
    print_figures("kv_cache", figures)
    if json is not None:
        write_results(json, figures, samples, ("onnxruntime", "numpy"))
    return figures


def loss(reference: Decoder, candidate: Decoder, text: list[int]) -> dict[str, float]:
    """How far the candidate's predictions of a text are from the reference's."""
    divergence, same, lost = [], [], 0.0
    position = 1
    for expected, found in zip(reference.logits(text), candidate.logits(text), strict=True):
        p, q = log_probabilities(expected), log_probabilities(found)
        divergence += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
        targets = text[position : position + len(p)]
        rows = np.arange(len(targets))
        lost += float((p[rows, targets] - q[rows, targets]).sum())
        position += len(p)
    return {
        "kl": statistics.fmean(divergence),
        "kl_last_quarter": statistics.fmean(divergence[-len(divergence) // 4 :]),
        "ppl_ratio": float(np.exp(lost / (len(text) - 1))),
        "top1": statistics.fmean(same),
    }


def log_probabilities(logits: Any) -> Any:
    """Natural logarithms of the probabilities, float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def storage(decoder: Decoder, text: list[int]) -> dict[str, float]:
    """What it costs to store the float cache of a text in 8 bits, as integers and as floats."""
    slot = decoder._lend()
    fill(slot, text)
    cache = slot.cache[:, :, 0, :, : len(text)]
    folder = next(models.cache_folder().glob(f"{NAME}/cache-int8-fp32-*"))
    layers, _, heads, _, width = cache.shape
    scales = load_scales(folder, (2, layers, heads, width))
    assert scales is not None
    steps = scales.swapaxes(0, 1)[:, :, :, None]
    integers = np.clip(np.rint(cache / steps), -128, 127) * steps
    unit = np.abs(cache).max(axis=3, keepdims=True) / 448
    floats = decode_e4m3(encode_e4m3(cache / unit)) * unit
    decoder._take_back(slot)
    return {"int8_sqnr_db": errors(cache, integers).sqnr_db, "e4m3_sqnr_db": errors(cache, floats).sqnr_db}


def fill(slot: Slot, text: list[int]) -> None:
    """Read a text into a cache."""
    for start in range(0, len(text), CHUNK):
        slot.run(text[start : start + CHUNK], start, ort.run_options())


def speed(text: list[int]) -> dict[str, list[float]]:
    """Tokens per second of single steps over caches of several lengths."""
    samples: dict[str, list[float]] = {f"{kv}_{length}_tok_s": [] for length in FILLED for kv in CACHES}
    decoders = {kv: Decoder.load(NAME, kv=kv) for kv in CACHES}
    slots = {kv: decoder._lend() for kv, decoder in decoders.items()}
    for slot in slots.values():
        fill(slot, text[: max(FILLED)])
    for number in range(ROUNDS):
        for length in FILLED:
            order = list(slots)
            random.Random(number).shuffle(order)
            for kv in order:
                begun = time.perf_counter()
                for step in range(STEPS):
                    slots[kv].run([text[length + step]], length + step, ort.run_options())
                samples[f"{kv}_{length}_tok_s"].append(STEPS / (time.perf_counter() - begun))
    for kv, decoder in decoders.items():
        decoder._take_back(slots[kv])
        decoder.close()
    return samples


if __name__ == "__main__":
    run(arguments(__doc__).json)
