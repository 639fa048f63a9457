"""`seawall generate`: an answer to a prompt, written as it comes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seawall.cli.progress import Progress
from seawall.cli.screen import Screen
from seawall.inference.errors import InvalidSettingError

if TYPE_CHECKING:
    from seawall.inference import Constraint, Decoder, Greedy, Sampling
    from seawall.inference.generate.sequence import Sequence

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

MODEL = "a name that `seawall models list` shows, a .gguf file, or a prepared folder (default: %(default)s)"
DEFAULT = "smollm2-135m"
KV = "of the key/value cache: fp32, int8, int4 (default: fp32; int8 where --speculation drafts for 8 or 4 bits)"


def add_parser(commands: Commands) -> None:
    """Add `generate`."""
    parser = commands.add_parser(
        "generate",
        help="answer a prompt",
        description="Answers a prompt: the argument, or standard input. A pipe gets the answer and nothing else.",
    )
    parser.add_argument("prompt", nargs="?", help="what to answer; - or nothing to read it from standard input")
    parser.add_argument("--system", metavar="TEXT", help="instructions that come before the prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, outside of any conversation")
    add_model(parser)
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    sampling = parser.add_argument_group("how tokens are chosen (default: always the likeliest)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="above 0 to draw them")
    sampling.add_argument("--top-k", type=int, default=0, metavar="N", help="among the N likeliest")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="among the likeliest that make up P")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="among those P as likely as the best")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes a drawn answer repeatable")
    form = parser.add_argument_group("what the answer may look like").add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="JSON that validates against this schema")
    form.add_argument("--regex", metavar="PATTERN", help="a text that matches as a whole")
    form.add_argument("--choice", action="append", metavar="TEXT", help="one of these texts; repeat it for each")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="a sentence of this grammar, in Lark's format")
    parser.set_defaults(run=_generate)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it runs."""
    model = parser.add_argument_group("the model")
    model.add_argument("--model", "-m", default=DEFAULT, help=MODEL)
    model.add_argument("--precision", help="of the weights (default: the model's usual one)")
    model.add_argument("--kv", help=KV)
    model.add_argument("--context", type=int, default=2048, metavar="N", help="most tokens (default: %(default)s)")
    model.add_argument("--threads", type=int, metavar="N", help="default: what affinity and CPU quota allow")
    model.add_argument("--speculation", action="store_true", help="draft tokens: quicker, and the same answer")


def load(options: argparse.Namespace) -> Decoder:
    """The model that the options mean."""
    from seawall.inference import Decoder

    with Progress() as progress:
        return Decoder.load(
            options.model,
            precision=options.precision,
            kv=options.kv,
            context=options.context,
            threads=options.threads,
            speculation="auto" if options.speculation else None,
            progress=progress,
        )


def _generate(options: argparse.Namespace) -> int:
    prompt = _prompt(options.prompt)
    constraint, sampling = _constraint(options), _sampling(options)
    with load(options) as decoder:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        chat = [*system, {"role": "user", "content": prompt}]
        tokens = decoder.encode(prompt) if options.raw else decoder.encode_chat(chat)
        with decoder.start(
            tokens, max_tokens=options.max_tokens, sampling=sampling, stop=options.stop, constraint=constraint
        ) as answer:
            finish = _written(answer)
    if finish == "length" and constraint is not None:
        sys.stderr.write("seawall: the answer is incomplete: it was cut at its limit of tokens; raise --max-tokens\n")
        return 1
    return 0


def _written(answer: Sequence) -> str:
    """Write the answer as it comes; how it ended."""
    begun = time.perf_counter()
    first, read, finish = begun, 0, ""
    with Screen() as screen:
        for step in answer:
            read += step.read
            now = time.perf_counter()
            written = len(answer.tokens)
            if written == 1:
                first = now
            finish = step.finish or finish
            screen.write(step.text)
            if written < 2:
                screen.status(f"{read} of {answer.prompt_tokens} tokens read")
            else:
                screen.status(f"{written} tokens, {(written - 1) / (now - first):.1f} tokens/s")
        further, seconds = len(answer.tokens) - 1, time.perf_counter() - first
        rate = f", then {further / seconds:.1f} tokens/s" if further > 0 and seconds > 0 else ""
        cut = ", cut at its limit" if finish == "length" else ""
        screen.close(f"{len(answer.tokens)} tokens{cut}; the first after {first - begun:.2f} s{rate}")
    return finish


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise InvalidSettingError("there is no prompt: give one as the argument, or on standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidSettingError(f"the prompt is no text in UTF-8: {error.reason} at byte {error.start}") from error


def _sampling(options: argparse.Namespace) -> Greedy | Sampling:
    from seawall.inference import Greedy, Sampling

    if options.temperature == 0:
        return Greedy()
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    settings: Mapping[str, Any] = {name: getattr(options, name) for name in names}
    return Sampling(**settings)


def _constraint(options: argparse.Namespace) -> Constraint | None:
    from seawall.inference import Choice, Grammar, JsonSchema, Regex

    if options.json_schema is not None:
        return JsonSchema(_text(options.json_schema))
    if options.grammar is not None:
        return Grammar(_text(options.grammar))
    if options.regex is not None:
        return Regex(options.regex)
    return None if options.choice is None else Choice(options.choice)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidSettingError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
