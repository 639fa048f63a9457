"""Rows of the bundled model say what its sequences say, over both kinds of cache."""

import pytest

from seawall.inference import Decoder, Sampling, Speculation
from seawall.inference.generate.rows import ContinuousBatch

from .conftest import ask, content, drain

pytestmark = pytest.mark.model


def alone(decoder, request):
    with decoder.start(
        request.prompt,
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        logprobs=request.logprobs,
        speculation=request.speculation,
    ) as sequence:
        return list(sequence)


@pytest.mark.parametrize("kv", ["int8", "fp32"])
def test_rows_that_join_one_after_the_other_say_what_they_say_alone(gguf, reference, kv):
    prompts = [case["tokens"] for case in reference["cases"]]
    nucleus = Sampling(temperature=0.8, top_p=0.95, seed=3)
    asked = [
        ask(prompts[0], 12, logprobs=1),
        ask(prompts[1], 10, sampling=nucleus, logprobs=1),
        ask((prompts[2] * 40)[:129], 6, logprobs=1),
        ask(prompts[3] * 2, 12, speculation=Speculation(length=3), logprobs=1),
        ask(prompts[0], 8, sampling=nucleus, logprobs=1),
    ]
    with Decoder.load("smollm2-135m", kv=kv, context=320) as decoder, ContinuousBatch(decoder, rows=3) as batch:
        expected = [content(alone(decoder, request)) for request in asked]
        todo, rows, found = list(asked), [], {}
        while todo or batch.rows_in_use:
            if todo and batch.fits(todo[0]):
                rows.append(batch.join(todo.pop(0)))
                found[rows[-1]] = []
            for row, steps, error in batch.step():
                assert error is None
                found[row] += steps
        assert [content(found[row]) for row in rows] == expected
        row = batch.join(asked[2])  # once more, from what is kept
        assert row.cached_tokens == {"int8": 128, "fp32": 112}[kv]
        assert content(drain(batch, [row])[0]) == expected[2]
