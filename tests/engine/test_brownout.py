"""A burning budget makes answers shorter and models cheaper, and a recovery gives both back."""

from __future__ import annotations

import asyncio

import pytest

from seawall import SLO, Cache, listen, use_clock
from seawall.engine import AnswerSettings, Downgrade, Engine, Shorter, opening
from seawall.inference.errors import RuntimeFailure
from seawall.slo.brownout import Adjust, BrownedOutError, BrownOut, BrownOutStepped, Refuse
from seawall.telemetry.readings import gauges_of
from seawall.testing import VirtualClock, no_leaks

from .fake_rows import Decoder, Rows
from .standing import Model

HOUR = 3600.0  # a window whose quickest pair of look backs is 5 s and 0.4 s
LADDER = {"step_up": 1.0, "hold": 10.0, "minimum_calls": 5}


@pytest.fixture
def clock():
    clock = VirtualClock()
    with use_clock(clock):
        yield clock


@pytest.fixture(autouse=True)
def pretending(monkeypatch):
    monkeypatch.setattr(opening, "stepper_for", lambda decoder, *sizes: decoder.stepper)


def engine_with(policies, adjust):
    rows = Rows()
    return Engine(lambda: Decoder(rows), name="fake", policies=policies, rows=rows.rows, adjust=adjust)


async def ask(engine, clock, times, prompt):
    """So many answers, ten a second; the length of the last one."""
    length = None
    for _ in range(times):
        clock.advance(0.1)
        try:
            length = len((await engine.generate(prompt, max_tokens=12)).text)
        except (RuntimeFailure, BrownedOutError):
            length = None
    return length


def test_a_burn_makes_answers_shorter_and_then_refuses_and_a_recovery_gives_them_back(clock):
    heard = []

    async def main():
        dimmer = BrownOut("fake", [Shorter(8), Shorter(3), Refuse()], **LADDER)
        slo = SLO("fake", target=0.99, window=HOUR, actions=[dimmer])
        stop = listen(heard.append)
        async with engine_with((slo, dimmer), dimmer.adjust) as engine:
            assert await ask(engine, clock, 100, "fine") == 12
            lengths = []
            for _ in range(1000):
                await ask(engine, clock, 1, "broken!")  # an answer that fails
                seen = dimmer.level
                if seen == 3:
                    break
                lengths.append((seen, await ask(engine, clock, 1, "fine")))
            assert set(lengths) == {(0, 12), (1, 8), (2, 3)}
            with pytest.raises(BrownedOutError):
                await engine.generate("fine")
            assert {one.metric: one.value for one in gauges_of(dimmer)} == {"seawall.brownout.level": 3.0}
            await ask(engine, clock, 600, "fine")
            assert (dimmer.level, await ask(engine, clock, 1, "fine")) == (0, 12)
        stop()

    asyncio.run(main())
    steps = [(one.level, one.step) for one in heard if isinstance(one, BrownOutStepped)]
    assert steps[:3] == [(1, "Shorter(8)"), (2, "Shorter(3)"), (3, "Refuse(below=CRITICAL)")]
    assert [level for level, _ in steps[-3:]] == [2, 1, 0]


def test_an_answer_that_is_short_enough_is_left_alone():
    asked = AnswerSettings(max_tokens=5, temperature=0.5, seed=3)
    assert Shorter(8).adjust(asked) is asked
    assert Shorter(2).adjust(asked) == AnswerSettings(max_tokens=2, temperature=0.5, seed=3)
    with pytest.raises(ValueError, match="max_tokens must be 1 or more, got 0"):
        Shorter(0)


def test_a_cheaper_model_answers_while_the_step_holds():
    usual, cheaper = Model("fp32"), Model("int4")
    with Downgrade("scores", usual, cheaper) as scores:
        asked = [scores.run_sync({})["y"]]
        scores.engage()
        asked += [scores.run_sync({})["y"], asyncio.run(scores.run({}))["y"]]
        assert scores.model is cheaper
        scores.release()
        asked += [scores.run_sync({})["y"]]
        assert scores.counters() == {"usual": 2, "cheaper": 2}
    assert asked == ["fp32", "int4", "int4", "fp32"]
    assert (usual.closed, cheaper.closed) == (1, 1)


@no_leaks()
def test_a_stream_stays_with_the_model_that_began_it_and_is_closed_with_it():
    async def main():
        async with Downgrade("scores", Model("a"), Model("b")) as scores:
            stream = scores.stream("xyz")
            seen = [await anext(stream)]
            scores.engage()
            seen += [await anext(stream)]
            await stream.aclose()
            seen += [piece async for piece in scores.stream("x")]
            assert await scores.drain(1.0)
        return seen

    assert asyncio.run(main()) == ["ax", "ay", "bx"]


@pytest.mark.parametrize("models", [(None, Model()), (Model(), None)])
def test_what_is_no_model_is_refused_at_once(models):
    with pytest.raises(TypeError, match="must be a model, which has close"):
        Downgrade("scores", *models)


def test_both_models_are_warmed_up_and_named_in_the_ladder():
    usual, cheaper = Model("a"), Model("b")
    scores = Downgrade("scores", usual, cheaper)
    asyncio.run(scores.warm_up())
    assert (usual.warm, cheaper.warm) == (1, 1)
    dimmer = BrownOut("scores", [scores])
    assert repr(dimmer.ladder[0]) == "<Downgrade 'scores'>"


def test_answers_of_a_cache_grow_old_while_the_step_holds(clock):
    answered = []
    cache = Cache("answers", ttl=10.0)
    older = Adjust(cache, ttl=HOUR)

    @cache
    def answer(prompt):
        answered.append(prompt)
        return prompt.upper()

    answer("why")
    clock.advance(60.0)
    older.engage()
    assert answer("why") == "WHY"
    assert answered == ["why"]
    older.release()
    answer("why")
    assert answered == ["why", "why"]
