"""Continuous batching: many rows at once, a request that joins, prompts that are known, bytes that are in use.

INT8 weights and an 8-bit cache, greedy, and no drafts but where it says so. What is compared takes turns within each
round, in a new random order; figures are medians over rounds of the ratios within a round.

    rowsN_over_rows1        tokens per second of N rows, by those of one; N is 4, 8 and 16
    rowsN_tok_s             the same, absolute
    row_over_sequence       tokens per second of a row that is alone, by those of `Decoder.start`
    join_added_steps        while a prompt of 400 tokens is read beside 7 rows: how much longer each of them waits for a
                            token, in steps of a moment before; the median, and _worst the longest wait of a round
    join_added_steps_beside_one   the same beside a single row, whose steps are shorter than any part worth reading
    join_ttft_over_alone    seconds to the newcomer's first token beside 7 rows, by those of an empty batch
    prefix_hit_ttft_ratio   seconds to the first token of a new prompt of 400 tokens, by those of one that is known
    paged_utilisation       bytes of cache that hold tokens, by bytes held, 16 mixed requests; _fp32 for a float cache
    samples_bytes_ratio     bytes held for 8 samples of a prompt of 400 tokens, by those of 8 such prompts
    python_share            part of a step of 8 rows that is spent outside ONNX Runtime; _sampled with top-p for all
    drafts_KIND_rowsN       tokens per second of N rows that speculate, by those without; KIND is copy or chat
"""

import itertools
import json as jsons
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from _harness import arguments, print_figures, write_results

from seawall.inference import Decoder, Greedy, Sampling, Speculation, models
from seawall.inference.generate.rows import ContinuousBatch, Request, Row
from seawall.inference.quality import evaluation_text
from seawall.inference.runtime import ort

NAME = "smollm2-135m"
PROMPTS = jsons.loads(Path(__file__).with_name("speculation_prompts.json").read_text(encoding="utf-8"))
DISTRIBUTIONS = ("onnxruntime", "numpy", "tokenizers")
ROUNDS = 5
COUNTS = (1, 4, 8, 16)
STEPS = 20
LONG = 400
MIXED = (40, 65, 96, 130, 190, 240, 310, 365, 420, 510, 600, 700, 820, 950, 1100, 1300)  # tokens of 16 prompts
NUCLEUS = Sampling(temperature=0.8, top_p=0.95, seed=1)
Samples = dict[str, list[float]]


def run(json: Path | None) -> dict[str, float]:
    """Measure, print, and write what was measured."""
    models.add(NAME)
    samples: Samples = {}
    figures: dict[str, float] = {}
    with Decoder.load(NAME, precision="int8", kv="int8") as decoder:
        text = decoder.encode(evaluation_text())
        decoder.pace()
        with mock.patch.object(decoder, "_ends", frozenset()):  # every row is to last as long as it is timed
            for number in range(-1, ROUNDS):
                found: Samples = {}
                for part in shuffled([speeds, joining, known, drafts], number):
                    part(decoder, text, number, found)
                if number >= 0:  # the first is the warm-up
                    for name, values in found.items():
                        samples.setdefault(name, []).extend(values)
            figures["samples_bytes_ratio"] = sample_bytes(decoder, text)
            figures["paged_utilisation"] = utilisation(decoder, text)
    with Decoder.load(NAME, precision="int8") as decoder, mock.patch.object(decoder, "_ends", frozenset()):
        figures["paged_utilisation_fp32"] = utilisation(decoder, text)
    figures |= {name: statistics.median(values) for name, values in samples.items()}
    figures = dict(sorted(figures.items()))
    print_figures("batching", figures)
    if json is not None:
        write_results(json, figures, samples, DISTRIBUTIONS)
    return figures


def shuffled(things: list[Any], number: int) -> list[Any]:
    """In an order of the round's own."""
    return random.Random(number).sample(things, len(things))


def prompts(text: list[int], length: int, number: int) -> Iterator[list[int]]:
    """Pieces of a text; a first token of their own keeps any of them from beginning like another."""
    for start in itertools.count(number * 37):
        at = start * 53 % (len(text) - length)
        yield [1000 + start % 40_000, *text[at : at + length - 1]]


def ask(prompt: list[int], max_tokens: int = 200, **settings: Any) -> Request:
    """A request without drafts, unless told otherwise."""
    return Request(prompt=tuple(prompt), max_tokens=max_tokens, **{"speculation": False} | settings)


@contextmanager
def decoding(decoder: Decoder, requests: list[Request], *, room: int = 0, **settings: Any) -> Iterator[ContinuousBatch]:
    """A batch of these requests, all prompts read."""
    with ContinuousBatch(decoder, rows=len(requests) + room, **settings) as batch:
        for request in requests:
            batch.join(request)
        while any(row.reading for row in batch.active):
            batch.step()
        batch.step()
        yield batch


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def rate(batch: ContinuousBatch, steps: int = STEPS) -> float:
    """Tokens per second."""
    rows = batch.active
    before = sum(len(row.tokens) for row in rows)
    seconds = timed(lambda: [batch.step() for _ in range(steps)])
    return (sum(len(row.tokens) for row in rows) - before) / seconds


def speeds(decoder: Decoder, text: list[int], number: int, found: Samples) -> None:
    """Numbers of rows, against each other and against a sequence."""
    rates: dict[object, float] = {}
    for count in shuffled(["sequence", "sampled", *COUNTS], number):
        source = prompts(text, 64, number)
        if count == "sequence":
            with decoder.start(next(source), max_tokens=200, speculation=False) as sequence:
                for _ in range(2):
                    sequence.step()
                begun = time.perf_counter()
                for _ in range(STEPS):
                    sequence.step()
                rates[count] = STEPS / (time.perf_counter() - begun)
            continue
        rows, sampling = (8, NUCLEUS) if count == "sampled" else (count, Greedy())
        requests = [ask(next(source), sampling=sampling) for _ in range(rows)]
        with decoding(decoder, requests, prefix_cache_bytes=0) as batch, inside_runtime() as inside:
            begun = time.perf_counter()
            rates[count] = rate(batch)
            share = 1 - inside[0] / (time.perf_counter() - begun)
        if rows == 8:
            found["python_share_sampled" if count == "sampled" else "python_share"] = [share]
    for count in COUNTS:
        found[f"rows{count}_tok_s"] = [rates[count]]
        if count > 1:
            found[f"rows{count}_over_rows1"] = [rates[count] / rates[1]]
    found["row_over_sequence"] = [rates[1] / rates["sequence"]]


@contextmanager
def inside_runtime() -> Iterator[list[float]]:
    """Seconds that are spent in ONNX Runtime's runs, as they add up."""
    real, inside = ort.run, [0.0]

    def clocked(*arguments: Any) -> None:
        begun = time.perf_counter()
        real(*arguments)
        inside[0] += time.perf_counter() - begun

    with mock.patch.object(ort, "run", clocked):
        yield inside


def joining(decoder: Decoder, text: list[int], number: int, found: Samples) -> None:
    """A long prompt joins rows that decode."""
    for beside, name in shuffled([(7, "join_added_steps"), (1, "join_added_steps_beside_one")], number):
        source = prompts(text, 64, number)
        requests = [ask(next(source), 500) for _ in range(beside)]
        newcomer = ask(next(prompts(text, LONG, number)))
        with decoding(decoder, requests, room=1, prefix_cache_bytes=0) as batch:
            plain = statistics.median(timed(batch.step) for _ in range(STEPS))
            begun = time.perf_counter()
            row = batch.join(newcomer)
            waits = []
            while row.reading:
                waits.append(timed(batch.step) / plain - 1)
            seconds = time.perf_counter() - begun
        found[name] = [statistics.median(waits)]
        if beside > 1:
            found[f"{name}_worst"] = [max(waits)]
            found["join_ttft_over_alone"] = [seconds / alone(decoder, newcomer)]


def alone(decoder: Decoder, request: Request) -> float:
    """Seconds to the first token in an empty batch."""
    with ContinuousBatch(decoder, rows=1, prefix_cache_bytes=0) as batch:
        return timed(lambda: first_token(batch, request))


def first_token(batch: ContinuousBatch, request: Request) -> Row:
    """Join, and step until the answer has begun."""
    row = batch.join(request)
    while row.reading:
        batch.step()
    return row


def known(decoder: Decoder, text: list[int], number: int, found: Samples) -> None:
    """The time to the first token of a prompt, the first time and the second."""
    request = ask(next(prompts(text, LONG, number)))
    with ContinuousBatch(decoder, rows=1) as batch:
        miss = timed(lambda: batch.leave(first_token(batch, request)))
        hit = timed(lambda: batch.leave(first_token(batch, request)))
    found["prefix_hit_ttft_ratio"] = [miss / hit]
    found["prefix_hit_ttft_ms"] = [hit * 1e3]


def drafts(decoder: Decoder, text: list[int], number: int, found: Samples) -> None:
    """Rows that speculate, against the same rows without."""
    del text
    for kind, rows in shuffled([("copy", 1), ("copy", 4), ("chat", 1), ("chat", 4), ("chat", 8)], number):
        asked = [decoder.encode_chat(case["prompt"]) for case in PROMPTS if case["kind"] == kind]
        whole = [prompt for _, prompt in zip(range(rows), itertools.cycle(asked), strict=False)]
        rates = {}
        for speculation in shuffled([Speculation(), False], number):
            requests = [ask(prompt, 400, speculation=speculation) for prompt in whole]
            with decoding(decoder, requests) as batch:
                rates[bool(speculation)] = rate(batch, 25)
        found[f"drafts_{kind}_rows{rows}"] = [rates[True] / rates[False]]


def utilisation(decoder: Decoder, text: list[int]) -> float:
    """Of 16 requests with prompts from short to long, in the middle of their answers."""
    requests = [ask(next(prompts(text, length, length)), 300) for length in MIXED]
    with decoding(decoder, requests, prefix_cache_bytes=0) as batch:
        for _ in range(STEPS):
            batch.step()
        return batch.used_bytes / batch.committed_bytes


def sample_bytes(decoder: Decoder, text: list[int]) -> float:
    """Samples share their prompt; strangers do not."""
    held = []
    for samples in (True, False):
        source = prompts(text, LONG, 0)
        same = next(source)
        requests = [ask(same if samples else next(source), sampling=Sampling(seed=seed)) for seed in range(8)]
        with decoding(decoder, requests) as batch:
            held.append(batch.committed_bytes)
    return held[0] / held[1]


if __name__ == "__main__":
    run(arguments(__doc__).json)
