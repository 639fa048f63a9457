"""A model is replaced while it serves: nobody's call fails, and what fails is sent away."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall import Rejected
from seawall.engine import (
    Deployment,
    DeploymentClosedError,
    ModelRetired,
    ModelSwapped,
    Probation,
    Shadow,
    SwapInProgressError,
    SwapRolledBack,
    SwapStarted,
    UnfitModelError,
)
from seawall.engine.generations import Tally
from seawall.engine.shadowing import Mirror
from seawall.inference import Backend, MicroBatcher
from seawall.inference.errors import (
    BatchQueueFullError,
    CorruptModelError,
    InvalidInputError,
    InvalidSettingError,
    RunDeadlineError,
)
from seawall.testing import capture_events, no_leaks
from seawall.testing import run as in_virtual_time
from tests.cancelling import CancelAt
from tests.engine.standing import Model, awaiting, until
from tests.inference import onnx_models as models

LIBRARIES = pytest.mark.parametrize("library", ["asyncio", "trio"])


def deployment(model=None, **settings):
    return Deployment("scores", model or Model("old"), **settings)


async def answer(deployed):
    return (await deployed.run({}))["y"]


async def load_later():
    await asyncio.sleep(0)
    return Model("new")


@pytest.mark.parametrize(
    "load", [lambda: Model("new"), load_later, lambda: load_later(), partial(load_later)],  # noqa: PLW0108 - what it tests
    ids=["plain", "async", "around async", "partial"],
)  # fmt: skip
def test_a_load_may_be_plain_or_async(load):
    async def main():
        async with deployment() as deployed:
            await deployed.swap(load, probation=None)
            assert ("new", 1) == (await answer(deployed), deployed.model.warm)

    with no_leaks():
        asyncio.run(main())


@LIBRARIES
def test_a_swap_moves_new_calls_to_the_new_model_and_closes_the_old_one(library):
    async def main():
        old, new = Backend.load(models.linear().SerializeToString(), threads=1), None

        def load():
            nonlocal new
            new = Backend.load(models.chain(2).SerializeToString(), threads=1)
            return new

        async with Deployment("scores", old) as deployed:
            assert ["y"] == list(await deployed.run(models.rows(1)))
            assert 2 == await deployed.swap(
                load, self_test=lambda model: model.run_sync(models.rows(2)), probation=None
            )
            assert ["h2"] == list(await deployed.run(models.rows(1)))
            assert ["h2"] == list(deployed.run_sync(models.rows(1)))
            assert (True, False, 2, 1) == (old.closed, new.closed, deployed.generation, deployed.gauges()["models"])
        assert new.closed

    with no_leaks():
        anyio.run(main, backend=library)


def test_what_happens_is_told_in_order():
    async def main():
        async with deployment() as deployed:
            with capture_events() as captured:
                await deployed.swap(lambda: Model("new"), probation=None)
                with pytest.raises(ZeroDivisionError):
                    await deployed.swap(lambda: 1 / 0)
        return captured

    started, swapped, retired, again, back = asyncio.run(main())
    assert (SwapStarted, ModelSwapped, ModelRetired) == (type(started), type(swapped), type(retired))
    assert (2, 2, 1, 0) == (started.generation, swapped.generation, retired.generation, retired.ended)
    assert swapped.seconds >= 0
    assert (SwapStarted, 3) == (type(again), again.generation)
    assert (SwapRolledBack, 2, "load") == (type(back), back.generation, back.stage)
    assert isinstance(back.error, ZeroDivisionError)


def corrupt():
    return Backend.load(models.linear().SerializeToString()[:60])


def unfit(model):
    return model.name != "new"


async def unfit_later(model):
    return unfit(model)


def broken(model):
    raise ValueError("the answer is not 42")


def worse(old, new):
    return (old.name, new.name) != ("old", "new")


@pytest.mark.parametrize(
    ("load", "settings", "error", "stage"),
    [
        (corrupt, {}, CorruptModelError, "load"),
        (lambda: Model("new"), {"warm_up": broken}, ValueError, "warm_up"),
        (lambda: Model("new"), {"self_test": broken}, ValueError, "self_test"),
        (lambda: Model("new"), {"self_test": unfit}, UnfitModelError, "self_test"),
        (lambda: Model("new"), {"self_test": unfit_later}, UnfitModelError, "self_test"),
        (lambda: Model("new"), {"self_test": lambda model: np.isfinite([np.nan]).all()}, UnfitModelError, "self_test"),
        (lambda: Model("new"), {"gate": worse}, UnfitModelError, "gate"),
    ],
)
def test_a_model_that_fails_before_it_has_traffic_is_closed_and_its_error_raised_as_it_was(
    load, settings, error, stage
):
    made = []

    def loading():
        made.append(load())
        return made[-1]

    async def main():
        async with deployment() as deployed:
            with pytest.raises(error) as caught:
                await deployed.swap(loading, **settings)
            assert [f"deployment 'scores': its swap was rolled back in stage {stage!r}"] == caught.value.__notes__
            assert all(model.closed == 1 and not model.asked for model in made)
            assert ("old", 1) == (await answer(deployed), deployed.generation)
            assert 3 == await deployed.swap(lambda: Model("third"), probation=None)  # it may be tried again

    with no_leaks():
        asyncio.run(main())


def test_a_load_that_gives_the_model_that_serves_is_refused_and_that_serves_on():
    """Retiring the old one, or sending the new one away, would close the model under its calls."""

    async def main(again):
        model = Model("old")

        async def remembered():
            return model

        load = remembered if again == "async" else lambda: model
        async with deployment(model) as deployed:
            for settings in ({}, {"probation": None}, {"self_test": lambda new: False}):
                with pytest.raises(InvalidSettingError, match="load must make a new model each time"):
                    await deployed.swap(load, **settings)
            assert ("old", 0, 1) == (await answer(deployed), model.closed, deployed.gauges()["models"])

    for again in ("async", "plain"):
        with no_leaks():
            asyncio.run(main(again))


@pytest.mark.parametrize("nothing", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_cancelled_while_a_load_gives_nothing_or_the_model_that_serves_it_serves_on(at_once, nothing):
    async def main():
        for step in range(10):
            model = Model("old")
            async with deployment(model) as deployed:
                given = None if nothing else model
                swapping = CancelAt(deployed.swap(lambda given=given: given), step, at_once=at_once)
                with pytest.raises((asyncio.CancelledError, TypeError if nothing else InvalidSettingError)):
                    await asyncio.create_task(awaiting(swapping))
                assert ("old", 0) == (await answer(deployed), model.closed)
            if not swapping.reached:
                return step
        raise AssertionError("it has no end")

    assert 0 < asyncio.run(main())


@pytest.mark.parametrize("returned", [None, "model.onnx"])
def test_a_load_that_returns_no_model_is_refused_before_it_has_traffic(returned):
    async def main():
        async with deployment() as deployed:
            with pytest.raises(TypeError, match=r"what load returns must be a model, which has close\(\)"):
                await deployed.swap(lambda: returned, probation=None)
            assert "old" == await answer(deployed)

    with no_leaks():
        asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load": Model("new")}, "load must be a function"),
        ({"warm_up": True}, "warm_up must be a function of the model, or None, got True"),
        ({"self_test": 42}, "self_test must be"),
        ({"gate": 0.95}, "gate must be"),
        ({"shadow": lambda old, new: True}, "shadow must be a Shadow"),
        ({"probation": 10.0}, r"probation must be a Probation, or None, got 10\.0"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_before_anything_is_loaded(settings, message):
    made = []

    async def main():
        async with deployment() as deployed:
            with pytest.raises(TypeError, match=message):
                await deployed.swap(**{"load": lambda: made.append(Model("new")), **settings})
            assert not made
            assert 2 == await deployed.swap(lambda: Model("new"), probation=None)

    with no_leaks():
        asyncio.run(main())


def test_what_is_no_model_is_refused_at_once():
    with pytest.raises(TypeError, match="model must be a model"):
        Deployment("scores", "model.onnx")


def test_a_model_that_cannot_be_opened_is_closed():
    class Unopenable(Model):
        async def open(self):
            raise OSError("no such file")

    async def main():
        new = Unopenable("new")
        async with deployment() as deployed:
            with pytest.raises(OSError, match="no such file"):
                await deployed.swap(lambda: new)
            assert (1, "old") == (new.closed, await answer(deployed))

    with no_leaks():
        asyncio.run(main())


def test_a_call_is_answered_by_the_model_that_began_it_and_that_is_closed_after_its_last_one():
    async def main():
        old = Model("old", hold=True)
        async with deployment(old) as deployed:
            slow = asyncio.ensure_future(answer(deployed))
            stream = deployed.iterate(lambda model: model.stream("xyz"))
            assert "oldx" == await anext(stream)
            swap = asyncio.ensure_future(deployed.swap(lambda: Model("new"), probation=None))
            await until(lambda: deployed.generation == 2)
            assert "new" == await answer(deployed)
            assert not old.closed
            assert 2 == deployed.calls
            old.released.set()
            assert "old" == await slow
            assert not old.closed
            assert ["oldy", "oldz"] == [item async for item in stream]
            assert 2 == await swap
            assert 1 == old.closed

    with no_leaks():
        asyncio.run(main())


def test_a_call_that_never_ends_is_ended_with_the_old_model_once_the_patience_is_over():
    async def main():
        old = Backend.load(models.endless().SerializeToString(), threads=1)
        async with Deployment("scores", old, drain_timeout=0.0) as deployed:
            stuck = asyncio.ensure_future(deployed.run(models.FOREVER))
            await until(lambda: old.calls)
            with capture_events(ModelRetired) as captured:
                load = Backend.load(models.endless().SerializeToString(), threads=1)
                await deployed.swap(lambda: load, warm_up=None, probation=None)
            assert [1] == [event.ended for event in captured]
            with pytest.raises(Exception, match="closed"):
                await stuck

    with no_leaks():
        asyncio.run(main())


def test_a_swap_whose_event_loop_is_gone_did_not_happen():
    async def begin(swapping, deployed):
        waited = swapping.send(None)
        while deployed.generation == 1:
            await until(waited.done)
            waited = swapping.send(None)

    new = Model("new")
    with no_leaks(), deployment() as deployed:
        swapping = deployed.swap(lambda: new, probation=Probation(60))
        asyncio.run(begin(swapping, deployed))
        swapping.close()  # what the collector does with a task that its loop has left behind
        assert "old" == deployed.run_sync({})["y"]
        assert 3 == asyncio.run(deployed.swap(lambda: Model("third"), probation=None))
    assert 1 == new.closed


def test_two_swaps_at_once_are_refused():
    async def main():
        new = Model("new")
        going, go_on = threading.Event(), threading.Event()

        def load():
            going.set()
            assert go_on.wait(30)
            return new

        async with deployment() as deployed:
            first = asyncio.ensure_future(deployed.swap(load, probation=None))
            await until(going.is_set)
            with pytest.raises(SwapInProgressError, match="one at a time"):
                await deployed.swap(load)
            go_on.set()
            assert 2 == await first

    with no_leaks():
        asyncio.run(main())


class TestProbation:
    def test_errors_that_rise_bring_the_old_model_back_and_no_caller_sees_one(self):
        async def main():
            old, new = Model("old"), Model("new", error=RuntimeError("NaN"))
            async with deployment(old) as deployed:
                swap = asyncio.ensure_future(deployed.swap(lambda: new, probation=Probation(3600, minimum_calls=3)))
                await until(lambda: deployed.generation == 2)
                assert 6 * ["old"] == [await answer(deployed) for _ in range(5)] + [deployed.run_sync({})["y"]]
                with pytest.raises(
                    UnfitModelError, match=r"3 of 3 calls failed, and 0.0% of those before it"
                ) as caught:
                    await swap
                assert "probation" == caught.value.stage
                assert (1, 0) == (new.closed, old.closed)
                assert {"success": 3, "failure": 0, "neither": 0, "rescued": 3} == deployed.counters()

        with no_leaks():
            asyncio.run(main())

    def test_a_call_that_fails_on_a_model_that_was_sent_away_is_answered_by_the_one_that_serves_then(self):
        async def main():
            old, new = Model("old"), Model("new", error=RuntimeError("NaN"), hold=True)
            async with deployment(old) as deployed:
                swap = asyncio.ensure_future(deployed.swap(lambda: new, probation=Probation(3600)))
                await until(lambda: deployed.generation == 2)
                slow = asyncio.ensure_future(answer(deployed))
                await until(lambda: deployed.calls)
                swap.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await swap
                await deployed.swap(lambda: Model("third"), probation=None)
                assert old.closed
                new.released.set()
                assert "third" == await slow

        with no_leaks():
            asyncio.run(main())

    def test_time_that_passes_without_errors_closes_the_old_one(self):
        async def main():
            old = Model("old")
            async with deployment(old) as deployed:
                swap = asyncio.ensure_future(deployed.swap(lambda: Model("new"), probation=Probation(3600)))
                await until(lambda: deployed.generation == 2)
                assert not old.closed
                await swap
                assert asyncio.get_running_loop().time() >= 3600
                assert old.closed

        in_virtual_time(main())

    @pytest.mark.parametrize(
        "error",
        [
            Rejected("somebody"),
            BatchQueueFullError("scores", 9, 8, 0.1),
            InvalidInputError("x", "nothing", "something"),
            asyncio.CancelledError(),
        ],
    )
    def test_refusals_cancellations_and_faults_of_the_callers_prove_nothing(self, error):
        async def main():
            new = Model("new", error=error)
            async with deployment() as deployed:
                swap = asyncio.ensure_future(deployed.swap(lambda: new, probation=Probation(3600, minimum_calls=1)))
                await until(lambda: deployed.generation == 2)
                for _ in range(5):
                    with pytest.raises(type(error)):
                        await answer(deployed)
                assert not deployed._trial.over.is_set
                assert 5 == deployed.counters()["neither"]
                swap.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await swap

        with no_leaks():
            asyncio.run(main())

    def test_a_deadline_that_passed_speaks_against_the_model_and_is_not_asked_again(self):
        async def main():
            old = Model("old")
            new = Model("new", error=RunDeadlineError(0.5))
            async with deployment(old) as deployed:
                swap = asyncio.ensure_future(deployed.swap(lambda: new, probation=Probation(3600, minimum_calls=2)))
                await until(lambda: deployed.generation == 2)
                for _ in range(2):
                    with pytest.raises(RunDeadlineError):
                        await answer(deployed)
                with pytest.raises(UnfitModelError):
                    await swap
                assert 0 == old.asked

        asyncio.run(main())

    def test_what_failed_before_as_well_is_no_reason_to_go_back(self):
        async def main():
            old, new = Model("old", error=RuntimeError("bad input")), Model("new", error=RuntimeError("bad input"))
            async with deployment(old) as deployed:
                for _ in range(4):
                    with pytest.raises(RuntimeError):
                        await answer(deployed)
                swap = asyncio.ensure_future(deployed.swap(lambda: new, probation=Probation(3600, minimum_calls=1)))
                await until(lambda: deployed.generation == 2)
                for _ in range(4):
                    with pytest.raises(RuntimeError):
                        await answer(deployed)
                assert not deployed._trial.over.is_set
                swap.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await swap

        with no_leaks():
            asyncio.run(main())

    @given(
        before=st.tuples(st.integers(0, 50), st.integers(0, 50)),
        after=st.tuples(st.integers(0, 50), st.integers(0, 50)),
        rate=st.floats(0.01, 1),
    )
    def test_nothing_goes_that_fails_no_more_than_what_was_before(self, before, after, rate):
        old, new = Tally(*before), Tally(*after)
        verdict = Probation(failure_rate=rate, minimum_calls=1).verdict(old, new)
        assert (verdict is None) == (new.judged < 1 or new.rate < old.rate + rate)
        if verdict is not None:
            assert new.rate > old.rate

    @pytest.mark.parametrize("settings", [{"seconds": 0}, {"failure_rate": 0}, {"minimum_calls": 0}])
    def test_a_setting_outside_its_range_is_named(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Probation(**settings)


class TestShadow:
    def swapped(self, new, **settings):
        """A swap with a shadow, while calls come one after another; what callers got, and what came of it."""

        async def main():
            async with deployment() as deployed:
                shadow = Shadow(lambda old, new: old["x"] == new["x"], **settings)
                swap = asyncio.ensure_future(deployed.swap(lambda: new, shadow=shadow, probation=None))
                seen = set()
                while deployed.generation == 1 and not swap.done():
                    seen.add((await deployed.run({"x": 1}))["y"])
                await asyncio.wait([swap])
                return seen, swap

        with no_leaks():
            return asyncio.run(main())

    def test_a_model_that_agrees_gets_the_traffic_after_so_many_calls(self):
        new = Model("new")
        seen, swap = self.swapped(new, calls=4)
        assert ({"old"}, 2, 4) == (seen, swap.result(), new.asked)

    def test_a_model_that_does_not_agree_goes_and_no_caller_saw_its_answers(self):
        new = Model("new", error=ValueError("shapes differ"))
        seen, swap = self.swapped(new, calls=10, least=0.8)
        assert {"old"} == seen
        with pytest.raises(UnfitModelError, match=r"3 of 3 answers differ.*: ValueError: shapes differ") as caught:
            swap.result()
        assert ("shadow", 1) == (caught.value.stage, new.closed)

    def test_few_calls_are_kept_for_it_whatever_the_traffic_and_what_a_caller_does_to_an_answer_changes_none(self):
        mirror = Mirror(Shadow(lambda old, new: True))
        answer = {"y": np.zeros(3)}
        for _ in range(100):
            mirror.offer(None, answer)
        answer["y"][:] = 1
        assert 2 == len(mirror._waiting)
        assert not mirror._waiting[0][1]["y"].any()

    def test_an_answer_that_cannot_be_copied_is_the_callers_all_the_same(self, caplog):
        async def main():
            lock = threading.Lock()
            async with deployment() as deployed:
                shadow = Shadow(lambda old, new: old["x"] is new["x"], calls=2)
                swap = asyncio.ensure_future(deployed.swap(lambda: Model("new"), shadow=shadow, probation=None))
                while deployed.generation == 1:
                    assert (await deployed.run({"x": lock}))["x"] is lock
                assert 2 == await swap

        with no_leaks():
            asyncio.run(main())
        assert "deepcopy" in caplog.text

    def test_too_few_calls_prove_nothing(self):
        async def main():
            async with deployment() as deployed:
                shadow = Shadow(lambda old, new: True, calls=4, timeout=60)
                with pytest.raises(UnfitModelError, match="0 of 4 calls came within 60 s"):
                    await deployed.swap(lambda: Model("new"), shadow=shadow)
                assert asyncio.get_running_loop().time() >= 60

        in_virtual_time(main())

    def test_calls_of_plain_threads_are_compared_too(self):
        async def main():
            compared = []
            async with deployment() as deployed:
                shadow = Shadow(lambda old, new: compared.append((old["y"], new["y"])) is None, calls=2)
                swap = asyncio.ensure_future(deployed.swap(lambda: Model("new"), shadow=shadow, probation=None))
                while deployed.generation == 1:
                    await asyncio.to_thread(deployed.run_sync, {"x": 1})
                assert (2, 2 * [("old", "new")]) == (await swap, compared)

        with no_leaks():
            asyncio.run(main())


class TestCancelled:
    @pytest.mark.parametrize("at_once", [True, False])
    @pytest.mark.parametrize("tests", ["plain", "async"])
    def test_at_every_await_in_turn_the_old_model_serves_on_and_the_new_one_is_closed(self, at_once, tests):
        async def fine(*models):
            await asyncio.sleep(0)

        async def main():
            reached, step, before, committed = True, 0, 0, 0
            test = fine if tests == "async" else lambda *models: None
            while reached:
                old, made = Model("old"), []

                def load(made=made):
                    made.append(Model("new"))
                    return made[-1]

                async with deployment(old) as deployed:
                    life = CancelAt(
                        deployed.swap(load, self_test=test, gate=test, probation=Probation(0.001)),
                        step,
                        at_once=at_once,
                    )
                    task = asyncio.ensure_future(awaiting(life))
                    await asyncio.wait([task])
                    assert task.cancelled() or not life.reached
                    if old.closed:  # the last await, where there is no way back
                        committed += life.reached
                        assert ("new", 0) == (await answer(deployed), made[0].closed)
                    else:
                        before += 1
                        assert ("old", 1) == (await answer(deployed), deployed.generation)
                        assert all(model.closed == 1 for model in made)
                    assert 1 == deployed.gauges()["models"]
                    assert not deployed.calls
                reached, step = life.reached, step + 1
            return before, committed

        with no_leaks():
            before, committed = asyncio.run(main())
        assert before >= 5
        assert committed <= 2

    def test_a_cancelled_swap_does_not_wait_for_the_calls_of_others_but_they_are_answered(self):
        async def main():
            new = Model("new", hold=True)
            async with deployment() as deployed:
                swap = asyncio.ensure_future(deployed.swap(lambda: new, probation=Probation(3600)))
                await until(lambda: deployed.generation == 2)
                slow = asyncio.ensure_future(answer(deployed))
                await until(lambda: deployed.calls)
                swap.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await swap
                assert ("old", 0) == (await answer(deployed), new.closed)
                new.released.set()
                assert "new" == await slow
                await until(lambda: new.closed)
                await until(lambda: deployed.gauges()["models"] == 1)

        with no_leaks():
            asyncio.run(main())

    def test_after_a_swap_that_was_cancelled_in_its_drain_the_next_one_still_waits_for_the_last_call(self):
        async def main():
            old = Model("old", hold=True)
            async with deployment(old) as deployed:
                first = asyncio.ensure_future(answer(deployed))
                await until(lambda: deployed.calls)
                swap = asyncio.ensure_future(deployed.swap(lambda: Model("new"), probation=None))
                await until(lambda: deployed.generation == 2)
                await until(lambda: deployed._live[0].leaving)
                swap.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await swap
                old.released.set()
                assert "old" == await first
                old.released.clear()
                second = asyncio.ensure_future(answer(deployed))
                await until(lambda: deployed.calls)
                swap = asyncio.ensure_future(deployed.swap(lambda: Model("third"), probation=None))
                await until(lambda: deployed.generation == 3)
                assert "third" == await answer(deployed)
                assert not old.closed
                old.released.set()
                assert "old" == await second
                assert 3 == await swap
                assert old.closed

        with no_leaks():
            asyncio.run(main())

    @LIBRARIES
    def test_a_cancelled_call_is_given_back_and_proves_nothing(self, library):
        async def main():
            old = Backend.load(models.endless().SerializeToString(), threads=1)
            async with Deployment("scores", old) as deployed:
                with anyio.move_on_after(0.0):
                    await deployed.run(models.FOREVER)
                async with anyio.create_task_group() as group:
                    group.start_soon(deployed.run, models.FOREVER)
                    while not old.calls:
                        await anyio.lowlevel.checkpoint()
                    group.cancel_scope.cancel()
                assert (0, 2) == (deployed.calls, deployed.counters()["neither"])

        with no_leaks():
            anyio.run(main, backend=library)

    def test_a_stream_that_is_left_gives_its_place_back(self):
        async def main():
            async with deployment() as deployed:
                stream = deployed.iterate(lambda model: model.stream("xyz"))
                await anext(stream)
                assert 1 == deployed.calls
                await stream.aclose()
                assert (0, 1) == (deployed.calls, deployed.counters()["neither"])

        with no_leaks():
            asyncio.run(main())


class TestClosing:
    def test_a_closed_deployment_says_so_and_closing_again_does_nothing(self):
        old = Model("old")
        deployed = deployment(old)
        deployed.close()
        deployed.close()
        assert 2 == old.closed  # closing is the model's own to repeat
        with pytest.raises(DeploymentClosedError, match="'scores' is closed"):
            deployed.run_sync({})
        with pytest.raises(DeploymentClosedError):
            asyncio.run(deployed.swap(Model))

    @pytest.mark.parametrize("stage", ["load", "probation", "drain"])
    def test_closing_ends_a_swap_wherever_it_is_and_leaves_no_model(self, stage):
        async def main():
            old, new = Model("old", hold=stage == "drain"), Model("new")
            loading, go_on = threading.Event(), threading.Event()

            def load():
                loading.set()
                assert go_on.wait(30)
                return new

            deployed = deployment(old)
            slow = asyncio.ensure_future(answer(deployed)) if stage == "drain" else None
            await until(lambda: deployed.calls or slow is None)
            probation = Probation(3600) if stage == "probation" else None
            swap = asyncio.ensure_future(deployed.swap(load, probation=probation))
            await until(loading.is_set)
            if stage != "load":
                go_on.set()
                await until(lambda: deployed.generation == 2)
            await deployed.aclose()
            go_on.set()
            old.released.set()
            with pytest.raises(DeploymentClosedError):
                await swap
            assert old.closed
            assert new.closed
            if slow is not None:  # a real model ends it with BackendClosedError
                await asyncio.gather(slow, return_exceptions=True)

        with no_leaks():
            asyncio.run(main())

    @LIBRARIES
    def test_draining_refuses_new_calls_and_waits_for_those_in_flight(self, library):
        async def main():
            old = Backend.load(models.endless().SerializeToString(), threads=1)
            async with Deployment("scores", old) as deployed:
                async with anyio.create_task_group() as group:
                    group.start_soon(deployed.run, models.FOREVER)
                    while not deployed.calls:
                        await anyio.lowlevel.checkpoint()
                    assert not await deployed.drain(0.0)
                    assert not deployed.drain_sync(0.0)
                    with pytest.raises(DeploymentClosedError):
                        await deployed.run(models.counting(1))
                    group.cancel_scope.cancel()
                assert await deployed.drain(0.0)
                assert deployed.drain_sync(0.0)

        with no_leaks():
            anyio.run(main, backend=library)


class TestUnderLoad:
    def test_swaps_of_real_models_fail_no_request(self):
        async def main():
            backend = Backend.load(models.chain(2).SerializeToString(), threads=1)
            answered, stop = [], False
            async with Deployment("scores", MicroBatcher(backend, max_delay=0.0, owns=True)) as deployed:

                async def ask(value):
                    while not stop:
                        outputs = await deployed.run({"x": np.full((1, 64), value, np.float32)})
                        answered.append(float(outputs["h2"][0, 0]) == value)

                def ask_in_a_thread():
                    while not stop:
                        answered.append(deployed.run_sync(models.rows(1))["h2"][0, 0] == 1)

                def load():
                    again = Backend.load(models.chain(2).SerializeToString(), threads=1)
                    return MicroBatcher(again, max_delay=0.0, owns=True)

                thread = threading.Thread(target=ask_in_a_thread)
                thread.start()
                try:
                    async with asyncio.TaskGroup() as group:
                        for value in range(8):
                            group.create_task(ask(float(value)))
                        for _ in range(5):
                            seen = len(answered)
                            await deployed.swap(load, probation=Probation(0.01))
                            await until(lambda seen=seen: len(answered) > seen + 10)
                        stop = True
                finally:
                    stop = True
                    thread.join()
                counted = deployed.counters()
            return answered, counted

        with no_leaks():
            answered, counted = asyncio.run(main())
        assert len(answered) > 50
        assert all(answered)
        assert (len(answered), 0, 0, 0) == tuple(counted.values())


def test_it_is_no_decorator_and_has_no_settings_to_change():
    with deployment() as deployed:
        with pytest.raises(TypeError):
            deployed(len)
        with pytest.raises(TypeError, match="no settings"):
            deployed.update(name="other")
        assert "<Deployment 'scores', generation 1, 0 calls>" == repr(deployed)
