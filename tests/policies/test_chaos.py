from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import random
import threading
from contextlib import aclosing
from datetime import timedelta

import pytest

from seawall import Chaos, ChaosInjected, CircuitBreaker, Pipeline, State, chaos, policies_of, use_clock
from seawall.testing import run


def always(**settings):
    return Chaos("c", **{"rate": 1.0, "enabled": True, **settings})


def now():
    return asyncio.get_running_loop().time()


def test_it_does_nothing_unless_it_is_enabled():
    guard = Chaos("c", rate=1.0, exception=ConnectionError, latency=3600)

    @guard
    async def call():
        return "done"

    async def main():
        assert await call() == "done"
        assert now() == 0

    run(main())
    assert guard(len)("four") == 4
    assert guard.counters() == {"latency": 0, "exception": 0, "result": 0}


def test_while_it_is_off_an_async_call_has_no_frame_of_ours_around_it():
    guard = Chaos("c", rate=1.0, exception=ConnectionError)

    async def call(): ...

    coroutine = call()
    assert guard.around(lambda: coroutine) is coroutine
    coroutine.close()


def test_enabled_while_it_runs_it_disturbs_the_next_call():
    guard = Chaos("c", rate=1.0, exception=ConnectionError)
    call = guard(len)
    call("four")
    guard.update(enabled=True)
    with pytest.raises(ConnectionError):
        call("four")
    guard.update(enabled=False)
    call("four")


def test_a_function_or_a_context_variable_may_say_for_each_call_whether_it_is_on():
    asked = []
    drill = contextvars.ContextVar("drill", default=False)
    unset = contextvars.ContextVar("unset")
    by_function = always(exception=ConnectionError, enabled=lambda: bool(asked.append(1)) or len(asked) > 1)(len)
    by_variable = always(exception=ConnectionError, enabled=drill)(len)
    by_unset = always(exception=ConnectionError, enabled=unset)(len)

    assert by_function("four") == by_variable("four") == by_unset("four") == 4
    with pytest.raises(ConnectionError):
        by_function("four")
    token = drill.set(True)
    with pytest.raises(ConnectionError):
        by_variable("four")
    drill.reset(token)
    assert by_variable("four") == 4


def test_a_predicate_that_raises_is_logged_and_the_call_goes_undisturbed(caplog):
    def broken():
        raise OSError("flag service down")

    assert always(exception=ConnectionError, enabled=broken)(len)("four") == 4
    assert "flag service down" in caplog.text


def test_the_rate_is_the_share_of_calls_and_the_seed_says_which():
    def hits(seed):
        call = always(rate=0.2, exception=ConnectionError, rng=random.Random(seed))(len)
        found = []
        for _ in range(2000):
            try:
                call("four")
                found.append(False)
            except ConnectionError:
                found.append(True)
        return found

    assert hits(1) == hits(1) != hits(2)
    assert sum(hits(1)) / 2000 == pytest.approx(0.2, abs=0.03)


def test_an_exception_comes_instead_of_the_call_and_is_a_fresh_one_each_time():
    made = []

    def make():
        made.append(ConnectionError("injected"))
        return made[-1]

    @always(exception=make)
    async def call():
        pytest.fail("the call was made")

    async def main():
        for _ in range(2):
            with pytest.raises(ConnectionError, match="injected"):
                await call()

    run(main())
    assert len({id(error) for error in made}) == 2


def test_a_result_comes_instead_of_the_call_and_may_be_none():
    guard = always(result=lambda: None)
    assert guard(lambda: pytest.fail("the call was made"))() is None

    @guard
    async def call():
        pytest.fail("the call was made")

    assert run(call()) is None
    assert guard.counters()["result"] == 2


def test_latency_comes_before_the_call():
    guard = always(latency=timedelta(seconds=2))

    @guard
    async def call():
        return now()

    assert run(call()) == 2.0


def test_latency_may_be_drawn_anew_for_each_call():
    drawn = iter([1.0, 4.0])
    guard = always(latency=lambda: next(drawn))

    @guard
    async def call():
        return now()

    async def main():
        return await call(), await call()

    assert run(main()) == (1.0, 5.0)


def test_drawn_latency_may_be_a_timedelta_like_a_fixed_one():
    async def call():
        return now()

    guard = always(latency=lambda: timedelta(seconds=2))
    assert run(guard(call)()) == 2.0
    guard.update(latency=lambda: timedelta.max)
    assert run(guard(call)()) == 86400.0


@pytest.mark.parametrize("drawn", [-1.0, math.nan, 0, "soon"])
def test_what_is_no_time_to_wait_is_none(drawn, caplog):
    guard = always(latency=lambda: drawn)

    @guard
    async def call():
        return now()

    assert run(call()) == 0
    assert guard.counters()["latency"] == 0


def test_latency_without_end_is_a_day():
    guard = always(latency=lambda: math.inf)

    @guard
    async def call():
        return now()

    assert run(call()) == 86400.0


def test_afterwards_the_call_is_made_and_its_answer_is_late_or_lost():
    made = []

    @always(latency=2.0, exception=ConnectionError, after=True)
    async def call():
        made.append(now())

    async def main():
        with pytest.raises(ConnectionError):
            await call()
        return now()

    assert (run(main()), made) == (2.0, [0.0])

    @always(result=lambda: "wrong", after=True)
    def plain():
        made.append("plain")
        return "right"

    assert (plain(), made[-1]) == ("wrong", "plain")


def test_a_call_that_fails_by_itself_keeps_its_own_exception():
    @always(exception=ConnectionError, after=True)
    async def call():
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        run(call())


def test_a_cancelled_call_is_cancelled_at_once_while_it_is_made_late():
    made = []

    @always(latency=10.0)
    async def call():
        made.append(1)

    async def main():
        task = asyncio.create_task(call())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return now()

    assert (run(main()), made) == (1.0, [])


def test_a_plain_function_sleeps_in_its_thread_and_never_on_an_event_loop():
    slept = []

    class Clock:
        def __call__(self):
            return 0.0

        def sleep(self, seconds):
            slept.append(seconds)

    guard = always(latency=2.0)
    with use_clock(Clock()):
        guard(len)("four")
    assert slept == [2.0]

    async def main():
        guard(len)("four")

    with use_clock(Clock()):
        asyncio.run(main())
    assert slept == [2.0]
    assert guard.counters()["latency"] == 1


def test_each_injection_is_an_event():
    heard = []
    guard = always(latency=2.0, exception=ConnectionError, listeners=[heard.append])

    async def main():
        with pytest.raises(ConnectionError):
            await guard(asyncio.sleep)(0)

    run(main())
    assert heard == [ChaosInjected("c", 0.0, "latency", 2.0), ChaosInjected("c", 2.0, "exception")]
    assert guard.counters() == {"latency": 1, "exception": 1, "result": 0}
    assert (guard.snapshot().latency, guard.snapshot().exception, guard.snapshot().result) == (1, 1, 0)


def test_innermost_it_meets_every_policy():
    breaker = CircuitBreaker("b", consecutive_failures=3)
    call = Pipeline(breaker, always(exception=ConnectionError))(len)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            call("four")
    assert breaker.state is State.OPEN


def test_a_stream_is_late_or_fails_before_its_first_item_and_is_else_itself():
    closed = []

    async def stream():
        try:
            got = yield "first"
            with pytest.raises(KeyError):
                yield got
            yield "last"
        finally:
            closed.append(now())

    async def use(opened):
        found = [await opened.__anext__(), await opened.asend("sent"), await opened.athrow(KeyError())]
        with pytest.raises(StopAsyncIteration):
            await opened.__anext__()
        return found, now()

    async def abandon(opened):
        async with aclosing(opened):
            await opened.__anext__()
        return len(closed)

    async def fail():
        with pytest.raises(ConnectionError):
            await anext(always(exception=ConnectionError)(stream)())

    assert run(use(always(latency=2.0)(stream)())) == (["first", "sent", "last"], 2.0)
    assert run(use(Chaos("off", latency=2.0)(stream)())) == (["first", "sent", "last"], 0.0)
    assert run(abandon(always(latency=2.0)(stream)())) == 3
    run(fail())


@pytest.mark.parametrize("settings", [{"result": list}, {"latency": 1.0, "after": True}])
def test_what_makes_no_sense_for_a_stream_is_refused_when_decorating(settings):
    async def stream():
        yield 1

    with pytest.raises(TypeError, match="Chaos"):
        always(**settings)(stream)


def test_no_reference_cycle_is_left_by_an_injected_exception():
    call = always(exception=ConnectionError)(len)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            try:
                call("four")
            except ConnectionError:
                continue
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_as_a_decorator_it_is_off_too():
    @chaos(rate=1.0, exception=ConnectionError)
    def call():
        return "done"

    assert call() == "done"
    guard = policies_of(call)[0]
    assert guard.name.endswith("call")
    assert guard.gauges() == {"enabled": 0.0}
    guard.update(enabled=True)
    assert guard.gauges() == {"enabled": 1.0}
    guard.update(enabled=lambda: False)
    assert math.isnan(guard.gauges()["enabled"])


@pytest.mark.parametrize(
    ("settings", "error", "rule"),
    [
        ({"rate": 0}, ValueError, r"rate must be in \(0, 1\], got 0"),
        ({"rate": 5}, ValueError, "for 5 % write 0.05"),
        ({"latency": -1}, ValueError, "latency must be more than 0 and finite, got -1 s"),
        ({"latency": 1e308}, ValueError, "latency must be 86400 s or less, got 1e[+]308"),
        ({"exception": ConnectionError()}, TypeError, "exception must be a function that makes one for each call"),
        ({"result": 5}, TypeError, "result must be a function that makes one for each call, got 5"),
        ({"exception": KeyError, "result": list}, TypeError, "give exception or result, not both"),
        ({"after": 1}, TypeError, "after must be True or False, got 1"),
        ({"enabled": "yes"}, TypeError, "enabled must be a bool, a function or a ContextVar, got 'yes'"),
        ({"rng": 7}, TypeError, "rng must be a random.Random, got 7"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(settings, error, rule):
    with pytest.raises(error, match=rule):
        Chaos("c", **settings)


def test_it_works_on_trio():
    trio = pytest.importorskip("trio")
    guard = always(latency=0.001)

    @guard
    async def call():
        return "done"

    assert trio.run(call) == "done"
    assert guard.counters()["latency"] == 1


def test_threads_and_loops_count_every_injection():
    guard = always(exception=ConnectionError)

    @guard
    def plain(): ...

    @guard
    async def call(): ...

    async def many():
        await asyncio.gather(*(call() for _ in range(100)), return_exceptions=True)

    def often():
        for _ in range(100):
            with pytest.raises(ConnectionError):
                plain()

    threads = [threading.Thread(target=job) for job in [often] * 8 + [lambda: asyncio.run(many())] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert guard.counters()["exception"] == 1100
