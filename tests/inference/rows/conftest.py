"""A tiny model whose rows are bitwise, or padded, by its cache; and the answers of single sequences to compare with."""

from dataclasses import replace

import numpy as np
import pytest

from seawall.inference import Decoder, Penalties, Sampling, Speculation
from seawall.inference.generate.rows import ContinuousBatch, Request
from seawall.inference.generate.speculation import Proposal
from tests.inference import tiny

CONTEXT = 1000


@pytest.fixture(scope="session", params=["fp32", "int8"])
def model(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("rows")
    path = tiny.write(base / "tiny.gguf", context_length=CONTEXT)
    with Decoder.load(path, cache_dir=base, context=CONTEXT, threads=1, kv=request.param) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def alone(model):
    """The tokens of a request that has the decoder to itself."""
    known = {}

    def answer(request):
        key = repr(request), request.prompt
        if key not in known:
            with model.start(
                request.prompt,
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                penalties=request.penalties,
                stop=request.stop,
                constraint=request.constraint,
                logprobs=request.logprobs,
                speculation=request.speculation,
            ) as sequence:
                known[key] = list(sequence)
        return known[key]

    return answer


def ask(prompt, max_tokens=8, **settings):
    return Request(prompt=tuple(prompt), max_tokens=max_tokens, **{"speculation": False} | settings)


class Endless:
    """A constraint that lets no answer end before its limit."""

    def matcher(self, vocabulary):
        self.mask = np.arange(vocabulary.size) > 2  # the first three are control tokens
        return self

    def allowed(self):
        return self.mask

    def consume(self, token):
        return True

    def rollback(self, tokens):
        pass

    def forced(self):
        return ()


ENDLESS = Endless()


class Guesses:
    """A drafter that knows an answer, but for every `wrong`th token of it."""

    chances = (0.6,)
    name = "guesses"

    def __init__(self, answer, wrong):
        self.answer, self.wrong = answer, wrong

    def cost(self):
        return 0.0

    def start(self, prompt, host):
        return Guessing(self)


class Guessing:
    def __init__(self, drafter):
        self.drafter, self.known = drafter, 0

    def propose(self, turn):
        for place, token in enumerate(self.drafter.answer[self.known :], self.known):
            yield Proposal(3 if place % self.drafter.wrong == 0 else token)

    def extend(self, token):
        self.known += 1

    def close(self):
        pass


def guessed(alone, request, *, wrong=4, **settings):
    """The same request, drafted for by somebody who nearly knows the answer."""
    plain = replace(request, speculation=Speculation(drafters=()))
    answer = [step.token for step in alone(plain) if step.token is not None]
    return replace(request, speculation=Speculation(drafters=[Guesses(answer, wrong)], **settings))


def text(length, seed=0):
    return np.random.default_rng(seed).integers(3, len(tiny.TOKENS), length).tolist()


def content(steps):
    """What a user sees, to the last bit of the logprobs; not how many steps read the prompt."""
    return [step._replace(read=0) for step in steps if step.token is not None]


def answers(batch, requests):
    """Join all, step until nobody is left; the steps of each that handed out a token, or its error."""
    rows = [batch.join(request) for request in requests]
    return drain(batch, rows)


def drain(batch, rows):
    found = {id(row): [] for row in rows}
    while batch.rows_in_use:
        for advance in batch.step():
            if id(advance.row) in found:
                found[id(advance.row)] += [advance.error] if advance.error else advance.steps
    return [[step for step in found[id(row)] if isinstance(step, Exception) or step.token is not None] for row in rows]


REQUESTS = [
    ask(text(5), logprobs=2),
    ask(text(130, 1), 20, sampling=Sampling(seed=1), logprobs=2),
    ask(text(1, 2), logprobs=2),
    ask(text(257, 3), 12, sampling=Sampling(seed=2, top_k=5), logprobs=2),
    ask(text(20, 4), 20, penalties=Penalties(presence=0.5, repetition=1.3), logprobs=2),
    ask(text(258, 5), 9, logprobs=2),
    ask(text(40, 6), 25, stop=("ab", "h"), sampling=Sampling(seed=5), logprobs=2),
    ask(text(30, 7) * 2, 20, speculation=Speculation(length=4), logprobs=2),
    ask(text(30, 8) * 2, 20, speculation=Speculation(), sampling=Sampling(seed=6), logprobs=2),
    ask(text(1, 9), 20, speculation=Speculation(length=2), sampling=Sampling(seed=7), logprobs=2),
]


def batch_page(model):
    with ContinuousBatch(model, rows=1) as batch:
        return batch._pool.page
