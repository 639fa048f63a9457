"""Many callers of the real model at once: each gets what it would get alone, and nothing is left."""

from __future__ import annotations

import contextlib
import random

import anyio
import pytest

from seawall import Engine
from seawall.inference import Choice
from seawall.inference.errors import InvalidPromptError, InvalidSettingError, PromptTooLongError

pytestmark = [pytest.mark.anyio, pytest.mark.model]
PROMPTS = [
    "What is the capital of France?",
    "Name three colours.",
    "Count to ten.",
    "Write a line about the harbour. " * 12,
    "Who wrote Hamlet?",
    "Explain tides in one sentence.",
]


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def kept(decoder, monkeypatch):
    """The real decoder, which engines leave open for the next test."""
    monkeypatch.setattr(decoder, "close", lambda: None)
    return decoder


def alone(decoder, prompt, **settings):
    with decoder.start(decoder.encode_chat(prompt), **settings) as sequence:
        return [step.token for step in sequence if step.token is not None]


async def test_answers_given_together_equal_those_given_alone(kept):
    answers = {}

    async def ask(engine, prompt):
        answers[prompt] = list((await engine.generate(prompt, max_tokens=10)).tokens)

    async with Engine(lambda: kept, rows=4) as engine, anyio.create_task_group() as tasks:
        for prompt in PROMPTS:
            tasks.start_soon(ask, engine, prompt)
    assert answers == {prompt: alone(kept, prompt, max_tokens=10) for prompt in PROMPTS}


async def test_whoever_leaves_at_whatever_moment_changes_no_other_answer(kept):
    chance, answers = random.Random(3), []

    async def leave(engine, pieces):
        async with contextlib.aclosing(engine.stream(chance.choice(PROMPTS), max_tokens=20)) as stream:
            async for _ in stream:
                pieces -= 1
                if pieces < 0:
                    return

    async def stay(engine, prompt):
        answers.append((prompt, list((await engine.generate(prompt, max_tokens=12)).tokens)))

    async with Engine(lambda: kept, rows=4) as engine:
        async with anyio.create_task_group() as tasks:
            for prompt in PROMPTS:
                tasks.start_soon(stay, engine, prompt)
                tasks.start_soon(leave, engine, chance.randrange(6))
        with anyio.fail_after(20):
            while engine.snapshot().running or engine.snapshot().cache_used_bytes:  # noqa: ASYNC110 - in a thread
                await anyio.sleep(0.01)
        assert engine.snapshot().cancelled == len(PROMPTS)
    for prompt, tokens in answers:
        assert tokens == alone(kept, prompt, max_tokens=12)
    assert len(answers) == len(PROMPTS)


async def test_a_prompt_that_was_read_before_is_not_read_again_unless_by_another_tenant(kept):
    prompt = "The harbour wall keeps the sea out of the town. " * 20
    async with Engine(lambda: kept, rows=2) as engine:
        first, again, other = [
            (await engine.generate(prompt, max_tokens=2, tenant=tenant)).usage for tenant in ("a", "a", "b")
        ]
        assert engine.snapshot().prefix_hits == again.cached_tokens
    assert (first.cached_tokens, other.cached_tokens) == (0, 0)
    assert 0 < again.cached_tokens < again.prompt_tokens


async def test_samples_logprobs_and_constraints_go_through(kept):
    async with Engine(lambda: kept, rows=4) as engine:
        samples = await engine.generate_many("Tell me a joke.", n=3, temperature=0.9, seed=5, max_tokens=8)
        again = await engine.generate("Tell me a joke.", temperature=0.9, seed=6, max_tokens=8)
        told = await engine.generate("Hello", logprobs=2, max_tokens=4)
        chosen = await engine.generate("Is the sea salty?", constraint=Choice(("perhaps", "never")), max_tokens=8)
    assert len({one.text for one in samples}) > 1
    assert again.tokens == samples[1].tokens
    assert [len(one.top) for one in told.logprobs] == [2] * len(told.tokens)
    assert chosen.text in ("perhaps", "never")


async def test_a_text_or_tokens_can_be_continued_verbatim(kept):
    async with Engine(lambda: kept, rows=2) as engine:
        text = await engine.generate("The capital of France is", chat=False, max_tokens=4)
        tokens = await engine.generate(kept.encode("The capital of France is"), chat=False, max_tokens=4)
        with pytest.raises(InvalidPromptError):
            await engine.generate([1, 10**9], chat=False)
    assert text.tokens == tokens.tokens
    assert text.text.startswith(" Paris")


async def test_what_can_never_fit_is_refused_at_once(kept):
    async with Engine(lambda: kept, rows=2, cache_bytes=8 << 20, prefix_cache_bytes=0) as engine:
        with pytest.raises(InvalidSettingError, match="could never fit"):
            await engine.generate("Hello", max_tokens=1500)
        with pytest.raises(InvalidSettingError, match="stop"):
            await engine.generate("Hello", stop=["x"] * 99)
        with pytest.raises(PromptTooLongError):
            await engine.generate("word " * 2500)
        assert (await engine.generate("Hello", max_tokens=2)).text
