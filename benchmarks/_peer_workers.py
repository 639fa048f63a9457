"""Peers of `decode.py` and `speculation.py`: each runs in a process of its own and works only when it is asked to.

So peers share nothing with what is measured, and can take turns with it. A process reads one JSON line per answer,
{"prompt": [...], "tokens": n}, and writes one: the tokens, and after how many seconds each came.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from os import environ
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from _peer_models import OFFLINE, THREADS

CONTEXT = 1024
ENDS = frozenset({0, 2})
Piece = tuple[float, list[int]]
"""When tokens came, by `perf_counter`, and which."""
Answer = Callable[[list[int], int], Iterator[Piece]]
"""Given a prompt and a number of tokens: those tokens, greedy, as they come."""


class Measured(NamedTuple):
    """Tokens of an answer, seconds to the first, and tokens per second after it."""

    tokens: list[int]
    first: float
    rate: float


class Peer:
    """A peer in its own process, idle between two answers."""

    def __init__(self, name: str, kind: str, model: Path) -> None:
        self.name = name
        command = [sys.executable, __file__, kind, str(model)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**environ, **OFFLINE}
        )
        self._line()  # ready

    def answer(self, prompt: list[int], tokens: int) -> Measured:
        """One greedy answer; it may end earlier, at the model's end token."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        reply = self._line()
        times: list[float] = reply["times"]
        later = sum(moment > times[0] for moment in times)  # a speculating peer's first piece may hold several
        return Measured(reply["tokens"], times[0], later / (times[-1] - times[0]) if later else 0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the peer {self.name} has died; the lines above say why")
        found: dict[str, Any] = json.loads(line)
        return found


def genai(model: str) -> Answer:
    """onnxruntime-genai, one token a call."""
    import onnxruntime_genai as og

    loaded = og.Model(model)

    def answer(prompt: list[int], tokens: int) -> Iterator[Piece]:
        settings = og.GeneratorParams(loaded)
        settings.set_search_options(max_length=min(CONTEXT, len(prompt) + tokens), do_sample=False)
        generator = og.Generator(loaded, settings)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
            yield time.perf_counter(), [int(generator.get_next_tokens()[0])]

    return answer


def llamacpp(model: str, *, lookup: int = 0) -> Answer:
    """llama.cpp through its Python binding; `lookup`: tokens that its prompt lookup drafts."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(num_pred_tokens=lookup) if lookup else None
    loaded = Llama(
        model, n_ctx=CONTEXT, n_threads=THREADS, n_threads_batch=THREADS, draft_model=draft, logits_all=bool(lookup),
        verbose=False,
    )  # fmt: skip

    def answer(prompt: list[int], tokens: int) -> Iterator[Piece]:
        loaded.reset()  # it would start from what an earlier prompt has in common
        for token, _ in zip(loaded.generate(prompt, temp=0.0), range(tokens), strict=False):
            yield time.perf_counter(), [int(token)]
            if token in ENDS:
                return

    return answer


def transformers(model: str, *, assistant: str = "", **settings: Any) -> Answer:
    """Hugging Face's library over torch in float32; `assistant`: the dtype of a second copy that drafts."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(THREADS)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if assistant:
        settings["assistant_model"] = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, assistant))

    class Timed(BaseStreamer):  # type: ignore[misc]  # no types of its own
        """Notes when tokens come; the first piece is the prompt."""

        def __init__(self) -> None:
            self.pieces: list[Piece] = []

        def put(self, value: Any) -> None:
            self.pieces.append((time.perf_counter(), value.flatten().tolist()))

        def end(self) -> None:
            """Nothing is held back."""

    def answer(prompt: list[int], tokens: int) -> Iterator[Piece]:
        timed = Timed()
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            loaded.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=2,
                streamer=timed, **settings,
            )  # fmt: skip
        yield from timed.pieces[1:]

    return answer


KINDS: dict[str, Callable[[str], Answer]] = {
    "genai": genai,
    "llamacpp": llamacpp,
    "llamacpp-lookup": lambda model: llamacpp(model, lookup=2),  # what its documentation names for a CPU
    "transformers": transformers,
    "transformers-lookup": lambda model: transformers(model, prompt_lookup_num_tokens=4),
    "transformers-assisted": lambda model: transformers(model, assistant="bfloat16"),
}


def work(kind: str, model: str) -> None:
    """What a peer's process does until its input ends."""
    results = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints
    answer = KINDS[kind](model)
    print(json.dumps({"ready": kind}), file=results, flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        begun = time.perf_counter()
        times: list[float] = []
        found: list[int] = []
        for came, tokens in answer(wanted["prompt"], wanted["tokens"]):
            times += [came - begun] * len(tokens)
            found += tokens
        print(json.dumps({"times": times, "tokens": found}), file=results, flush=True)


if __name__ == "__main__":
    work(*sys.argv[1:])
