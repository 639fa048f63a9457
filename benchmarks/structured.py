"""What a constraint costs and gains: masks, compilation, and tokens per second of the same record, int8 weights.

The ways to answer take turns within each round, in a new order; figures are medians over rounds.

    figure                       unit
    trie_ms                      reading the vocabulary, once per decoder
    compile_us, start_us         the first matcher of a schema, and every further one
    mask_us, mask_max_us         allowed tokens of one position, over one answer
    forced_us                    finding out what is forced, at one position
    plain_tok_s                  an unconstrained answer
    schema_tok_s                 an answer under a schema, one token a pass
    schema_drafted_tok_s         the same answer, what is forced drafted
    logprobs_tok_s               unconstrained, with the five likeliest tokens of each position
    schema_over_plain, schema_drafted_over_schema, logprobs_over_plain
"""

import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from _harness import arguments, print_figures, write_results

from seawall.inference import Decoder, JsonSchema, models
from seawall.inference.generate import grammars
from seawall.inference.generate.speculation import Speculation

ROUNDS = 15
QUESTION = (
    "Write a JSON record for the customer Anna Schmidt of Berlin, Germany, born 12 May 1990, living in "
    "Lindenstrasse 5, with 12 orders."
)


def text(most: int) -> dict[str, Any]:
    """A string that ends."""
    return {"type": "string", "maxLength": most}


def record(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these properties and no other."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


ADDRESS = record({"street": text(30), "city": text(20), "country": {"enum": ["Germany", "France", "Italy", "Spain"]}})
SCHEMA = record(
    {
        "first_name": text(20),
        "last_name": text(20),
        "date_of_birth": {"type": "string", "format": "date"},
        "postal_address": ADDRESS,
        "is_customer": {"type": "boolean"},
        "number_of_orders": {"type": "integer", "minimum": 0, "maximum": 9999},
    }
)


def run(json: Path | None) -> dict[str, float]:
    """Measure, print, and write what was measured."""
    models.add("smollm2-135m")
    with Decoder.load("smollm2-135m", precision="int8") as decoder:
        samples = matching(decoder) | answering(decoder)
    figures = {name: statistics.median(values) for name, values in samples.items()}
    figures["mask_max_us"] = max(samples["mask_us"])
    for name, over in (("schema", "plain"), ("schema_drafted", "schema"), ("logprobs", "plain")):
        pairs = zip(samples[f"{name}_tok_s"], samples[f"{over}_tok_s"], strict=True)
        figures[f"{name}_over_{over}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    print_figures("structured", figures)
    if json is not None:
        write_results(json, figures, samples, ("llguidance", "onnxruntime", "numpy"))
    return figures


def matching(decoder: Decoder) -> dict[str, list[float]]:
    """The constraint alone, along one answer."""
    found: dict[str, list[float]] = {name: [] for name in ("trie_ms", "compile_us", "start_us", "mask_us", "forced_us")}
    constraint, words = JsonSchema(SCHEMA), decoder._words
    found["trie_ms"].append(1e3 * seconds(lambda: grammars._Compiler(words)))
    constraint.matcher(words)
    for number in range(ROUNDS):
        other = JsonSchema(SCHEMA | {"title": str(number)})
        found["compile_us"].append(1e6 * seconds(partial(other.matcher, words)))
        found["start_us"].append(1e6 * seconds(partial(constraint.matcher, words)))
    tokens = answer(decoder, constraint=constraint, speculation=False)[1]
    matcher = constraint.matcher(words)
    for token in tokens[:-1]:
        found["mask_us"].append(1e6 * seconds(matcher.allowed))
        found["forced_us"].append(1e6 * seconds(matcher.forced))
        matcher.consume(token)
    return found


def answering(decoder: Decoder) -> dict[str, list[float]]:
    """Tokens per second after the first token."""
    ways: dict[str, dict[str, Any]] = {
        "plain": {"speculation": False},
        "schema": {"speculation": False, "constraint": JsonSchema(SCHEMA)},
        "schema_drafted": {"speculation": Speculation(), "constraint": JsonSchema(SCHEMA)},
        "logprobs": {"speculation": False, "logprobs": 5},
    }
    found: dict[str, list[float]] = {f"{name}_tok_s": [] for name in ways}
    for number in range(ROUNDS + 1):
        for name in random.Random(number).sample(sorted(ways), len(ways)):
            rate = answer(decoder, **ways[name])[0]
            if number:  # the first round warms up, and lets speculation measure the decoder
                found[f"{name}_tok_s"].append(rate)
    return found


def answer(decoder: Decoder, **settings: Any) -> tuple[float, list[int]]:
    """Tokens per second after the first, and the tokens."""
    with decoder.start(decoder.encode_chat(QUESTION), max_tokens=96, **settings) as sequence:
        while not sequence.tokens:
            sequence.step()
        begun, first = time.perf_counter(), len(sequence.tokens)
        for _ in sequence:
            pass
        return (len(sequence.tokens) - first) / (time.perf_counter() - begun), sequence.tokens


def seconds(work: Any) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    run(arguments(__doc__).json)
