"""Steps that several answers share are spans that link to each of them, for who asks."""

from __future__ import annotations

import asyncio

import pytest

from seawall.core import answering
from seawall.engine import Engine, opening
from seawall.inference.errors import RuntimeFailure
from seawall.telemetry import install
from tests.engine.fake_rows import Decoder, Rows


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(opening, "stepper_for", lambda decoder, *sizes: decoder.stepper)
    rows = Rows()
    return rows, Engine(lambda: Decoder(rows), name="fake", policies=(), rows=rows.rows)


def test_a_step_links_to_the_calls_of_all_its_rows(provider, engine):
    rows, model = engine

    async def main():
        async with model:
            rows.hold()
            calls = [asyncio.create_task(model.generate(prompt, max_tokens=3)) for prompt in ("one", "two")]
            while model.snapshot().running + model.snapshot().waiting < 2:  # noqa: ASYNC110 - a thread gets there
                await asyncio.sleep(0.001)
            rows.go.set()
            await asyncio.gather(*calls)

    uninstall = install(tracer_provider=provider, step_spans=True)
    asyncio.run(main())
    uninstall()
    spans = provider.finished()
    calls = {span.context.span_id for span in spans if span.name == "fake.generate"}
    steps = [span for span in spans if span.name == "batch"]
    assert len(calls) == 2
    assert {link.context.span_id for span in steps for link in span.links} == calls
    assert max(span.attributes["seawall.batch.size"] for span in steps) == 2
    assert all(span.parent is None for span in steps)


def test_a_step_that_fails_is_an_error_and_the_answer_has_its_own(provider, engine):
    _, model = engine

    async def main():
        async with model:
            with pytest.raises(RuntimeFailure):
                await model.generate("broken!")

    uninstall = install(tracer_provider=provider, step_spans=True)
    asyncio.run(main())
    uninstall()
    (step,) = [span for span in provider.finished() if span.name == "batch"]
    assert step.attributes["error.type"] == "RuntimeFailure"


def test_unless_asked_for_no_step_is_a_span(provider, engine):
    _, model = engine

    async def main():
        async with model:
            await model.generate("one", max_tokens=3)

    uninstall = install(tracer_provider=provider)
    asyncio.run(main())
    assert answering.watch_step is None
    uninstall()
    assert {span.name for span in provider.finished()} == {"chat fake", "fake.generate"}
    with pytest.raises(ValueError, match="step_spans needs a tracer_provider"):
        install(step_spans=True)
