"""A model that dies is made anew behind a breaker, and no input can make it reload."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from seawall import CircuitOpenError, Rejected, State
from seawall.engine import (
    ModelLost,
    ModelRebuilt,
    ModelSuspected,
    RebuildFailed,
    StepStuckError,
    Supervised,
    SupervisedClosedError,
    rebuilding,
    supervision,
)
from seawall.engine.failover import Failover
from seawall.engine.generations import Generation
from seawall.engine.rehearsal import UnfitModelError
from seawall.inference import Backend
from seawall.inference.errors import (
    BackendClosedError,
    CorruptModelError,
    InvalidInputError,
    NotFiniteOutputError,
    RuntimeDeviceError,
    RuntimeExhaustedError,
    RuntimeFailure,
)
from seawall.policies.fallback import FallbackUsed
from seawall.testing import capture_events, no_leaks
from tests.engine.standing import Model, until
from tests.inference import onnx_models as models

NAN = NotFiniteOutputError("scores", "y", 1)
LOST = RuntimeDeviceError("running the model", "DeviceReset")
SUSPICIOUS = [NAN, RuntimeFailure("running", "Fail"), StepStuckError("taking a step", "it did not end in 30 s")]


class Maker:
    """Makes models; the outcomes it is given come first: errors to raise, or models."""

    def __init__(self, *outcomes):
        self.outcomes, self.made = list(outcomes), []

    def __call__(self):
        outcome = self.outcomes.pop(0) if self.outcomes else Model(f"model {len(self.made) + 1}")
        if isinstance(outcome, Exception):
            raise outcome
        self.made.append(outcome)
        return outcome


def supervised(maker, **settings):
    return Supervised("scores", maker, **{"backoff": lambda attempt: 0.001, "test_interval": 0.0, **settings})


async def answer(served):
    return (await served.run({}))["y"]


async def answered_again(served, tries=100_000):
    """The first answer after a loss; refusals say when to come back."""
    for _ in range(tries):
        try:
            return await answer(served)
        except CircuitOpenError as error:
            refusal = error
        assert refusal.policy == "scores"
        assert refusal.retry_after is not None
        await asyncio.sleep(0)
    raise AssertionError("it never came back")


@pytest.mark.parametrize("error", [LOST, BackendClosedError("closed behind its users' back")])
def test_a_dead_model_is_closed_and_a_new_one_serves_after_typed_refusals(error):
    async def main():
        maker = Maker()
        async with supervised(maker) as served:
            assert "model 1" == await answer(served)
            first = maker.made[0]
            first.error = error
            with capture_events(ModelLost, ModelRebuilt) as captured:
                with pytest.raises(type(error)):
                    await answer(served)
                with pytest.raises(CircuitOpenError):
                    await answer(served)
                assert "model 2" == await answered_again(served)
            lost, rebuilt = captured
            assert "1 failures in a row" == lost.reason
            assert (1, True) == (rebuilt.attempt, rebuilt.seconds >= 0)
            assert (1, 1) == (first.closed, maker.made[1].warm)
            assert {"lost": 1, "rebuilt": 1, "failed": 0} == served.counters()
            assert State.CLOSED is served.breaker.state
        assert [1, 1] == [model.closed for model in maker.made]

    with no_leaks():
        asyncio.run(main())


def test_there_is_never_more_than_one_model_in_memory():
    async def main():
        maker = Maker()

        def load():
            assert all(model.closed for model in maker.made)
            return maker()

        async with supervised(load) as served:
            for _ in range(3):
                maker.made[-1].error = LOST
                with pytest.raises(RuntimeDeviceError):
                    await answer(served)
                await answered_again(served)
        assert 4 == len(maker.made)

    with no_leaks():
        asyncio.run(main())


def test_a_rebuild_that_fails_is_tried_again_each_time_later_until_it_works():
    async def main():
        asked = []

        def backoff(attempt):
            asked.append(attempt)
            return 0.001

        sick = Model("sick")
        maker = Maker(Model("first"), CorruptModelError("scores.onnx", "half written"), sick)
        async with supervised(maker, backoff=backoff, self_test=lambda model: model is not sick) as served:
            maker.made[0].error = LOST
            with capture_events(RebuildFailed, ModelRebuilt) as captured:
                with pytest.raises(RuntimeDeviceError):
                    await answer(served)
                assert "model 3" == await answered_again(served)
            errors = [type(event.error).__name__ for event in captured if isinstance(event, RebuildFailed)]
            assert ["CorruptModelError", "UnfitModelError"] == errors
            assert 3 == list(captured)[-1].attempt
            assert {1, 2, 3} <= set(asked)
            assert (1, 0) == (sick.closed, sick.asked)

    with no_leaks():
        asyncio.run(main())


class TestSuspicion:
    def asked_once(self, error, *, test):
        """What becomes of a model after one call that failed with `error`."""

        async def main():
            maker, tested = Maker(), []

            def canary(model):
                tested.append(model.name)
                return test

            async with supervised(maker) as served:
                served._rehearsal.canary = canary
                maker.made[0].error = error
                with pytest.raises(type(error)):
                    await answer(served)
                maker.made[0].error = None
                await until(lambda: not served._testing)
                name = await answered_again(served)
                return name, tested

        with no_leaks():
            return asyncio.run(main())

    @pytest.mark.parametrize("error", SUSPICIOUS)
    def test_a_model_whose_self_test_passes_serves_on(self, error):
        assert ("model 1", ["model 1"]) == self.asked_once(error, test=True)

    @pytest.mark.parametrize("error", SUSPICIOUS)
    def test_one_whose_self_test_fails_is_made_anew(self, error):
        assert ("model 2", ["model 1"]) == self.asked_once(error, test=False)

    @pytest.mark.parametrize(
        "error",
        [InvalidInputError("x", "nothing", "something"), RuntimeExhaustedError("running", "Fail"), ValueError()],
    )
    def test_what_says_nothing_about_the_model_is_no_reason_to_test_it(self, error):
        assert ("model 1", []) == self.asked_once(error, test=False)

    def test_a_self_test_that_a_policy_refused_proves_nothing(self):
        async def main():
            maker = Maker()
            async with supervised(maker) as served:
                tested = []

                def canary(model):
                    tested.append(model)
                    raise Rejected("busy")

                served._rehearsal.canary = canary
                maker.made[0].error = NAN
                with pytest.raises(NotFiniteOutputError):
                    await answer(served)
                await until(lambda: tested and not served._testing)
                assert State.CLOSED is served.breaker.state

        with no_leaks():
            asyncio.run(main())

    def test_an_input_that_makes_a_real_model_answer_nan_costs_no_reload(self):
        text = models.model(
            [models.make.make_node("Sqrt", ["x"], ["y"])], [models.tensor("x", ["n"])], [models.tensor("y", ["n"])]
        )
        loads = []

        def load():
            loads.append(Backend.load(text.SerializeToString(), threads=1, finite=True))
            return loads[-1]

        async def main():
            async with supervised(load) as served:
                with capture_events(ModelSuspected, ModelLost) as captured:
                    for _ in range(5):
                        with pytest.raises(NotFiniteOutputError):
                            await served.run({"x": np.array([-1], np.float32)})
                        await until(lambda: not served._testing)
                        assert [2.0] == (await served.run({"x": np.array([4], np.float32)}))["y"].tolist()
                assert {ModelSuspected} == {type(event) for event in captured}
            assert 1 == len(loads)

        with no_leaks():
            asyncio.run(main())

    def test_tests_are_no_more_frequent_than_their_interval(self):
        async def main():
            tested = []
            async with supervised(Maker(Model(error=NAN)), self_test=tested.append, test_interval=3600.0) as served:
                for _ in range(5):
                    with pytest.raises(NotFiniteOutputError):
                        await answer(served)
                    await until(lambda: not served._testing)
            assert 2 == len(tested)  # when it was loaded, and once

        with no_leaks():
            asyncio.run(main())


def test_a_wall_clock_that_jumps_moves_no_attempt(monkeypatch):
    async def main():
        maker = Maker(Model("first"), ValueError("not yet"))
        async with supervised(maker) as served:
            monkeypatch.setattr(time, "time", lambda: 1e12)
            maker.made[0].error = LOST
            with pytest.raises(RuntimeDeviceError):
                await answer(served)
            monkeypatch.setattr(time, "time", lambda: 0.0)
            assert "model 2" == await answered_again(served)

    with no_leaks():
        asyncio.run(main())


def test_a_model_that_dies_again_and_again_waits_longer_each_time():
    async def main():
        asked = []
        maker = Maker(*[Model(f"{number}", error=LOST) for number in range(3)])
        async with supervised(maker, backoff=lambda attempt: asked.append(attempt) or 0.001) as served:
            for _ in range(3):
                with pytest.raises(RuntimeDeviceError):
                    await answered_again(served)
            assert "model 4" == await answered_again(served)
            assert 3 == max(asked)
            assert 3 == served.counters()["lost"]

    with no_leaks():
        asyncio.run(main())


def test_where_the_system_has_no_thread_to_give_the_next_call_tries_again(monkeypatch):
    async def main():
        maker, starts = Maker(), []
        start = rebuilding.start

        def failing(*arguments):
            starts.append(arguments)
            if len(starts) < 3:
                raise RuntimeError("can't start new thread")
            return start(*arguments)

        monkeypatch.setattr(rebuilding, "start", failing)
        async with supervised(maker) as served:
            maker.made[0].error = LOST
            with pytest.raises(RuntimeDeviceError):
                await answer(served)
            monkeypatch.setattr(served, "backoff", lambda attempt: 0.001)
            served.breaker.force_closed()  # or nobody would be let in for half a minute
            assert "model 2" == await answered_again(served)
            assert 3 == len(starts)
        assert [1, 1] == [model.closed for model in maker.made]

    with no_leaks():
        asyncio.run(main())


def test_a_caller_who_has_the_probe_for_a_moment_delays_the_rebuilding_by_no_more(monkeypatch):
    def probe():
        while True:
            try:
                return served.breaker.admit()
            except CircuitOpenError:  # for a millisecond
                continue

    def wait(seconds):
        waited.append(seconds)
        held.cancel()

    waited = []
    served = supervised(Maker())
    served.breaker.update(probe_timeout=3600.0)  # what a refusal says where the probe is taken
    served.breaker.force_open(0.001)
    held = probe()
    monkeypatch.setattr(served._stopping, "wait_sync", wait)
    served._permit().cancel()
    assert [0.001] == waited


@pytest.mark.parametrize("answer_of_it", [float("inf"), float("nan"), -1.0, "soon", None, ZeroDivisionError()])
def test_a_backoff_that_gives_no_seconds_is_a_minute_and_the_model_comes_back(monkeypatch, answer_of_it):
    def backoff(attempt):
        if isinstance(answer_of_it, Exception):
            raise answer_of_it
        return answer_of_it

    async def main():
        maker = Maker()
        async with supervised(maker, backoff=backoff) as served:
            maker.made[0].error = LOST
            with pytest.raises(RuntimeDeviceError):
                await answer(served)
            return await answered_again(served)

    monkeypatch.setattr(rebuilding, "_CALM", 0.01)  # the minute
    with no_leaks():
        assert "model 2" == asyncio.run(main())


def test_where_the_system_has_no_thread_for_a_self_test_the_caller_gets_the_models_error(monkeypatch):
    async def main():
        maker, tested = Maker(), []
        async with supervised(maker, self_test=lambda model: tested.append(model.name)) as served:
            maker.made[0].error = NAN
            with monkeypatch.context() as patch:
                patch.setattr(supervision, "start", _no_thread)
                with pytest.raises(NotFiniteOutputError):
                    await answer(served)
            with pytest.raises(NotFiniteOutputError):
                await answer(served)
            await until(lambda: not served._testing)
            return tested

    with no_leaks():
        assert ["model 1", "model 1"] == asyncio.run(main())


def _no_thread(*work):
    raise RuntimeError("can't start new thread")


def test_closing_gives_everything_back_though_a_model_cannot_be_closed():
    class Stubborn(Model):
        def close(self):
            super().close()
            raise ValueError("no")

    async def main():
        lost, serving = Stubborn("lost"), Stubborn("serving")
        served = await supervised(Maker(serving)).open()
        served._dead = Generation(lost, 1)
        with pytest.raises(ValueError, match="no"):
            served.close()
        return lost.closed, serving.closed

    with no_leaks():
        assert (1, 1) == asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load": Model()}, "load must be a function"),
        ({"self_test": 3}, "self_test must be a function of the model"),
        ({"warm_up": "yes"}, "warm_up must be a function of the model"),
        ({"backoff": 3}, "backoff must be a plain function"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_at_once(settings, message):
    with pytest.raises(TypeError, match=message):
        Supervised("scores", **{"load": Model, **settings})


def test_a_load_that_returns_nothing_says_so():
    with pytest.raises(TypeError, match="what load returns must be a model"):
        supervised(lambda: None).open_sync()


def test_when_a_new_model_is_announced_the_breaker_lets_calls_pass_again():
    async def main():
        seen = []
        async with supervised(
            Maker(), listeners=[lambda event: seen.append((type(event), served.breaker.state))]
        ) as served:
            served.breaker.force_open()
            await until(lambda: len(seen) == 2)
            assert [(ModelLost, State.OPEN), (ModelRebuilt, State.CLOSED)] == seen

    with no_leaks():
        asyncio.run(main())


def test_a_breaker_that_is_isolated_while_the_model_is_rebuilt_stays_so():
    async def main():
        async with supervised(Maker(), backoff=lambda attempt: served.breaker.isolate() or 0.001) as served:
            served.breaker.force_open()
            await until(lambda: served.breaker.state is State.ISOLATED)
            for _ in range(200):
                await asyncio.sleep(0)
                assert State.ISOLATED is served.breaker.state

    with no_leaks():
        asyncio.run(main())


def test_isolated_by_hand_it_stays_so():
    async def main():
        maker = Maker(Model("first"), *[ValueError("no")] * 2)
        async with supervised(maker) as served:
            with capture_events(RebuildFailed) as captured:
                served.breaker.force_open()
                await until(lambda: list(captured))
                served.breaker.isolate()
                for _ in range(200):
                    assert State.ISOLATED is served.breaker.state
                    await asyncio.sleep(0)

    with no_leaks():
        asyncio.run(main())


def test_refusals_say_how_long_the_last_load_took_at_most():
    async def main():
        loading, go_on, maker = threading.Event(), threading.Event(), Maker()

        def load():
            if maker.made:
                loading.set()
                assert go_on.wait(30)
            return maker()

        async with supervised(load) as served:
            served.breaker.force_open()
            await until(loading.is_set)
            with pytest.raises(CircuitOpenError) as caught:
                await answer(served)
            assert 0 < caught.value.retry_after <= 1.0  # twice the load, a second at least; not half a minute
            go_on.set()
            await answered_again(served)

    with no_leaks():
        asyncio.run(main())


def test_a_model_may_be_rebuilt_by_hand():
    async def main():
        maker = Maker()
        async with supervised(maker) as served:
            served.breaker.force_open()
            assert "model 2" == await answered_again(served)
            assert maker.made[0].closed

    with no_leaks():
        asyncio.run(main())


def test_calls_in_flight_on_a_lost_model_end_before_it_is_closed():
    async def main():
        slow = Model("slow", hold=True)
        async with supervised(Maker(slow), drain_timeout=30.0) as served:
            waiting = asyncio.ensure_future(answer(served))
            await until(lambda: served.gauges()["active"])
            dying = served._current
            served.breaker.force_open()
            await until(lambda: dying.leaving)
            for _ in range(200):  # time enough to close it too early
                await asyncio.sleep(0)
                assert not slow.closed
            slow.released.set()
            assert "slow" == await waiting
            await answered_again(served)
            assert slow.closed

    with no_leaks():
        asyncio.run(main())


def test_with_a_failover_the_spare_answers_meanwhile():
    async def main():
        maker, spare, go_on = Maker(), Model("spare"), threading.Event()

        def load():
            assert not maker.made or go_on.wait(30)
            return maker()

        primary = await supervised(load).open()
        async with Failover("scores", primary, spare, spare_name="cpu") as scores:
            assert "model 1" == await answer(scores)
            maker.made[0].error = LOST
            with capture_events(FallbackUsed) as captured:
                assert 3 * ["spare"] == [await answer(scores) for _ in range(3)]
            assert 3 * ["scores.cpu"] == [event.step for event in captured]
            assert [RuntimeDeviceError, CircuitOpenError, CircuitOpenError] == [type(e.error) for e in captured]
            go_on.set()
            while await answer(scores) != "model 2":  # noqa: ASYNC110 - another thread makes it
                await asyncio.sleep(0)
        assert spare.closed

    with no_leaks():
        asyncio.run(main())


class TestOpening:
    def test_what_cannot_be_loaded_at_first_is_the_openers_error(self):
        error = CorruptModelError("scores.onnx", "half written")
        with no_leaks(), pytest.raises(CorruptModelError), supervised(Maker(error)):
            pass

    def test_a_model_that_fails_its_first_self_test_is_closed(self):
        maker = Maker()
        served = supervised(maker, self_test=lambda model: False)
        with no_leaks(), pytest.raises(UnfitModelError, match="answered False"), served:
            pass
        assert maker.made[0].closed

    def test_it_serves_plain_threads_and_streams_too(self):
        async def stream(served):
            return [item async for item in served.iterate(lambda model: model.stream("xy"))]

        maker = Maker(Model("m"))
        with no_leaks(), supervised(maker) as served:
            assert "m" == served.run_sync({})["y"]
            assert ["mx", "my"] == asyncio.run(stream(served))
        with pytest.raises(SupervisedClosedError):
            served.run_sync({})

    def test_closing_while_it_is_rebuilt_ends_the_rebuilding_and_leaves_no_model(self):
        loading, go_on = threading.Event(), threading.Event()
        maker = Maker()

        def load():
            if maker.made:
                loading.set()
                assert go_on.wait(30)
            return maker()

        with no_leaks():
            served = supervised(load).open_sync()
            served.breaker.force_open()
            assert loading.wait(30)
            closing = threading.Thread(target=served.close)
            closing.start()
            while not served.closed:
                pass
            go_on.set()
            closing.join()
            assert [1, 1] == [model.closed for model in maker.made]

    def test_closing_while_it_waits_for_the_next_attempt_waits_no_longer(self):
        maker = Maker(Model("first"), *[ValueError("no")] * 3)
        served = supervised(maker, backoff=lambda attempt: 0.0 if attempt == 1 else 3600.0)
        with no_leaks(), served, capture_events(RebuildFailed) as captured:
            served.breaker.force_open()
            while not list(captured) or served.breaker.state is not State.OPEN:
                pass
            with pytest.raises(CircuitOpenError) as caught:
                served.run_sync({})
        assert "RebuildError: 'scores' could not be rebuilt: no" == caught.value.failure

    @pytest.mark.parametrize("library", ["asyncio", "trio"])
    def test_it_is_drained(self, library):
        async def main():
            async with supervised(lambda: Backend.load(models.endless().SerializeToString(), threads=1),
                                  warm_up=None) as served:  # fmt: skip
                async with anyio.create_task_group() as group:
                    group.start_soon(served.run, models.FOREVER)
                    while not served.gauges()["active"]:
                        await anyio.lowlevel.checkpoint()
                    assert not await served.drain(0.0)
                    group.cancel_scope.cancel()
                assert await served.drain(0.0)
                assert served.drain_sync(0.0)

        with no_leaks():
            anyio.run(main, backend=library)


FORK = """
import os, sys, time, warnings
from tests.inference import onnx_models as models
from seawall.inference import Backend, errors
from seawall.engine.supervision import Supervised
from seawall import CircuitOpenError
served = Supervised("scores", lambda: Backend.load(models.linear().SerializeToString(), threads=1)).open_sync()
served.run_sync(models.rows(1))
child = os.fork()
if child == 0:
    seen = []
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            served.run_sync(models.rows(1))
            break
        except (errors.ForkedBackendError, CircuitOpenError) as error:
            seen.append(type(error).__name__)
            time.sleep(0.01)
    print(seen[0], set(seen[1:]) <= {"CircuitOpenError"}, served.counters()["rebuilt"], flush=True)
    served.close()
    sys.exit(0)
_, status = os.waitpid(child, 0)
print(status, len(served.run_sync(models.rows(1))["y"]), served.counters()["lost"])
served.close()
"""


def test_in_a_forked_child_it_loads_a_model_of_its_own():
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ["ForkedBackendError True 1", "0 1 0"] == done.stdout.splitlines(), done.stderr
    assert "" == done.stderr
