"""Engines and embedders behind a deployment: answers go on, whoever gives them."""

from __future__ import annotations

import asyncio

import pytest

from seawall import Engine
from seawall.engine import Deployment, Failover, ModelSwapped, Serving, Supervised
from seawall.inference import Embedder
from seawall.testing import no_leaks
from tests.engine.standing import until
from tests.engine.test_opening import Loader, engine_of
from tests.inference import tiny_bert


def test_an_engine_is_swapped_while_it_streams_and_what_serves_fits_where_an_engine_does():
    async def main():
        first, second = Loader(), Loader()
        async with Deployment("chat", await engine_of(first).open()) as chat:
            assert isinstance(chat, Serving)
            stream = chat.stream("hello")
            assert "a" == (await anext(stream)).text
            swap = asyncio.ensure_future(chat.swap(lambda: engine_of(second), probation=None))
            await until(lambda: chat.generation == 2)
            assert "abc" == (await chat.generate("hello")).text
            assert not first.loaded[0].closed
            assert ["b", "c"] == [piece.text async for piece in stream if piece.text]
            assert 2 == await swap
            assert (True, False) == (first.loaded[0].closed, second.loaded[0].closed)
            assert ["abc"] == [answer.text for answer in await chat.generate_many("hello")]
            assert await chat.drain(1.0)
        assert second.loaded[0].closed

    with no_leaks():
        asyncio.run(main())


def test_an_engine_that_was_closed_behind_its_users_back_comes_back_and_a_spare_answers_meanwhile():
    async def main():
        loader, spare = Loader(), Loader()
        primary = await Supervised("chat", lambda: engine_of(loader), backoff=lambda attempt: 0.001).open()
        async with Failover("chat", primary, await engine_of(spare).open()) as chat:
            assert isinstance(chat, Serving)
            assert "abc" == (await chat.generate("hello")).text
            primary.model.close()
            assert "abc" == "".join([piece.text async for piece in chat.stream("hello")])
            assert 1 == chat.fallback.snapshot().replaced
            while primary.counters()["rebuilt"] < 1:  # noqa: ASYNC110 - a thread does it
                await asyncio.sleep(0)
            assert "abc" == (await primary.generate("hello")).text
            assert 2 == len(loader.loaded)

    with no_leaks():
        asyncio.run(main())


@pytest.fixture
def folder(tmp_path):
    return tiny_bert.write(tmp_path / "tiny")


def test_an_embedder_is_swapped(folder, tmp_path):
    def load():
        return Embedder.load(folder, cache_dir=tmp_path / "cache", threads=1)

    async def main():
        async with Deployment("texts", load()) as texts:
            before = await texts.embed(["why sea"])
            await texts.swap(load, gate=lambda old, new: (old.embed_sync(["sea"]) == new.embed_sync(["sea"])).all(),
                             probation=None)  # fmt: skip
            assert (before == texts.embed_sync(["why sea"])).all()
            assert (32, [2, 4, 3]) == (texts.dimension, texts.encode("sea"))
            lost = Failover("texts", Supervised("texts", load), texts)  # never opened
            assert (32, [2, 4, 3]) == (lost.dimension, lost.encode("sea"))
            lost.close()

    with no_leaks():
        asyncio.run(main())


class Kept:
    """The real decoder, which two engines have one after the other: loading it twice takes long."""

    def __init__(self, decoder):
        self._decoder = decoder

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def close(self):
        """Left open for the next one."""


@pytest.mark.model
def test_the_real_model_is_swapped_in_the_middle_of_an_answer_and_every_answer_is_its_own(decoder):
    question = "Why is the sea salty?"

    def engine():
        return Engine(lambda: Kept(decoder), name="smollm2")

    async def main():
        swapped = asyncio.Event()
        async with Deployment("chat", await engine().open(), listeners=[
            lambda event: swapped.set() if isinstance(event, ModelSwapped) else None
        ]) as chat:  # fmt: skip
            expected = (await chat.generate(question, max_tokens=12)).text
            stream = chat.stream(question, max_tokens=12)
            texts = [(await anext(stream)).text]
            test = lambda model: model.generate(question, max_tokens=2)
            swap = asyncio.ensure_future(chat.swap(engine, self_test=test, probation=None))
            await swapped.wait()
            assert expected == (await chat.generate(question, max_tokens=12)).text
            texts += [piece.text async for piece in stream]
            assert expected == "".join(texts)
            assert 2 == await swap

    with no_leaks():
        asyncio.run(main())
    assert 0 == decoder.active_sequences
