"""Several models answer as one: calls are spread, bad ones are left out, and every place comes back."""

import asyncio
import contextlib
import random
import threading
from collections import Counter

import pytest

from seawall import CircuitBreaker, CircuitOpenError, Hedge, Rejected, Retry
from seawall.core.events import CallRejected
from seawall.engine.balancing import LeastLoaded, PeakEwma, RoundRobin
from seawall.engine.ejection import Ejection
from seawall.engine.replica import Replica
from seawall.engine.replicas import (
    NoReplicaError,
    PanicChanged,
    ReplicaEjected,
    ReplicaRestored,
    Replicas,
    ReplicasClosedError,
)
from seawall.engine.serving import Serving
from seawall.inference.errors import InvalidInputError, RuntimeDeviceError
from seawall.policies.circuit_breaker import State
from seawall.testing import capture_events, no_leaks, virtual_time
from tests.cancelling import CancelAt
from tests.engine.standing import Model, awaiting

LOST = RuntimeDeviceError("running the model", "DeviceReset")


class Timed(Model):
    """Answers after a while of the loop's time."""

    def __init__(self, name="a", *, seconds=0.1, error=None):
        super().__init__(name, error=error)
        self.seconds = seconds

    async def run(self, inputs, *, deadline=None):
        await asyncio.sleep(self.seconds)
        return self.run_sync(inputs)

    async def stream(self, prompt):
        for letter in prompt:
            await asyncio.sleep(self.seconds)
            if self.error is not None:
                raise self.error
            yield self.name + letter


class Full(Model):
    """Refuses."""

    def __init__(self, name, retry_after):
        super().__init__(name, error=Rejected("queue", retry_after=retry_after))

    async def stream(self, prompt):
        self.asked += 1
        raise self.error
        yield


def of(*models, **settings):
    return Replicas("answers", {model.name: model for model in models}, **settings)


def asked(replicas, calls):
    return "".join(replicas.run_sync({})["y"] for _ in range(calls))


def standing(replicas):
    return {one.name: one for one in replicas.snapshot()}


def test_calls_of_tasks_and_threads_take_turns():
    with of(Model("a"), Model("b"), Model("c"), rule=RoundRobin()) as replicas:
        assert "abcabc" == asked(replicas, 6)
        assert "a" == asyncio.run(replicas.run({}))["y"]
        assert 7 == replicas.counters()["success"] == sum(replicas.counters().values())


def test_weights_decide_the_shares_and_can_be_changed_while_they_serve():
    with of(Model("a"), Model("b"), rule=RoundRobin(), weights={"a": 3.0}) as replicas:
        assert Counter("aaab" * 10) == Counter(asked(replicas, 40))
        replicas.weigh("b", 3.0)
        assert 20 == pytest.approx(Counter(asked(replicas, 40))["a"], abs=1)


def test_calls_and_streams_count_until_they_end_and_the_least_loaded_is_asked():
    async def main():
        async with of(Timed("a"), Timed("b"), rule=LeastLoaded()) as replicas:
            stream = replicas.iterate(lambda model: model.stream("xyz"))
            assert "ax" == await anext(stream)
            assert {"a": 1, "b": 0} == {name: one.active for name, one in standing(replicas).items()}
            both = await asyncio.gather(replicas.run({}), replicas.run({}))
            assert {"b", "a"} == {answer["y"] for answer in both}
            assert 1 == replicas.gauges()["active"]
            await stream.aclose()
            assert 0 == replicas.gauges()["active"]
        return standing(replicas)

    with no_leaks():
        found = virtual_time.run(main())
    assert (1, 1) == (found["a"].neither, found["a"].success)


def test_the_quick_one_gets_most_of_the_work():
    async def main():
        rule = PeakEwma(rng=random.Random(3))
        async with of(Timed("a", seconds=0.05), Timed("b", seconds=0.5), rule=rule) as replicas:

            async def client():
                for _ in range(50):
                    await replicas.run({})

            await asyncio.gather(*(client() for _ in range(6)))
            return standing(replicas)

    found = virtual_time.run(main())
    assert 300 == found["a"].success + found["b"].success
    assert found["a"].success > 4 * found["b"].success
    assert 0.05 == pytest.approx(found["a"].latency, rel=0.5)


def test_of_a_stream_the_first_piece_is_the_latency():
    async def main():
        async with of(Timed("a"), rule=PeakEwma()) as replicas:
            async for _ in replicas.iterate(lambda model: model.stream("x" * 50)):
                pass
            return standing(replicas)["a"].latency

    assert 0.1 == pytest.approx(virtual_time.run(main()))


def test_a_refusal_goes_on_to_the_others_and_the_mildest_reaches_the_caller():
    full, fuller, free = Full("a", 5.0), Full("b", 2.0), Model("c")
    with of(full, fuller, free, rule=RoundRobin()) as replicas:
        assert "ccc" == asked(replicas, 3)
        assert 1 + 1 + 1 <= replicas.counters()["spilled"]
    with of(Full("a", 5.0), Full("b", 2.0), Full("c", None)) as replicas:
        for attempt in (lambda: replicas.run_sync({}), lambda: asyncio.run(replicas.run({}))):
            with pytest.raises(Rejected) as caught:
                attempt()
            assert 2.0 == caught.value.retry_after
        assert 6 == replicas.counters()["neither"]
        assert 0 == replicas.gauges()["active"]
    assert [State.CLOSED] * 3 == [one.state for one in replicas.snapshot()]


def test_a_stream_that_is_refused_before_its_first_piece_goes_on_too():
    async def main():
        async with of(Full("a", 1.0), Timed("b"), rule=RoundRobin()) as replicas:
            found = [piece async for piece in replicas.iterate(lambda model: model.stream("xy"))]
            stream = replicas.iterate(lambda model: model.stream("xy"))
            await anext(stream)
            standing_now = replicas.gauges()["active"]
            await stream.aclose()
            return found, standing_now

    with no_leaks():
        assert (["bx", "by"], 1) == virtual_time.run(main())


def test_a_failure_is_the_callers_and_five_in_a_row_eject(virtual_clock):
    bad, good = Model("bad", error=LOST), Model("good")
    with capture_events(ReplicaEjected, ReplicaRestored) as captured, of(bad, good, rule=RoundRobin()) as replicas:
        for _ in range(5):
            with pytest.raises(RuntimeDeviceError):
                replicas.run_sync({})
            assert "good" == replicas.run_sync({})["y"]
        assert ["good"] * 4 == [replicas.run_sync({})["y"] for _ in range(4)]
        assert standing(replicas)["bad"].ejected
        assert 1 == replicas.gauges()["healthy"]
        virtual_clock.advance(30.0)
        bad.error = None
        assert {"bad", "good"} == {replicas.run_sync({})["y"] for _ in range(3)}
    assert [
        ReplicaEjected("answers", captured[0].at, "bad", "5 failures in a row", 30.0),
        ReplicaRestored("answers", captured[0].at + 30.0, "bad"),
    ] == list(captured)
    assert 1 == replicas.counters()["ejections."]


def test_faults_of_the_caller_and_cancellations_say_nothing_about_a_replica():
    model = Model("a", error=InvalidInputError("x", "a", "b"))
    with capture_events() as captured, of(model, ejection=Ejection(consecutive_failures=1)) as replicas:
        for _ in range(3):
            with pytest.raises(InvalidInputError):
                replicas.run_sync({})
    assert [] == list(captured)
    assert 3 == replicas.counters()["neither"]


def test_what_is_no_fault_of_the_replica_does_not_open_its_breaker_either():
    with of(Model("a", error=InvalidInputError("x", "a", "b")), breaker=breaker) as replicas:
        for _ in range(5):
            with pytest.raises(InvalidInputError):
                replicas.run_sync({})
    assert State.CLOSED is standing(replicas)["a"].state


def test_a_call_that_finds_the_probe_taken_goes_elsewhere_and_holds_no_place(monkeypatch):
    with of(Model("bad", error=LOST), Model("good"), rule=RoundRobin(), breaker=breaker, ejection=None) as replicas:
        for _ in range(4):
            with contextlib.suppress(RuntimeDeviceError):
                replicas.run_sync({})
        assert State.OPEN is standing(replicas)["bad"].state
        monkeypatch.setattr(Replica, "admits", lambda replica: True)  # as it looked a moment ago
        assert ["good"] * 4 == [replicas.run_sync({})["y"] for _ in range(4)]
        assert 0 == replicas.gauges()["active"]


class Breaking(Timed):
    """Refuses in the middle of a stream, which no other replica can go on with."""

    async def stream(self, prompt):
        yield self.name + prompt[0]
        raise Rejected("queue")


def test_a_stream_that_is_refused_after_its_first_piece_is_the_callers():
    async def main():
        seen = []
        async with of(Breaking("a"), Timed("b"), rule=RoundRobin()) as replicas:
            with pytest.raises(Rejected):
                async for piece in replicas.iterate(lambda model: model.stream("xy")):
                    seen.append(piece)
            assert 0 == replicas.gauges()["active"]
        return seen

    assert ["ax"] == virtual_time.run(main())


def test_one_that_is_leaving_is_not_ejected_any_more():
    async def main():
        bad = Timed("bad", error=LOST)
        with capture_events() as captured:
            ejection = Ejection(consecutive_failures=1)
            async with of(bad, Timed("b"), Timed("c"), rule=RoundRobin(), ejection=ejection) as replicas:
                task = asyncio.create_task(replicas.run({}))
                await asyncio.sleep(0)
                assert bad is await replicas.remove("bad", timeout=10)
                await asyncio.wait([task])
                assert isinstance(task.exception(), RuntimeDeviceError)
        return list(captured)

    assert [] == virtual_time.run(main())


def breaker(name):
    return CircuitBreaker(name, consecutive_failures=2, reset_timeout=10.0)


def test_a_replica_whose_breaker_is_open_is_left_out_and_probed_by_one_call(virtual_clock):
    bad, good = Model("bad", error=LOST), Model("good")
    with of(bad, good, rule=RoundRobin(), breaker=breaker, ejection=None) as replicas:
        with capture_events(CallRejected) as refused:
            for _ in range(2):
                with pytest.raises(RuntimeDeviceError):
                    replicas.run_sync({})
                replicas.run_sync({})
            assert State.OPEN is standing(replicas)["bad"].state
            assert ["good"] * 5 == [replicas.run_sync({})["y"] for _ in range(5)]
            virtual_clock.advance(10.0)
            with pytest.raises(RuntimeDeviceError):  # the probe
                for _ in range(2):
                    replicas.run_sync({})
            assert ["good"] * 5 == [replicas.run_sync({})["y"] for _ in range(5)]
            virtual_clock.advance(10.0)
            bad.error = None
            assert {"bad", "good"} == {replicas.run_sync({})["y"] for _ in range(3)}
            assert State.CLOSED is standing(replicas)["bad"].state
        assert [] == list(refused)


def test_only_one_call_at_a_time_probes():
    async def main():
        async with of(Timed("bad", error=LOST), Timed("good"), breaker=breaker, ejection=None) as replicas:
            for _ in range(8):
                await asyncio.gather(replicas.run({}), return_exceptions=True)
            replicas._replicas["bad"].model.error = None
            await asyncio.sleep(10.0)
            answers = await asyncio.gather(*(replicas.run({}) for _ in range(6)))
            return Counter(answer["y"] for answer in answers)

    assert {"bad": 1, "good": 5} == virtual_time.run(main())


def test_while_none_may_be_asked_calls_are_refused_with_the_time_to_come_back(virtual_clock):
    with of(Model("a", error=LOST), Model("b", error=LOST), breaker=breaker, ejection=None) as replicas:
        for _ in range(4):
            with pytest.raises(RuntimeDeviceError):
                replicas.run_sync({})
            virtual_clock.advance(1.0)
        with pytest.raises(NoReplicaError, match="'answers' has no replica that may be asked") as caught:
            replicas.run_sync({})
        assert 0 < caught.value.retry_after <= 10.0
        assert 1 == replicas.counters()["refused"]
        virtual_clock.advance(10.0)
        with pytest.raises(RuntimeDeviceError):
            replicas.run_sync({})


def test_while_all_are_ejected_and_panic_is_off_the_first_to_be_back_is_the_time_to_come_back(virtual_clock):
    models = [Model("a", error=LOST), Model("b", error=LOST)]
    ejection = Ejection(consecutive_failures=1, max_ejected=1.0, time=20.0)
    with of(*models, rule=RoundRobin(), ejection=ejection, panic_threshold=0) as replicas:
        for _ in range(2):
            with pytest.raises(RuntimeDeviceError):
                replicas.run_sync({})
            virtual_clock.advance(5.0)
        with pytest.raises(NoReplicaError) as caught:
            replicas.run_sync({})
        assert 10.0 == pytest.approx(caught.value.retry_after)


def test_too_few_left_is_panic_and_the_ejected_are_asked_as_well(virtual_clock):
    models = [Model(name, error=LOST) for name in "abc"] + [Model("d")]
    ejection = Ejection(consecutive_failures=1, max_ejected=1.0)
    with capture_events(PanicChanged) as captured, of(*models, rule=RoundRobin(), ejection=ejection) as replicas:
        for _ in range(3):
            with pytest.raises(RuntimeDeviceError):
                replicas.run_sync({})
        assert [True] * 3 + [False] == [one.ejected for one in replicas.snapshot()]
        for model in models:
            model.error = None
        assert set("abcd") == set(asked(replicas, 4))
        assert 1.0 == replicas.gauges()["panicking"]
        virtual_clock.advance(30.0)
        asked(replicas, 4)
        assert 0.0 == replicas.gauges()["panicking"]
    assert [(True, 1, 4), (False, 4, 4)] == [(event.panicking, event.available, event.replicas) for event in captured]


def test_without_a_panic_threshold_the_good_ones_do_all_the_work(virtual_clock):
    models = [Model("a", error=LOST), Model("b", error=LOST), Model("c")]
    ejection = Ejection(consecutive_failures=1, max_ejected=1.0)
    with of(*models, rule=RoundRobin(), ejection=ejection, panic_threshold=0) as replicas:
        for _ in range(2):
            with pytest.raises(RuntimeDeviceError):
                replicas.run_sync({})
        assert "cccccc" == asked(replicas, 6)


def test_one_is_added_and_one_removed_while_they_serve_and_no_call_fails():
    async def main():
        a, b, c = Timed("a"), Timed("b"), Timed("c")
        answers = Counter()
        async with of(a, b) as replicas:

            async def client():
                for _ in range(20):
                    answers[(await replicas.run({}))["y"]] += 1

            clients = [asyncio.create_task(client()) for _ in range(5)]
            await asyncio.sleep(0.55)
            replicas.add("c", c)
            found = await replicas.remove("a")
            assert found is a
            assert 0 == a.closed
            before = a.asked
            found.close()
            await asyncio.gather(*clients)
            assert before == a.asked
            assert {"b", "c"} == standing(replicas).keys()
        assert (1, 1, 1) == (a.closed, b.closed, c.closed)
        return answers

    with no_leaks():
        answers = virtual_time.run(main())
    assert 100 == answers.total()
    assert answers["c"] > 20


def test_removing_waits_for_streams_only_so_long_and_a_cancelled_removal_has_removed():
    async def main():
        async with of(Timed("a"), Timed("b"), rule=RoundRobin()) as replicas:
            stream = replicas.iterate(lambda model: model.stream("x" * 100))
            await anext(stream)
            loop = asyncio.get_running_loop()
            before = loop.time()
            await replicas.remove("a", timeout=2.0)
            assert 2.0 == pytest.approx(loop.time() - before)
            assert {"b"} == standing(replicas).keys()
            assert "ax" == await anext(stream)  # it goes on
            await stream.aclose()
            other = replicas.iterate(lambda model: model.stream("xy"))
            await anext(other)
            task = asyncio.create_task(replicas.remove("b"))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert {} == standing(replicas)
            await other.aclose()
            with pytest.raises(NoReplicaError):
                await replicas.run({})

    with no_leaks():
        virtual_time.run(main())


def test_removing_waits_for_the_last_of_several_calls():
    async def main():
        async with of(Timed("a")) as replicas:
            streams = [replicas.iterate(lambda model: model.stream("xy")) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            task = asyncio.create_task(replicas.remove("a"))
            await asyncio.sleep(0)
            await streams[0].aclose()
            await asyncio.sleep(1.0)
            assert not task.done()
            await streams[1].aclose()
            await task

    with no_leaks():
        virtual_time.run(main())


def test_drained_they_take_no_more_and_wait_for_what_is_in_flight():
    async def main():
        async with of(Timed("a"), Timed("b")) as replicas:
            stream = replicas.iterate(lambda model: model.stream("xyz"))
            await anext(stream)
            assert not await replicas.drain(timeout=0.15)
            with pytest.raises(ReplicasClosedError, match="they take no more calls"):
                await replicas.run({})
            with pytest.raises(ReplicasClosedError):
                replicas.add("c", Timed("c"))
            draining = asyncio.create_task(replicas.drain())
            assert ["ay", "az"] == [piece async for piece in stream]
            assert await draining
            assert replicas.drain_sync(0)

    with no_leaks():
        virtual_time.run(main())


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("way", ["run", "stream"])
def test_cancelled_at_every_await_each_place_and_probe_comes_back(at_once, way):
    async def streamed(replicas):
        async for _ in replicas.iterate(lambda model: model.stream("xyz")):
            pass

    async def main():
        reached, step = True, 0
        replicas = of(Timed("a"), Timed("b"), breaker=breaker)
        async with replicas:
            while reached:
                coro = replicas.run({}) if way == "run" else streamed(replicas)
                life = CancelAt(coro, step, at_once=at_once)
                await asyncio.wait([asyncio.ensure_future(awaiting(life))])
                reached, step = life.reached, step + 1
                assert 0 == replicas.gauges()["active"]
            assert all(one.state is State.CLOSED and not one.failure for one in replicas.snapshot())
        return step

    with no_leaks():
        assert virtual_time.run(main()) >= 2


@pytest.mark.parametrize("at_once", [True, False])
def test_cancelled_as_the_block_ends_the_models_are_closed_all_the_same(at_once):
    async def used(replicas):
        async with replicas:
            pass

    async def main():
        reached, step = True, 0
        while reached:
            model = Model("a")
            life = CancelAt(used(of(model)), step, at_once=at_once)
            await asyncio.wait([asyncio.ensure_future(awaiting(life))])
            reached, step = life.reached, step + 1
            assert 1 == model.closed
        return step

    with no_leaks():
        assert asyncio.run(main()) >= 2


class Deaf(LeastLoaded):
    """A user's rule that raises."""

    def heard(self, standing, seconds, now):
        raise LookupError("a bug in somebody's rule")


@pytest.mark.parametrize("way", ["run", "run_sync", "stream"])
def test_a_rule_that_raises_is_heard_and_the_place_comes_back(way):
    replicas = of(Timed("a"), rule=Deaf(), breaker=breaker)

    async def streamed():
        return [piece async for piece in replicas.iterate(lambda model: model.stream("xyz"))]

    ask = {
        "run": lambda: virtual_time.run(replicas.run({})),
        "run_sync": lambda: replicas.run_sync({}),
        "stream": lambda: virtual_time.run(streamed()),
    }
    with replicas:
        with pytest.raises(LookupError, match="somebody's rule"):
            ask[way]()
        assert 0 == replicas.gauges()["active"]
        assert replicas.drain_sync(0)


def test_attempts_of_a_hedge_and_of_a_retry_go_apart():
    async def main():
        slow, quick = Timed("slow", seconds=5.0), Timed("quick", seconds=0.1)
        async with of(slow, quick, rule=RoundRobin()) as replicas:
            hedged = Hedge("answers", delay=0.2)(replicas.run)
            with replicas.apart():
                assert "quick" == (await hedged({}))["y"]
            flaky, fine = Timed("flaky", error=LOST), Timed("fine")
        async with of(flaky, fine, weights={"flaky": 1000.0}, ejection=None) as replicas:
            retried = Retry("answers", on=RuntimeDeviceError, attempts=2)(replicas.run)
            with pytest.raises(RuntimeDeviceError):  # twice the one of the greater weight
                await retried({})
            for _ in range(5):
                with replicas.apart():
                    assert "fine" == (await retried({}))["y"]
            with replicas.apart():
                assert ["fine", "fine"] == [(await retried({}))["y"] for _ in range(2)]  # in a second round

    virtual_time.run(main())


def test_threads_share_replicas_and_every_place_comes_back():
    with of(Model("a"), Model("b"), Model("c")) as replicas:

        def client():
            for _ in range(300):
                replicas.run_sync({})

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 1200 == replicas.counters()["success"]
        assert 0 == replicas.gauges()["active"]


def test_replicas_nest_and_say_what_they_are():
    inner = Replicas("inner", {"x": Model("x"), "y": Model("y")}, rule=RoundRobin())
    with of(Model("a"), rule=RoundRobin()) as replicas:
        replicas.add("inner", inner)
        assert "axay" == asked(replicas, 4)
        assert "<Replicas 'answers' of a, inner>" == repr(replicas)
    assert "<Replicas 'answers' of a, inner, closed>" == repr(replicas)
    assert isinstance(replicas, Serving)  # so a router takes them for an engine
    assert inner.closed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replicas("r", {}), "models must be a mapping of names to one model or more, got {}"),
        (lambda: of(Model("a"), weights={"b": 1.0}), "there is no replica 'b' to weigh"),
        (lambda: of(Model("a"), weights={"a": 0.0}), "weight must be more than 0 and finite, got 0.0"),
        (lambda: of(Model("a"), panic_threshold=1.5), "panic_threshold must be in"),
        (lambda: of(Model("a")).add("a", Model("a")), "has a replica 'a' already"),
        (lambda: of(Model("a")).weigh("a", -1.0), "weight must be more than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_open_breaker_inside_a_replica_is_a_refusal():
    with of(Model("a", error=CircuitOpenError("engine", 3.0)), Model("b"), rule=RoundRobin()) as replicas:
        assert "bb" == asked(replicas, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": [Model("a")]}, "models must be a mapping"),
        ({"models": {"a": None}}, "replica 'a' must be a model, which has close"),
        ({"rule": RoundRobin}, "rule must have choose and heard"),
        ({"rule": 3}, "rule must have choose and heard"),
        ({"ejection": Ejection}, "ejection must be an Ejection"),
    ],
)
def test_what_is_of_the_wrong_kind_is_refused_when_it_is_given(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Replicas("answers", **{"models": {"a": Model("a")}, **settings})
