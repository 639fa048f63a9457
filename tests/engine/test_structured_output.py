"""Many callers with forms of their own share an engine: each gets what it would alone, and no bad form harms others."""

import asyncio
import json
import re
import threading

import jsonschema
import pytest

from seawall import Engine
from seawall.inference import Choice, Decoder, JsonSchema, Regex, Sampling
from seawall.inference.errors import ConstraintError
from seawall.inference.generate.speculation import Speculation
from seawall.testing import no_leaks
from tests.inference import tiny
from tests.inference.constraints.spelling import ADDRESS, LETTER, PAIRS, SPECIALS, TOKENS


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speller")
    types = [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS))
    merges = [" ".join(LETTER[ord(letter)] for letter in pair) for pair in PAIRS]
    path = tiny.write(folder / "speller.gguf", tokens=TOKENS, types=types, merges=merges, context_length=512)
    # over an 8-bit cache a row's logits do not depend on its neighbours, to the bit
    return {"model": path, "precision": "int8", "kv": "int8", "cache_dir": folder, "context": 512, "threads": 1}


def engine(speller, **settings):
    return Engine.load(**speller, policies=(), **settings)


FORMS = [JsonSchema(ADDRESS), Regex(r"\d{3}-[a-f]{2,9}"), Choice(["yes", "no", "perhaps"]), None]


def alone(speller, prompt, constraint, seed):
    settings = {name: value for name, value in speller.items() if name != "model"}
    with Decoder.load(speller["model"], **settings) as decoder:
        tokens = decoder.encode(prompt)
        with decoder.start(
            tokens, max_tokens=90, constraint=constraint, sampling=Sampling(seed=seed), logprobs=2, speculation=False
        ) as answer:
            steps = [step for step in answer if step.token is not None]
    return "".join(step.text for step in steps), tuple(step.logprobs for step in steps)


@pytest.mark.parametrize("speculation", [None, Speculation(length=6)], ids=["plain", "drafted"])
def test_callers_with_different_forms_share_rows_and_each_gets_its_own(speller, speculation):
    asked = [(f"prompt {seed}", FORMS[seed % 4], seed) for seed in range(12)]

    async def main():
        async with engine(speller, speculation=speculation) as shared:
            work = [
                shared.generate(
                    prompt, chat=False, max_tokens=90, temperature=1.0, seed=seed, constraint=form, logprobs=2
                )
                for prompt, form, seed in asked
            ]
            return await asyncio.gather(*work)

    with no_leaks():
        answers = asyncio.run(main())
    for answer, (prompt, form, seed) in zip(answers, asked, strict=True):
        text, logprobs = alone(speller, prompt, form, seed)
        assert answer.text == text
        assert answer.logprobs == logprobs
        if form is FORMS[0] and answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), ADDRESS)
        if form is FORMS[1]:
            assert re.fullmatch(FORMS[1].pattern, answer.text)


def test_samples_of_one_prompt_all_keep_the_form(speller):
    async def main():
        async with engine(speller) as shared:
            return await shared.generate_many("x", chat=False, n=4, temperature=1.5, seed=1, constraint=FORMS[1])

    texts = [answer.text for answer in asyncio.run(main())]
    assert all(re.fullmatch(FORMS[1].pattern, text) for text in texts)
    assert len(set(texts)) > 1


def test_a_form_that_nothing_can_keep_ends_its_own_call_alone(speller):
    async def main():
        async with engine(speller) as shared:
            work = [
                shared.generate("a", chat=False, constraint=form, max_tokens=30)
                for form in (FORMS[1], Regex(r"[^\s\S]"), FORMS[2])
            ]
            found = await asyncio.gather(*work, return_exceptions=True)
            again = await shared.generate("a", chat=False, constraint=FORMS[2])
        return found, again

    with no_leaks():
        (good, bad, other), again = asyncio.run(main())
    assert re.fullmatch(FORMS[1].pattern, good.text)
    assert isinstance(bad, ConstraintError)
    assert other.text == again.text
    assert again.text in ("yes", "no", "perhaps")


class Noting:
    """Allows everything, and notes which thread makes its matchers."""

    def __init__(self):
        self.threads = []

    def matcher(self, vocabulary):
        self.threads.append(threading.current_thread().name)
        return self

    def allowed(self):
        return None

    def consume(self, token):
        return True

    def rollback(self, tokens):
        pass

    def forced(self):
        return ()


def test_a_form_is_compiled_before_the_thread_of_the_rows_needs_it(speller):
    form = Noting()

    async def main():
        async with engine(speller) as shared:
            await shared.generate("a", chat=False, constraint=form, max_tokens=3)

    asyncio.run(main())
    first, second = form.threads
    assert first != second


def test_an_impossible_form_opens_no_breaker(speller):
    async def main():
        async with Engine.load(**speller) as guarded:  # with the usual policies
            for _ in range(30):
                with pytest.raises(ConstraintError):
                    await guarded.generate("a", chat=False, constraint=Regex(r"[^\s\S]"))
            return await guarded.generate("a", chat=False, constraint=FORMS[2])

    assert asyncio.run(main()).text in ("yes", "no", "perhaps")
