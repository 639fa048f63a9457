"""What a model costs: bytes on disk, seconds to load and memory in a process of its own, and how fast it answers."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seawall.inference.errors import QualityError
from seawall.inference.generate.decoder import Decoder
from seawall.inference.models.cache import MANIFEST
from seawall.inference.quantize.source import Source
from seawall.inference.runtime.backend import Backend

_PROMPT, _ANSWER, _PREFILL = 64, 64, 512  # tokens
_MODULE = "seawall.inference.quality.fresh"


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model costs; None is what was not measured, or does not apply.

    Attributes:
        file_bytes: all files that it is loaded from.
        load_s: seconds to load it in a fresh process, verification included, the files being in the page cache.
        rss_bytes: resident memory of that process, Python and ONNX Runtime included, once it has answered.
        decode_tok_s: new tokens per second of a language model, greedy, after a prompt of 64.
        prefill_tok_s: prompt tokens that it reads per second, 512 of them at most.
        run_s: seconds of a run of any other model.
    """

    file_bytes: int | None = None
    load_s: float | None = None
    rss_bytes: int | None = None
    decode_tok_s: float | None = None
    prefill_tok_s: float | None = None
    run_s: float | None = None


def file_bytes(model: str | os.PathLike[str]) -> int:
    """Bytes of all files of a folder that has a manifest; else of an .onnx file and its external data."""
    path = Path(model)
    if (path / MANIFEST).is_file():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return sum(file.stat().st_size for file in Source(path).files())


def fresh_costs(model: str | os.PathLike[str], *, text: bool, threads: int | None = None) -> tuple[float, int]:
    """Seconds to load a model, and bytes of memory after its first answer, in a process of its own.

    `text` says that the folder holds a language model. The model is loaded although its gate may have failed: this is
    how one finds out. Raises QualityError where that process fails, with its last line.
    """
    job = {"model": os.fspath(Path(model).resolve()), "text": text, "threads": threads}
    command = [sys.executable, "-m", _MODULE, json.dumps(job)]
    paths = [os.fspath(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603 - ours
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise QualityError(f"a fresh process could not load and run {os.fspath(model)}: {last}")
    seconds, memory = json.loads(done.stdout)
    return float(seconds), int(memory)


def paces(
    reference: Decoder, candidate: Decoder, tokens: list[int], *, rounds: int = 3
) -> list[tuple[float | None, float | None]]:
    """Decoding and prefill speed of both, in tokens per second: medians over rounds in which both take turns."""
    models = (reference, candidate)
    longest = min(len(tokens), _PREFILL, *(model.context - 1 for model in models))
    prompt = tokens[: min(_PROMPT, longest)]
    timed: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    for number in range(rounds + 1):
        for index in _turns(len(models), number):
            decoded, read = _decode(models[index], prompt), longest / _first_token(models[index], tokens[:longest])
            if number:  # the first round warms up
                timed[index][1].append(read)
                if decoded is not None:
                    timed[index][0].append(decoded)
    return [(statistics.median(decode) if decode else None, statistics.median(read)) for decode, read in timed]


def run_times(reference: Backend, candidate: Backend, inputs: Mapping[str, Any], *, rounds: int = 5) -> list[float]:
    """Seconds of a run of both: medians over rounds in which both take turns."""
    models = (reference, candidate)
    timed: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 1):
        for index in _turns(len(models), number):
            begun = time.perf_counter()
            models[index].run_sync(inputs)
            if number:
                timed[index].append(time.perf_counter() - begun)
    return [statistics.median(times) for times in timed]


def _turns(models: int, number: int) -> list[int]:
    order = list(range(models))
    random.Random(number).shuffle(order)
    return order


def _decode(decoder: Decoder, prompt: list[int]) -> float | None:
    """Tokens per second after the first; None where the answer had no second token."""
    with decoder.start(prompt, max_tokens=_ANSWER, speculation=False) as sequence:
        while not sequence.tokens and sequence.step() is not None:
            pass
        first, begun = len(sequence.tokens), time.perf_counter()
        for _ in sequence:
            pass
        further = len(sequence.tokens) - first
        return further / (time.perf_counter() - begun) if further > 0 else None


def _first_token(decoder: Decoder, prompt: list[int]) -> float:
    begun = time.perf_counter()
    with decoder.start(prompt, max_tokens=1, speculation=False) as sequence:
        for _ in sequence:
            pass
    return time.perf_counter() - begun
