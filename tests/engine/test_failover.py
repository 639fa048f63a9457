"""Where the first model can't, the second answers; the event says so, and nobody waits for a load."""

from __future__ import annotations

import asyncio
import gc
import inspect
from datetime import timedelta

import anyio
import pytest

from seawall import CircuitOpenError, FallbackFailed, FallbackUsed, Rejected
from seawall.engine import Deployment, Replicas, Supervised, failover
from seawall.engine.failover import Failover
from seawall.inference import Backend
from seawall.inference.errors import (
    BackendClosedError,
    InvalidInputError,
    InvalidSettingError,
    NotFiniteOutputError,
    RunDeadlineError,
    RuntimeDeviceError,
)
from seawall.testing import capture_events, no_leaks
from tests.cancelling import CancelAt
from tests.engine.standing import Model, awaiting
from tests.inference import onnx_models as models

LOST = RuntimeDeviceError("running the model", "DeviceReset")


def asked(scores):
    """What a task and a plain thread are answered."""
    return asyncio.run(scores.run({"x": 1})), scores.run_sync({"x": 1})


def test_a_primary_that_works_answers_alone():
    primary, spare = Model("gpu"), Model("cpu")
    with capture_events() as captured, Failover("scores", primary, spare) as scores:
        assert 2 * ({"y": "gpu", "x": 1},) == asked(scores)
    assert [] == list(captured)
    assert (2, 0) == (primary.asked, spare.asked)
    assert (1, 1) == (primary.closed, spare.closed)


@pytest.mark.parametrize(
    "error",
    [
        LOST,
        NotFiniteOutputError("m", "y", 1),
        BackendClosedError("gone"),
        CircuitOpenError("scores", 3.0),
        Rejected("x"),
    ],
)
def test_the_spare_answers_for_one_that_fails_or_refuses_and_the_event_says_who(error):
    with (
        capture_events() as captured,
        Failover("scores", Model(error=error), Model("b"), spare_name="cpu int8") as scores,
    ):
        assert 2 * ({"y": "b", "x": 1},) == asked(scores)
        assert 2 == scores.fallback.snapshot().replaced
        assert 2 == scores.counters()["replaced"]
    assert 2 * [(FallbackUsed, "scores", "scores.cpu int8", error)] == [
        (type(event), event.policy, event.step, event.error) for event in captured
    ]


@pytest.mark.parametrize("error", [InvalidInputError("x", "a", "b"), RunDeadlineError(1.0), ValueError("mine")])
def test_a_wrong_input_a_deadline_and_somebody_elses_error_are_the_callers(error):
    spare = Model("cpu")
    with Failover("scores", Model(error=error), spare) as scores:
        with pytest.raises(type(error)):
            scores.run_sync({})
        with pytest.raises(type(error)):
            asyncio.run(scores.run({}))
    assert 0 == spare.asked


def test_where_both_fail_the_caller_gets_the_primarys_error_with_a_note():
    scores = Failover("scores", Model(error=LOST), Model(error=KeyError("k")))
    with capture_events() as captured, scores, pytest.raises(RuntimeDeviceError) as caught:
        scores.run_sync({})
    assert ["fallback 'scores': scores.spare failed too: KeyError: 'k'"] == caught.value.__notes__
    assert [FallbackFailed] == [type(event) for event in captured]


class Streaming(Model):
    def __init__(self, name, fail_at=None):
        super().__init__(name)
        self.fail_at = fail_at

    async def stream(self, prompt):
        for number, letter in enumerate(prompt):
            if number == self.fail_at:
                raise LOST
            yield self.name + letter


def streamed(fail_at):
    async def main():
        seen = []
        async with Failover("scores", Streaming("a", fail_at), Streaming("b")) as scores:
            stream = scores.iterate(lambda model: model.stream("xyz"))
            try:
                async for item in stream:
                    seen.append(item)
            except RuntimeDeviceError:
                seen.append("lost")
            assert inspect.isasyncgen(stream)
        return seen

    with no_leaks():
        return asyncio.run(main())


def test_a_stream_fails_over_until_its_first_item_has_come():
    assert ["ax", "ay", "az"] == streamed(None)
    assert ["bx", "by", "bz"] == streamed(0)
    assert ["ax", "lost"] == streamed(1)


def test_a_stream_that_is_left_is_left_by_the_model_too_and_a_call_leaves_nothing_in_its_context():
    closed = []

    class Left(Model):
        async def stream(self, prompt):
            try:
                for letter in prompt:
                    yield letter
            finally:
                closed.append(self.name)

    async def main():
        async with Failover("scores", Left("gpu"), Model("cpu")) as scores:
            stream = scores.iterate(lambda model: model.stream("xyz"))
            assert "x" == await anext(stream)
            await stream.aclose()
            assert ["gpu"] == closed
            await scores.run({})
            assert failover._asked.get(None) is None

    with no_leaks():
        asyncio.run(main())


def test_failovers_nest():
    inner = Failover("inner", Model(error=LOST), Model(error=LOST))
    with Failover("outer", inner, Model("last")) as scores:
        assert 2 * ({"y": "last", "x": 1},) == asked(scores)


@pytest.mark.parametrize("at_once", [True, False])
def test_cancelled_at_every_await_nothing_is_left_and_the_next_call_is_answered(at_once):
    async def main():
        reached, step = True, 0
        async with Failover("scores", Model(error=LOST), Model("cpu")) as scores:
            while reached:
                life = CancelAt(scores.run({}), step, at_once=at_once)
                task = asyncio.ensure_future(awaiting(life))
                await asyncio.wait([task])
                reached, step = life.reached, step + 1
            assert "cpu" == (await scores.run({}))["y"]
        return step

    with no_leaks():
        assert asyncio.run(main()) >= 2


class Async(Model):
    """Is warmed up and drained on the event loop, as an engine is."""

    async def warm_up(self):
        await asyncio.sleep(0)

    async def drain(self, *seconds):
        await asyncio.sleep(0)
        return True


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "begin",
    [
        lambda: Failover("scores", Async(), Async()).warm_up(),
        lambda: Failover("scores", Async(), Async()).drain(),
        lambda: Deployment("scores", Async()).swap(Async, probation=None),
        lambda: Supervised("scores", Async).open(),
    ],
    ids=["warm_up", "drain", "swap", "open"],
)
def test_cancelled_at_every_await_no_coroutine_of_a_model_is_left_unawaited(at_once, begin):
    async def main():
        reached, step = True, 0
        while reached:
            life = CancelAt(begin(), step, at_once=at_once)
            await asyncio.wait([asyncio.ensure_future(awaiting(life))])
            reached, step = life.reached, step + 1
        return step

    assert asyncio.run(main()) >= 2
    gc.collect()  # it warns when a coroutine goes, and that fails the test


@pytest.mark.parametrize(
    ("seconds", "error"), [(float("nan"), ValueError), (-1.0, ValueError), ("5", TypeError), (True, TypeError)]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: Failover("scores", Async(), Async()),
        lambda: Deployment("scores", Async()),
        lambda: Supervised("scores", Async).open_sync(),
        lambda: Replicas("scores", {"a": Async()}),
    ],
    ids=["failover", "deployment", "supervised", "replicas"],
)
def test_a_drain_of_no_seconds_is_refused_and_has_not_begun(make, seconds, error):
    scores = make()
    drains = [lambda: asyncio.run(scores.drain(seconds))]
    if hasattr(scores, "drain_sync"):
        drains.append(lambda: scores.drain_sync(seconds))
    for drain in drains:
        with pytest.raises(error, match="timeout must be"):
            drain()
        assert "a" == scores.run_sync({})["y"]
    assert asyncio.run(scores.drain(timedelta(seconds=1)))
    scores.close()


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_real_backends_of_two_precisions_are_warmed_drained_and_closed(library):
    async def main():
        primary = Backend.load(models.linear().SerializeToString(), threads=1)
        spare = Backend.load(models.quantized("int8").SerializeToString(), threads=1)
        async with Failover("scores", primary, spare) as scores:
            await scores.warm_up()
            primary.close()
            assert ["y"] == list(await scores.run(models.rows(1)))
            assert await scores.drain(1.0)
        assert spare.closed

    with no_leaks():
        anyio.run(main, backend=library)


@pytest.mark.parametrize(("primary", "spare"), [(Model(), None), ("model.onnx", Model())])
def test_what_is_no_model_is_refused_at_once(primary, spare):
    with pytest.raises(TypeError, match=r"must be a model, which has close\(\)"):
        Failover("scores", primary, spare)


def test_a_model_is_no_spare_of_its_own():
    model = Model()
    with pytest.raises(InvalidSettingError, match="spare must be a model of its own"):
        Failover("scores", model, model)
