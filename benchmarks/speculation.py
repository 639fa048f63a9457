"""Speculative decoding beside plain decoding of the same model, on ten prompts of seven kinds.

In each round every prompt is answered plainly and speculatively by turns of a few tokens, so that a busy neighbour
slows both alike; a speed-up is the ratio of the two rates after the first token, and a figure the mean over prompts of
the medians over rounds. Plain is the decoder as it comes, without the padding that exactness may ask for. Every
speculative answer is compared with that of the same target without drafts: a difference ends the run.

    figure                            what
    TARGET_mean/worst_speedup         greedy; TARGET is fp32 (n-gram and lossless INT4 self-draft), int8 or int4
                                      (n-gram)
    TARGET_KIND_speedup               of one kind of prompt
    sampled_TARGET_mean/worst_speedup temperature 0.8
    int8/int4_draft_acceptance        of self-drafts for fp32, greedy, 4 tokens in every round
    TARGET_tokens_per_pass            tokens decided by a pass of the target
    predicted_over_observed           what the controller promised by what came out, fp32, greedy
    divergence_error                  classic experiment: largest relative error of (1 - a^(k+1)) / (1 - a), k = 3

The int8 and int4 targets keep their cache in int8, so that passes of any number of tokens agree and exactness needs no
padding. With --peers, each in its own process with two threads, against its own plain decoding of the same prompts:

    PEER_mean/worst/KIND_speedup      transformers_lookup (prompt lookup, 4 tokens), transformers_assisted (by a
                                      bfloat16 copy of itself), llamacpp_lookup (prompt lookup, 2 tokens, Q4_1)
    PEER_tok_s, TARGET_tok_s          mean over prompts of the speculative rates, and of ours
    PEER_same_answers                 share of answers that are those of its plain decoding
"""

import json as json_format
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import _peer_models
import numpy as np
from _harness import arguments, print_figures, write_results
from _peer_workers import Peer
from _plot import HEIGHT, LEFT, RIGHT, SVG, TOP, WIDTH, _text

from seawall.inference import Decoder, Greedy, Sampling, models
from seawall.inference.generate.speculation import (
    ModelDraft,
    NGram,
    Speculation,
    SpeculationStatistics,
    expected_tokens,
    verify_drawn,
)

NAME = "smollm2-135m"
PROMPTS = Path(__file__).with_name("speculation_prompts.json")
PLOT = Path(__file__).parents[1] / "docs/img/speculation-divergence.svg"
ROUNDS = 3
QUICK_ROUNDS = 21  # of targets whose answers take half a second: one answer's rate varies by 3 %, and the worst of ten
# medians of nine such rates lies up to 0.02 below what it is in the long run
TOKENS = 96
TURN = 6
PEERS = {  # name of the figures: plain, speculative, form of the model
    "transformers_lookup": ("transformers", "transformers-lookup", "hf"),
    "transformers_assisted": ("transformers", "transformers-assisted", "hf"),
    "llamacpp_lookup": ("llamacpp", "llamacpp-lookup", "q4"),
}
PEER_DISTRIBUTIONS = ("llama-cpp-python", "transformers", "torch")
SAMPLED = Sampling(temperature=0.8, seed=7)
DIVERGENCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
DISTRIBUTIONS = ("onnxruntime", "numpy", "tokenizers")
Rules = Greedy | Sampling


class Answer(NamedTuple):
    """Tokens of an answer, tokens per second after the first, and what speculation did."""

    tokens: list[int]
    rate: float
    speculation: SpeculationStatistics | None


class Ratios(NamedTuple):
    """Speed-ups of every round, and answers, by prompt."""

    speedups: list[list[float]]
    rates: list[list[float]]
    same_as_plain: float


class Case(NamedTuple):
    """A target and how its answers are speculated upon."""

    name: str
    target: Decoder
    speculation: Speculation
    sampling: Rules


def run(json: Path | None, *, peers: bool) -> dict[str, float]:
    """Measure, print, and write what was measured."""
    gguf = models.add(NAME)
    with (
        Decoder.load(NAME, precision="fp32") as fp32,
        Decoder.load(NAME, precision="int8", kv="int8") as int8,
        Decoder.load(NAME, precision="int4", kv="int8") as int4,
        Decoder.load(NAME, precision="int8") as draft8,
        Decoder.load(NAME, precision="int4") as draft4,
    ):
        prompts = [(case["kind"], fp32.encode_chat(case["prompt"])) for case in json_format.loads(PROMPTS.read_text())]
        hybrid = Speculation(drafters=(NGram(), ModelDraft(decoder=draft4)))
        lookup = Speculation(drafters=(NGram(),))
        cases = [
            Case("fp32", fp32, hybrid, Greedy()),
            Case("int8", int8, lookup, Greedy()),
            Case("int4", int4, lookup, Greedy()),
            Case("sampled_fp32", fp32, hybrid, SAMPLED),
            Case("sampled_int8", int8, lookup, SAMPLED),
            Case("sampled_int4", int4, lookup, SAMPLED),
        ]
        figures: dict[str, float] = {}
        samples: dict[str, Any] = {}
        for case in cases:
            figures |= compared(case, prompts, samples)
        for name, drafter in (("int8", draft8), ("int4", draft4)):
            figures[f"{name}_draft_acceptance"] = acceptance(fp32, drafter, prompts)
    figures["predicted_over_observed"] = samples["fp32"]["predicted_over_observed"]
    figures["divergence_error"], samples["divergence"] = divergence_experiment()
    PLOT.parent.mkdir(exist_ok=True)
    PLOT.write_text(picture(samples["divergence"]))
    if peers:
        files = _peer_models.prepared(gguf)
        for name, (plain, speculative, form) in PEERS.items():
            figures |= peer_compared(name, plain, speculative, files[form], prompts, samples)
    print_figures("speculation", figures)
    if json is not None:
        write_results(json, figures, samples, (*DISTRIBUTIONS, *(PEER_DISTRIBUTIONS if peers else ())))
    return figures


def compared(case: Case, prompts: list[tuple[str, list[int]]], samples: dict[str, Any]) -> dict[str, float]:
    """Speed-ups of one case, by prompt and by kind."""
    exact = Speculation(drafters=())
    expected = [answer(case.target, prompt, exact, case.sampling).tokens for _, prompt in prompts]
    ratios: list[list[float]] = [[] for _ in prompts]
    rates: list[list[float]] = [[] for _ in prompts]
    stats: list[SpeculationStatistics] = []
    same_as_plain = 0
    rounds = ROUNDS if case.target.precision == "fp32" else QUICK_ROUNDS
    for number in range(rounds):
        for index, (_, prompt) in enumerate(prompts):
            plain, speculative = raced(case, prompt, plain_first=bool(number % 2))
            if speculative.tokens != expected[index]:
                sys.exit(f"{case.name}: the answer to prompt {index} is not the target's own")
            same_as_plain += plain.tokens == expected[index]
            ratios[index].append(speculative.rate / plain.rate)
            rates[index].append(speculative.rate)
            if speculative.speculation is not None:
                stats.append(speculative.speculation)
    found = summary(case.name, prompts, Ratios(ratios, rates, same_as_plain / (rounds * len(prompts))), samples)
    samples[case.name]["predicted_over_observed"] = statistics.mean(
        s.predicted_speedup / s.observed_speedup for s in stats
    )
    return found | {f"{case.name}_tokens_per_pass": sum(s.tokens for s in stats) / sum(s.rounds for s in stats)}


def peer_compared(
    name: str, plain: str, speculative: str, model: Path, prompts: list[tuple[str, list[int]]], samples: dict[str, Any]
) -> dict[str, float]:
    """Speed-ups of a peer over its own plain decoding, one answer right after the other."""
    ratios: list[list[float]] = [[] for _ in prompts]
    rates: list[list[float]] = [[] for _ in prompts]
    same = 0
    with Peer(name, plain, model) as one, Peer(name, speculative, model) as other:
        for peer in (one, other):
            peer.answer(prompts[0][1], 8)  # warm-up
        for number in range(ROUNDS):
            for index, (_, prompt) in enumerate(prompts):
                found = {}
                for peer in (one, other) if number % 2 else (other, one):
                    found[peer] = peer.answer(prompt, TOKENS)
                ratios[index].append(found[other].rate / found[one].rate)
                rates[index].append(found[other].rate)
                same += found[one].tokens == found[other].tokens
    share = same / (ROUNDS * len(prompts))
    return summary(name, prompts, Ratios(ratios, rates, share), samples) | {f"{name}_same_answers": share}


def summary(
    name: str, prompts: list[tuple[str, list[int]]], found: Ratios, samples: dict[str, Any]
) -> dict[str, float]:
    """Figures of what was measured by prompt; the raw numbers go into `samples`."""
    samples[name] = {
        "speedups": found.speedups,
        "tok_s": found.rates,
        "kinds": [kind for kind, _ in prompts],
        "same_as_unpadded_plain": found.same_as_plain,
    }
    medians = [statistics.median(values) for values in found.speedups]
    kinds = {kind: [m for (k, _), m in zip(prompts, medians, strict=True) if k == kind] for kind, _ in prompts}
    return {
        f"{name}_mean_speedup": statistics.mean(medians),
        f"{name}_worst_speedup": min(medians),
        **{f"{name}_{kind}_speedup": statistics.mean(values) for kind, values in kinds.items()},
        f"{name}_tok_s": statistics.mean(statistics.median(values) for values in found.rates),
    }


def raced(case: Case, prompt: list[int], *, plain_first: bool) -> tuple[Answer, Answer]:
    """The plain and the speculative answer, which advance by turns of `TURN` tokens, and of the rounds they end in."""
    spent = [0.0, 0.0]
    with (
        case.target.start(prompt, max_tokens=TOKENS, sampling=case.sampling) as plain,
        case.target.start(
            prompt, max_tokens=TOKENS, sampling=case.sampling, speculation=case.speculation
        ) as speculative,
    ):
        pair = (plain, speculative)
        for sequence in pair:
            while not sequence.tokens:
                sequence.step()
        order = [0, 1] if plain_first else [1, 0]
        while not all(sequence.finished for sequence in pair):
            for which in order:
                sequence = pair[which]
                goal = len(sequence.tokens) + TURN
                begun = time.perf_counter()
                while not sequence.finished and (len(sequence.tokens) < goal or sequence._decided):
                    sequence.step()
                spent[which] += time.perf_counter() - begun
            order.reverse()
        return (
            Answer(list(plain.tokens), (len(plain.tokens) - 1) / spent[0], None),
            Answer(list(speculative.tokens), (len(speculative.tokens) - 1) / spent[1], speculative.speculation),
        )


def answer(target: Decoder, prompt: list[int], speculation: Speculation | None, sampling: Rules) -> Answer:
    """One answer and its rate after the first token."""
    with target.start(prompt, max_tokens=TOKENS, sampling=sampling, speculation=speculation) as sequence:
        while not sequence.tokens:
            sequence.step()
        begun = time.perf_counter()
        for _ in sequence:
            pass
        seconds = time.perf_counter() - begun
        return Answer(list(sequence.tokens), (len(sequence.tokens) - 1) / seconds, sequence.speculation)


def acceptance(target: Decoder, draft: Decoder, prompts: list[tuple[str, list[int]]]) -> float:
    """Share of the tokens of four-token self-drafts that the target accepts, greedy."""
    fixed = Speculation(drafters=(ModelDraft(decoder=draft),), length=4)
    found = [answer(target, prompt, fixed, Greedy()).speculation for _, prompt in prompts]
    return sum(s.accepted for s in found if s) / sum(s.drafted for s in found if s)


def divergence_experiment(length: int = 3, rounds: int = 20_000) -> tuple[float, list[dict[str, float]]]:
    """Tokens per round of the rejection rule against the closed form, for drafts at a known distance.

    A draft at divergence d moves that much probability from the likelier half of the tokens to the others, so
    the total variation is d, and a drafted token is accepted with 1 - d.
    """
    rng = np.random.default_rng(0)
    target = np.sort(rng.dirichlet(np.full(64, 0.3)))[::-1]
    half = int(np.searchsorted(target.cumsum(), 0.6)) + 1
    table = []
    for divergence in DIVERGENCES:
        draft = target.copy()
        draft[:half] *= 1 - divergence / target[:half].sum()
        draft[half:] += divergence / (64 - half)
        decided = 0
        for _ in range(rounds):
            drafted = rng.choice(64, length, p=draft).tolist()
            decided += len(verify_drawn(drafted, lambda _, q=draft: q, lambda _: target, rng))  # type: ignore[misc]
        accepted = float(np.minimum(draft, target).sum())
        formula = expected_tokens(accepted, length)
        table.append(
            {"divergence": divergence, "acceptance": accepted, "measured": decided / rounds, "formula": formula}
        )
    return max(abs(row["measured"] / row["formula"] - 1) for row in table), table


def picture(table: list[dict[str, float]]) -> str:
    """Tokens per round by divergence: dots measured, line closed form."""

    def x(divergence: float) -> float:
        return LEFT + divergence / 0.5 * (WIDTH - LEFT - RIGHT)

    def y(tokens: float) -> float:
        return HEIGHT - 40 - tokens / 4 * (HEIGHT - TOP - 40)

    curve = [d / 1000 for d in range(0, 501, 5)]
    line = " ".join(f"{x(d):.1f},{y(expected_tokens(1 - d, 3)):.1f}" for d in curve)
    parts = [
        SVG,
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 20, "Tokens per round by divergence of draft and target, 3 drafted", weight="600"),
    ]
    for tokens in range(5):
        parts.append(f'<path d="M{LEFT} {y(tokens):.1f}H{WIDTH - RIGHT}" stroke="#e3e6ea"/>')
        parts.append(_text(LEFT - 8, y(tokens) + 4, str(tokens), anchor="end"))
    parts += [_text(x(d), HEIGHT - 22, f"{d:g}", anchor="middle") for d in (0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    parts.append(f'<polyline points="{line}" fill="none" stroke="#0b6e99" stroke-width="2"/>')
    dots = [f'<circle cx="{x(r["divergence"]):.1f}" cy="{y(r["measured"]):.1f}" r="4" fill="#b5651d"/>' for r in table]
    key = WIDTH - RIGHT + 12
    legend = [
        _text(key + 22, TOP + 16, "closed form"),
        f'<path d="M{key} {TOP + 12}h16" stroke="#0b6e99" stroke-width="2"/>',
        _text(key + 22, TOP + 36, "measured"),
        f'<circle cx="{key + 8}" cy="{TOP + 32}" r="4" fill="#b5651d"/>',
    ]
    return "\n".join([*parts, *dots, *legend, "</svg>", ""])


if __name__ == "__main__":
    options = arguments(__doc__)
    run(options.json, peers=options.peers)
