"""A long check that speculation never changes an answer; the full run takes some hours.

    python benchmarks/soak_speculation.py --tokens 10000 --draws 4000000 --seed 1

Both acceptance rules draw so many tokens through whole rounds, over a small model of one token of memory whose
distribution is known, under temperature, top_k, top_p, min_p and penalties. Rounds begin at each token in turn, so
every row of the transition matrix is tested, with no exception. Each of the ten p-values of chi-square is printed,
whatever it is. A right program gives a p below 0.001 in one of ten tests once in a hundred runs: that ends it with exit
code 1, and repeating it until it passes would prove nothing.

Then every target precision with every drafter writes so many tokens greedily, and a tenth of them sampled, and must
give the tokens that the target gives without drafts. A difference ends it with exit code 1.
"""

import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _harness import print_figures, write_results

from seawall.inference import Decoder, Greedy, Penalties, Sampling, models
from seawall.inference.generate.choosing import Chooser
from seawall.inference.generate.speculation import (
    Controller,
    Corpus,
    CorpusDraft,
    Costs,
    Drafter,
    ModelDraft,
    NGram,
    Pace,
    Proposal,
    Speculation,
    Speculator,
    sample,
)

Table = np.ndarray[Any, Any]
NAME = "smollm2-135m"
PROMPTS = Path(__file__).with_name("speculation_prompts.json")
TARGETS = (
    ("fp32", "fp32"),
    ("int8", "fp32"),
    ("int8", "int8"),
    ("int8-block32", "fp32"),
    ("int4", "fp32"),
    ("int4", "int8"),
)
RULES = {
    "temperature": (Sampling(temperature=0.8), None),
    "top_k": (Sampling(top_k=3), None),
    "top_p": (Sampling(temperature=1.3, top_p=0.8), None),
    "min_p": (Sampling(min_p=0.2), None),
    "penalties": (Sampling(), Penalties(repetition=1.5)),
}
VOCABULARY = 6
LEAST = 0.001  # of ten tests of something right, one is below this once in a hundred runs


def check_tokens(tokens: int) -> int:
    """Every target with every drafter, greedy and sampled; how many tokens were compared."""
    compared = 0
    with (
        Decoder.load(NAME, precision="int8") as int8,
        Decoder.load(NAME, precision="int4") as int4,
    ):
        prompts = [int8.encode_chat(case["prompt"]) for case in json.loads(PROMPTS.read_text())]
        corpus = Corpus([int8.encode(Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8"))])
        drafters: dict[str, tuple[Drafter, ...]] = {
            "ngram": (NGram(),),
            "corpus": (CorpusDraft(corpus=corpus),),
            "int8": (ModelDraft(decoder=int8),),
            "int4": (ModelDraft(decoder=int4),),
            "int8 with its own cache": (ModelDraft(decoder=int8, share=False),),
            "hybrid": (NGram(), ModelDraft(decoder=int4)),
        }
        for precision, kv in TARGETS:
            with Decoder.load(NAME, precision=precision, kv=kv) as target:
                target._ends = frozenset()  # write on past the end of an answer
                for sampling in (Greedy(), Sampling(temperature=0.8, top_p=0.95, seed=1)):
                    wanted = tokens if isinstance(sampling, Greedy) else -(-tokens // 10)
                    compared += compare(f"{precision}, {kv} cache", target, sampling, prompts, drafters, wanted)
    return compared


def compare(
    name: str,
    target: Decoder,
    sampling: Greedy | Sampling,
    prompts: list[list[int]],
    drafters: dict[str, tuple[Drafter, ...]],
    tokens: int,
) -> int:
    """One target and kind of sampling: the first difference ends the program."""
    each = -(-tokens // len(prompts))
    alone = [written(target, prompt, Speculation(drafters=()), sampling, each) for prompt in prompts]
    for label, drafts in drafters.items():
        begun = time.monotonic()
        for index, prompt in enumerate(prompts):
            # A fixed length drafts even where it does not pay, and so verifies most.
            speculation = Speculation(drafters=drafts, length=5 if index % 2 else None)
            found = written(target, prompt, speculation, sampling, each)
            if found != alone[index]:
                place = next(i for i, (a, b) in enumerate(zip(found, alone[index], strict=False)) if a != b)
                sys.exit(f"{name}, {label}, prompt {index}: token {place} differs")
        kind = "greedy" if isinstance(sampling, Greedy) else "sampled"
        count = sum(map(len, alone))
        print(f"{name:>24}  {kind:>7}  {label:<24} {count:>7,} tokens equal  {time.monotonic() - begun:5.0f} s")
    return len(drafters) * sum(map(len, alone))


def written(
    target: Decoder, prompt: list[int], speculation: Speculation, sampling: Greedy | Sampling, count: int
) -> list[int]:
    """`count` tokens of one answer."""
    with target.start(prompt, max_tokens=count, sampling=sampling, speculation=speculation) as sequence:
        for _ in sequence:
            pass
        return sequence.tokens


class Chain:
    """A target of one token of memory."""

    def __init__(self, logits: np.ndarray[Any, Any]) -> None:
        self.length = 0
        self._logits = logits

    def extend(self, tokens: list[int], options: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits after each of the tokens."""
        self.length += len(tokens)
        rows: np.ndarray[Any, np.dtype[np.float32]] = self._logits[tokens]
        return rows

    def rewind(self, length: int) -> None:
        """Forget."""
        self.length = length


class Wanderer:
    """Drafts from another chain: draws, and says from what, or chooses as the target would with its logits."""

    name = "wanderer"
    chances = (0.5,)

    def __init__(self, probabilities: np.ndarray[Any, Any], seed: int) -> None:
        self._probabilities = probabilities
        self._logits = np.log(probabilities).astype(np.float32)
        self._rng = np.random.default_rng(seed)
        self._last = 0

    def cost(self) -> float:
        """Free."""
        return 0.0

    def start(self, prompt: Any, host: Any) -> "Wanderer":
        """The same one for every sequence; it learns nothing."""
        return self

    def propose(self, turn: Any) -> Any:
        """A walk."""
        last, drafted = self._last, list[int]()
        for _ in range(turn.most):
            whole = self._probabilities[last]
            chosen = None if turn.drawn else turn.chooser.choose(self._logits[last], drafted)
            last = int(sample(whole, self._rng)) if chosen is None else chosen
            drafted.append(last)
            yield Proposal(last, 0, whole if turn.drawn else None)

    def extend(self, token: int) -> None:
        """Where the walk begins."""
        self._last = token

    def close(self) -> None:
        """Nothing."""


def check_draws(draws: int, seed: int) -> dict[str, float]:
    """Transitions of a chain under every rule, against what they should be; the p-value of each."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.2, (VOCABULARY, VOCABULARY)).astype(np.float32)
    draft = np.stack([rng.dirichlet(np.ones(VOCABULARY)) for _ in range(VOCABULARY)])
    found = {}
    for rule, (name, (sampling, penalties)) in itertools.product(("drawn", "chosen"), RULES.items()):
        begun = time.monotonic()
        counts, expected, accepted = transitions(rule, replace(sampling, seed=seed), penalties, logits, draft, draws)
        p = found[f"{rule}_{name}_p"] = p_value(counts, expected)
        print(
            f"{rule:>7}  {name:<12} {int(counts.sum()):>9,} draws, {int(counts.sum(1).min()):>7,} after the rarest, "
            f"{accepted:.3f} of drafts accepted, p = {p:.4f}  {time.monotonic() - begun:5.0f} s",
            flush=True,
        )
    if min(found.values()) < LEAST:
        sys.exit("the draws are not distributed as the target's")
    return found


def transitions(
    rule: str, sampling: Sampling, penalties: Penalties | None, logits: Table, draft: Table, draws: int
) -> tuple[Table, Table, float]:
    """How often each token followed each, with what probability it should, and the share of accepted drafts."""
    chooser = Chooser(sampling, penalties, range(VOCABULARY) if penalties else [])
    expected = np.stack([chooser.probabilities(row) for row in logits])
    settings = Speculation(drafters=(Wanderer(draft, sampling.seed or 0),), length=3, rule=rule)  # type: ignore[arg-type]
    drafting = settings.drafters[0].start([], None)  # type: ignore[arg-type]
    controller = Controller([(0.5,)], Costs(Pace(1, 1, 0.1), [0.0]), most=3, length=3)
    speculator = Speculator(Chain(logits), chooser, [drafting], controller, settings)
    counts = [[0] * VOCABULARY for _ in range(VOCABULARY)]
    done = 0
    for start in itertools.cycle(range(VOCABULARY)):
        if done >= draws:
            break
        drafting.extend(start)
        last = start
        for token in speculator.round(start, 4, None):
            counts[last][token] += 1
            last = token
            done += 1
    return np.array(counts, float), expected, speculator.statistics().acceptance_rate


def p_value(counts: Table, expected: Table) -> float:
    """Of chi-square over all rows, by the normal approximation of Wilson and Hilferty."""
    means = expected * counts.sum(1, keepdims=True)
    if counts[means == 0].any():
        return 0.0
    likely = means > 0
    statistic = float(((counts[likely] - means[likely]) ** 2 / means[likely]).sum())
    freedom = int(likely.sum()) - len(counts)
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=500, help="of every target with every drafter; 0: none")
    parser.add_argument("--draws", type=int, default=100_000, help="of every rule")
    parser.add_argument("--seed", type=int, default=0, help="of the small model, its drafts and the draws")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures here")
    parser.add_argument("--peers", action="store_true", help="taken like any benchmark does; there are none")
    options = parser.parse_args()
    models.add(NAME)
    figures = {"draws_per_rule": float(options.draws), **check_draws(options.draws, options.seed)}
    figures["tokens_compared"] = float(check_tokens(options.tokens)) if options.tokens else 0.0
    print_figures("soak: every answer was the target's own", figures)
    if options.json:
        write_results(options.json, figures, {})


if __name__ == "__main__":
    main()
