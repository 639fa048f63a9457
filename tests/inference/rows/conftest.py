"""A tiny model whose rows are bitwise, or padded, by its cache; and the answers of single sequences to compare with."""

from dataclasses import replace

import numpy as np
import pytest

from seawall.inference import Decoder, Speculation
from seawall.inference.generate.rows import Request
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
