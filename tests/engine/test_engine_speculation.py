"""An engine that was told to speculate answers faster and says the same."""

import asyncio

import pytest

from seawall import Engine
from seawall.inference import Speculation

pytestmark = [pytest.mark.asyncio, pytest.mark.model]
QUESTION = "Write the word harbour twenty times, separated by commas."


async def test_an_engine_that_speculates_gives_the_answer_of_one_that_does_not(decoder):
    answers = []
    for speculation in (None, "auto", Speculation(length=2)):
        async with Engine.load("smollm2-135m", kv="int8", context=512, speculation=speculation) as engine:
            answers.append(await asyncio.gather(*(engine.generate(one, max_tokens=40) for one in (QUESTION, "Hello"))))
    tokens = [[one.tokens for one in some] for some in answers]
    assert tokens[0] == tokens[1] == tokens[2]
    plain, auto, always = (some[0].usage for some in answers)
    assert plain.drafted_tokens == 0
    assert auto.drafted_tokens >= auto.accepted_tokens  # none at all where the machine is too busy for it to pay
    assert always.drafted_tokens >= always.accepted_tokens > 0
