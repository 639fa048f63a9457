"""An engine that was told to speculate answers faster and says the same."""

import asyncio

import pytest

from seawall import Engine

pytestmark = [pytest.mark.asyncio, pytest.mark.model]
QUESTION = "Write the word harbour twenty times, separated by commas."


async def test_an_engine_that_speculates_gives_the_answer_of_one_that_does_not(decoder):
    answers = []
    for speculation in (None, "auto"):
        async with Engine.load("smollm2-135m", kv="int8", context=512, speculation=speculation) as engine:
            answers.append(await asyncio.gather(*(engine.generate(one, max_tokens=40) for one in (QUESTION, "Hello"))))
    assert [one.tokens for one in answers[0]] == [one.tokens for one in answers[1]]
    plain, drafted = answers[0][0].usage, answers[1][0].usage
    assert plain.drafted_tokens == 0
    assert drafted.drafted_tokens >= drafted.accepted_tokens > 0
