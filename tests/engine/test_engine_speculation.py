"""An engine that was told to speculate answers faster and says the same."""

import pytest

from seawall import Engine

pytestmark = [pytest.mark.asyncio, pytest.mark.model]
QUESTION = "Write the word harbour twenty times, separated by commas."


async def test_an_engine_that_speculates_gives_the_answer_of_one_that_does_not(decoder):
    answers = []
    for speculation in (None, "auto"):
        async with Engine.load("smollm2-135m", kv="int8", context=512, speculation=speculation) as engine:
            answers.append((await engine.generate(QUESTION, max_tokens=40)).tokens)
    assert answers[0] == answers[1]
