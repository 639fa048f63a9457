"""`seawall bench-model`: how fast a model answers on this machine, and what it takes."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seawall.cli.generate import DEFAULT, KV, MODEL, load
from seawall.cli.progress import Progress

if TYPE_CHECKING:
    from seawall.inference import Decoder
    from seawall.inference.generate.speculation import Speculation, SpeculationStatistics

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_QUESTION = "Why is the sea salty? Explain it in a few sentences."
_COPY = "Repeat this text word for word:\n\n"
_COPIED = 80  # tokens
_LONGEST = 6  # characters of a token, on average


def add_parser(commands: Commands) -> None:
    """Add `bench-model`."""
    parser = commands.add_parser(
        "bench-model",
        help="measure how fast a model answers, and what it takes",
        description="Measures a model on this machine: medians over rounds in which what is compared takes turns.",
    )
    parser.add_argument("model", nargs="?", default=DEFAULT, help=MODEL)
    parser.add_argument("--precision", help="of the weights (default: the model's usual one)")
    parser.add_argument("--kv", help=KV)
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="most tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: what affinity and CPU quota allow")
    parser.add_argument("--speculation", action="store_true", help="draft with the same model in fewer bits as well")
    parser.add_argument("--prompt-tokens", type=_count, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--tokens", type=_count, default=128, metavar="N", help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=_count, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write figures and samples to FILE, or print nothing else"
    )
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    with load(options) as decoder, Progress() as progress:
        results = measured(decoder, options, progress)
    text = json.dumps(results, indent=1) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
        return 0
    if options.json is not None:
        Path(options.json).write_text(text, encoding="utf-8")
    sys.stdout.write(table(results))
    return 0


def measured(decoder: Decoder, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """What runs, figures, and the samples behind them."""
    from seawall.inference.quality.costs import file_bytes, fresh_costs
    from seawall.inference.runtime import ort

    progress("load in a fresh process", 0.0)
    load_seconds, memory = fresh_costs(decoder.folder, text=True, threads=options.threads)
    samples, statistics_of = _rounds(decoder, options, progress)
    figures: dict[str, float] = {
        "load_s": load_seconds,
        "memory_mb": memory / 1e6,
        "files_mb": file_bytes(decoder.folder) / 1e6,
        "cache_bytes_per_token": decoder.cache_bytes_per_token,
        **{name: statistics.median(values) for name, values in samples.items() if values},
    }
    for kind, found in statistics_of.items():
        if f"{kind}_tok_s" in figures:
            pairs = zip(samples[f"{kind}_drafted_tok_s"], samples[f"{kind}_tok_s"], strict=True)
            figures[f"{kind}_speedup"] = statistics.median(drafted / plain for drafted, plain in pairs)
        figures[f"{kind}_acceptance"] = found.acceptance_rate
    return {
        "model": decoder.name,
        "precision": decoder.precision,
        "kv": decoder.kv,
        "threads": decoder.threads,
        "onnxruntime": ort.version,
        "prompt_tokens": len(_text(decoder, options)),
        "answer_tokens": options.tokens,
        "rounds": options.rounds,
        "figures": figures,
        "samples": samples,
    }


def _text(decoder: Decoder, options: argparse.Namespace) -> list[int]:
    from seawall.inference.quality import evaluation_text

    tokens = min(options.prompt_tokens, decoder.context - 1)
    return decoder.encode(evaluation_text()[: _LONGEST * tokens])[:tokens]


def _rounds(
    decoder: Decoder, options: argparse.Namespace, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, SpeculationStatistics]]:
    from seawall.inference.generate.speculation import Speculation

    drafting = decoder.speculation or Speculation()
    text = _text(decoder, options)
    room = max(1, decoder.context - options.tokens)
    asked = {"chat": _QUESTION, "copy": _COPY + decoder.decode(text[:_COPIED])}
    prompts = {kind: decoder.encode_chat(question)[-room:] for kind, question in asked.items()}
    ways: list[tuple[str, list[int], Speculation | None]] = [("first", text, None)]
    for kind, prompt in prompts.items():
        ways += [(f"{kind}_tok_s", prompt, None), (f"{kind}_drafted_tok_s", prompt, drafting)]
    samples: dict[str, list[float]] = {"ttft_s": [], "prefill_tok_s": [], **{name: [] for name, *_ in ways[1:]}}
    seen: dict[str, SpeculationStatistics] = {}
    for number in range(options.rounds + 1):  # the first warms up, and lets speculation measure the decoder
        order = random.Random(number).sample(ways, len(ways))
        for place, (name, prompt, speculation) in enumerate(order):
            done = (number + place / len(ways)) / (options.rounds + 1)
            progress(f"round {number}" if number else "warm-up", done)
            if name == "first":
                seconds = _first(decoder, prompt)
                found = {"ttft_s": seconds, "prefill_tok_s": len(prompt) / seconds}
            else:
                rate, told = _answer(decoder, prompt, options.tokens, speculation)
                found = {} if rate is None else {name: rate}
                if told is not None:
                    seen[name.partition("_")[0]] = told
            if number:
                for figure, value in found.items():
                    samples[figure].append(value)
    return samples, seen


def _first(decoder: Decoder, prompt: list[int]) -> float:
    """Seconds to the first token."""
    begun = time.perf_counter()
    with decoder.start(prompt, max_tokens=1, speculation=False) as answer:
        for _ in answer:
            pass
    return time.perf_counter() - begun


def _answer(
    decoder: Decoder, prompt: list[int], tokens: int, speculation: Speculation | None
) -> tuple[float | None, SpeculationStatistics | None]:
    """Tokens per second after the first, None if there is no second one; and what speculation did."""
    with decoder.start(prompt, max_tokens=tokens, speculation=speculation or False) as answer:
        while not answer.tokens:
            answer.step()
        begun = time.perf_counter()
        for _ in answer:
            pass
        seconds, further = time.perf_counter() - begun, len(answer.tokens) - 1
        return further / seconds if further else None, answer.speculation


def table(results: dict[str, Any]) -> str:
    """The same for people."""
    figures, samples = results["figures"], results["samples"]

    def spread(name: str) -> str:
        values = samples[name]
        return f"{min(values):.3g} to {max(values):.3g}" if len(values) > 1 else ""

    rows = [
        ("load, in a fresh process", f"{figures['load_s']:.2f} s", ""),
        ("memory of that process", f"{figures['memory_mb']:,.0f} MB", f"files {figures['files_mb']:,.0f} MB"),
        ("key/value cache", f"{figures['cache_bytes_per_token']:,} bytes a token", ""),
        (f"first token, after {results['prompt_tokens']}", f"{figures['ttft_s']:.3g} s", spread("ttft_s")),
        ("prefill", f"{figures['prefill_tok_s']:,.0f} tokens/s", spread("prefill_tok_s")),
    ]
    for kind, told in (("chat", "an answer"), ("copy", "copying a text")):
        for name, how in ((f"{kind}_tok_s", told), (f"{kind}_drafted_tok_s", "  with speculation")):
            if name in figures:
                rows.append((how, f"{figures[name]:,.1f} tokens/s", spread(name)))
        if f"{kind}_speedup" in figures:
            kept = f"{figures[f'{kind}_acceptance']:.2f} of the drafts accepted"
            rows.append(("  gain", f"{figures[f'{kind}_speedup']:.2f} times", kept))
    what = ", ".join(
        (
            f"{results['model']} in {results['precision']}",
            f"{results['kv']} cache",
            f"{results['threads']} threads",
            f"onnxruntime {results['onnxruntime']}",
            f"medians of {results['rounds']} rounds",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = (f"{label:<{widths[0]}}  {value:>{widths[1]}}  {more}".rstrip() for label, value, more in rows)
    return what + "\n\n" + "\n".join(lines) + "\n"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number
