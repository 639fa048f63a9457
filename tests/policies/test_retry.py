from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import threading
import weakref
from contextlib import aclosing, suppress
from datetime import timedelta

import pytest

from seawall import CallTimeoutError, Pipeline, Rejected, Timeout, listen, use_clock
from seawall.core import ambient
from seawall.policies.retry import Reason, Retry, RetryGivenUp, RetryScheduled
from seawall.policies.retry_budget import RetryBudget
from seawall.testing import AsyncScript, Script, VirtualClock, after, run


def now():
    return asyncio.get_running_loop().time()


def retry(**settings):
    return Retry("r", **{"on": ConnectionError, "wait": 1.0, **settings})


def outcome(policy, *outcomes, start=0.0):
    """What one call through `policy` gives, how often it was made, and how long it took."""
    script = AsyncScript(*outcomes)

    async def main():
        began = now()
        try:
            end = await policy(script)()
        except Exception as exc:
            end = exc
        return end, len(script.calls), now() - began

    return run(main(), start=start)


def outcome_sync(policy, *outcomes):
    script, clock = Script(*outcomes), VirtualClock()
    with use_clock(clock):
        try:
            end = policy(script)()
        except Exception as exc:
            end = exc
    return end, len(script.calls), clock()


@pytest.mark.parametrize("end", [outcome, outcome_sync])
def test_a_call_is_made_again_until_it_goes_well(end):
    assert end(retry(), ConnectionError(), ConnectionResetError(), "well") == ("well", 3, 2.0)


@pytest.mark.parametrize("end", [outcome, outcome_sync])
def test_the_last_error_is_raised_as_it_was(end):
    errors = [ConnectionError(1), ConnectionError(2), ConnectionError(3)]
    assert end(retry(), *errors) == (errors[-1], 3, 2.0)
    for error in errors:
        assert (error.__context__, error.__cause__) == (None, None)


@pytest.mark.parametrize("end", [outcome, outcome_sync])
def test_other_errors_are_not_retried(end):
    error = ValueError()
    assert end(retry(), error) == (error, 1, 0.0)
    assert end(retry(), ConnectionError(), error) == (error, 2, 1.0)


@pytest.mark.parametrize("end", [outcome, outcome_sync])
def test_results_can_be_retried_and_the_last_one_is_returned(end):
    policy = retry(on_result=lambda number: number < 3)
    assert end(policy, 1, ConnectionError(), 4) == (4, 3, 2.0)
    assert end(policy, 1, 2, 0) == (0, 3, 2.0)
    assert policy.counters() == {
        "succeeded_without_retry": 0,
        "succeeded_with_retry": 1,
        "failed_without_retry": 0,
        "failed_with_retry": 1,
    }


def test_which_errors_are_retried_may_be_a_function():
    policy = retry(on=lambda error: "again" in str(error))
    assert outcome(policy, OSError("again"), "well")[0] == "well"
    assert outcome(policy, OSError("never"))[1] == 1


def test_a_predicate_that_fails_harms_no_call(caplog):
    error = ConnectionError()
    assert outcome(retry(on=lambda error: 1 / 0), error) == (error, 1, 0.0)
    assert outcome(retry(on_result=lambda result: 1 / 0), "well")[0] == "well"
    assert "division by zero" in caplog.text


def test_how_calls_ended_is_counted():
    policy = retry()
    outcome(policy, "well")
    outcome(policy, ValueError())
    outcome(policy, ConnectionError(), "well")
    outcome(policy, ConnectionError(), ValueError())
    outcome(policy, ConnectionError(), ConnectionError(), ConnectionError())
    outcome_sync(policy, "well")
    assert list(policy.counters().values()) == [2, 1, 1, 2]
    assert policy.snapshot().retries == 4
    assert policy.gauges() == {}


def test_what_happens_is_told():
    heard = []
    errors = [ConnectionError(n) for n in range(2)]
    outcome(retry(attempts=2, listeners=[heard.append]), *errors)
    assert heard == [RetryScheduled("r", 0.0, 1, errors[0], 1.0), RetryGivenUp("r", 1.0, 2, errors[1], Reason.ATTEMPTS)]


def test_a_result_that_is_retried_is_an_event_without_error():
    heard = []
    outcome(retry(on_result=lambda result: True, attempts=2, listeners=[heard.append]), 1, 2)
    assert heard == [RetryScheduled("r", 0.0, 1, None, 1.0), RetryGivenUp("r", 1.0, 2, None, Reason.ATTEMPTS)]


def test_a_listener_that_fails_harms_no_call(caplog):
    policy = retry(listeners=[lambda event: 1 / 0])
    assert outcome(policy, ConnectionError(), "well")[0] == "well"
    assert "division by zero" in caplog.text


@pytest.mark.parametrize("settings", [{"attempts": 100}, {"attempts": None, "stop": lambda attempt: False}])
def test_b17_a_cancellation_ends_a_retry_at_once(settings):
    script = AsyncScript(then=after(1.0, ConnectionError()))

    async def main(cancel_at):
        began = now()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(cancel_at):
                await retry(on=lambda error: True, **settings)(script)()
        assert now() - began == pytest.approx(cancel_at)

    run(main(0.5))  # in an attempt
    assert len(script.calls) == 1
    run(main(1.5))  # in a pause
    assert len(script.calls) == 2
    assert script.running == 0


def test_what_is_no_exception_is_never_retried():
    for error in (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
        with pytest.raises(TypeError, match="nothing retries it"):
            retry(on=error)
    script = Script(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        retry(on=lambda error: True)(script)()
    assert len(script.calls) == 1


def test_b18_what_calls_at_once_need_is_each_its_own():
    seen = []

    async def one(guarded, attempts):
        heard.clear()
        assert await guarded(attempts) == attempts
        seen.append(attempts)

    heard = []
    tries = {1: 0, 4: 0, 2: 0}

    @retry(attempts=4, listeners=[heard.append])
    async def call(needed):
        tries[needed] += 1
        await asyncio.sleep(0.1)
        if tries[needed] < needed:
            raise ConnectionError(needed)
        return needed

    async def main():
        await asyncio.gather(*(one(call, needed) for needed in (1, 4, 2)))

    run(main())
    assert tries == {1: 1, 4: 4, 2: 2}
    assert seen == [1, 2, 4]
    by_call = [(event.error.args[0], event.attempt) for event in heard]
    assert sorted(by_call) == [(2, 1), (4, 1), (4, 2), (4, 3)]


@pytest.mark.parametrize("hang", [0.05, 0.4, 5.0])
def test_b19_the_time_limit_bounds_all_attempts_and_pauses_together(hang):
    policy = retry(timeout=0.4, wait=None, wait_max=5.0, attempts=None)
    script = AsyncScript(then=after(hang, ConnectionError()))

    async def main():
        began = now()
        with pytest.raises((ConnectionError, CallTimeoutError)):
            await policy(script)()
        assert now() - began <= 0.4 + 1e-6
        assert all(call.at < began + 0.4 for call in script.calls)
        assert asyncio.current_task().cancelling() == 0
        assert ambient.deadline.get() == math.inf

    run(main())
    assert script.running == 0
    assert not policy.counters()["succeeded_without_retry"]


def test_at_the_time_limit_the_caller_gets_the_error_of_the_last_attempt_that_ended():
    heard = []
    policy = retry(timeout=3.0, listeners=[heard.append])
    error = ConnectionError()
    assert outcome(policy, error, after(60, "late")) == (error, 2, pytest.approx(3.0))
    assert error.__context__ is None
    assert heard[-1] == RetryGivenUp("r", pytest.approx(3.0), 2, error, Reason.TIMEOUT)


def test_at_the_time_limit_the_caller_gets_the_last_result():
    policy = retry(timeout=3.0, on_result=lambda result: result == "poor")
    assert outcome(policy, "poor", after(60, "late")) == ("poor", 2, pytest.approx(3.0))


def test_a_first_attempt_that_outlives_the_limit_is_a_timeout():
    policy = retry(timeout=timedelta(seconds=3))
    error, calls, took = outcome(policy, after(60, "late"))
    assert isinstance(error, CallTimeoutError)
    assert (error.policy, error.after, calls, took) == ("r", 3.0, 1, pytest.approx(3.0))
    assert isinstance(error.__cause__, asyncio.CancelledError)
    assert policy.counters()["failed_without_retry"] == 1


def test_an_attempt_that_swallows_its_cancellation_has_succeeded():
    @retry(timeout=1.0)
    async def call():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "a part"

    async def main():
        assert await call() == "a part"
        assert asyncio.current_task().cancelling() == 0

    run(main())


def test_an_error_raised_at_the_limit_is_not_masked_and_not_retried():
    tries = []

    @retry(timeout=1.0, wait=0)
    async def call():
        tries.append(now())
        try:
            await asyncio.sleep(60)
        finally:
            raise ConnectionError("while cleaning up")

    async def main():
        with pytest.raises(ConnectionError, match="while cleaning up"):
            await call()
        assert asyncio.current_task().cancelling() == 0

    run(main())
    assert tries == [0.0]


def test_once_the_limit_has_rung_no_attempt_follows_though_the_clock_says_there_is_time():
    heard = []

    @retry(timeout=1.0, wait=0, listeners=[heard.append])
    async def call():
        try:
            await asyncio.sleep(60)
        finally:
            raise ConnectionError

    async def main():
        loop = asyncio.get_running_loop()
        with use_clock(lambda: loop.time() * 0.9), pytest.raises(ConnectionError):
            await call()

    run(main())
    assert [(type(event), event.attempts, event.reason) for event in heard] == [(RetryGivenUp, 1, Reason.TIMEOUT)]


def test_a_cancellation_from_outside_wins_over_the_limit():
    async def main():
        task = asyncio.create_task(retry(timeout=1.0)(AsyncScript(after(60, "late")))())
        asyncio.get_running_loop().call_later(1.0, task.cancel)
        await asyncio.wait([task])
        assert task.cancelled() or isinstance(task.exception(), CallTimeoutError)
        task = asyncio.create_task(retry(timeout=1.0)(AsyncScript(after(60, "late")))())
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    run(main())


def test_a_plain_function_never_begins_an_attempt_past_the_limit():
    error, calls, took = outcome_sync(retry(timeout=2.5, attempts=None), *[ConnectionError()] * 3)
    assert (type(error), calls, took) == (ConnectionError, 3, 2.0)
    error, calls, took = outcome_sync(retry(timeout=2.5), after(60, ConnectionError("slow")))
    assert (str(error), calls, took) == ("slow", 1, 60.0)


def test_a_pause_that_took_too_long_is_followed_by_no_attempt():
    class Sluggish(VirtualClock):
        def sleep(self, seconds):
            super().sleep(seconds + 10)

    heard, script = [], Script(ConnectionError(1), "late")
    with use_clock(Sluggish()), pytest.raises(ConnectionError, match="1"):
        retry(timeout=2.0, listeners=[heard.append])(script)()
    assert [type(event) for event in heard] == [RetryScheduled, RetryGivenUp]
    assert heard[1].reason is Reason.TIMEOUT
    assert len(script.calls) == 1


@pytest.mark.parametrize("end", [outcome, outcome_sync])
def test_calls_inside_see_the_limit_as_their_deadline(end):
    seen = []

    def look(error):
        seen.append(ambient.deadline.get())
        return True

    assert end(retry(timeout=4.0, on=look), ConnectionError(), ConnectionError(), "well")[0] == "well"
    assert seen == [4.0, 4.0]
    assert ambient.deadline.get() == math.inf


@pytest.mark.parametrize("wait", [1.0, None])
def test_an_inherited_deadline_is_kept(wait):
    heard = []
    script = AsyncScript(then=ConnectionError())

    async def main():
        ambient.deadline.set(1.0)
        with pytest.raises(ConnectionError):
            await retry(wait=wait, attempts=None, stop=lambda attempt: False, listeners=[heard.append])(script)()
        return now()

    assert run(main()) <= 1.0
    assert all(call.at < 1.0 for call in script.calls)
    assert len(script.calls) > 1 or wait
    assert heard[-1].reason is Reason.DEADLINE


def test_the_narrower_of_limit_and_deadline_counts():
    async def main(limit):
        token = ambient.deadline.set(now() + 5.0)
        try:
            with pytest.raises(ConnectionError):
                await retry(timeout=limit, attempts=None)(AsyncScript(then=ConnectionError()))()
            assert ambient.deadline.get() == pytest.approx(began + 5.0)
        finally:
            ambient.deadline.reset(token)
        return now()

    began = 0.0
    assert run(main(2.5)) == 2.0
    assert run(main(50.0)) == 4.0


class Busy(Rejected):
    pass


@pytest.mark.parametrize("end", [outcome, outcome_sync])
def test_no_attempt_comes_before_the_callee_said(end):
    policy = retry(on=Exception, jitter=False)
    assert end(policy, Busy("p", 3.0), "well") == ("well", 2, 3.0)
    error = ConnectionError()
    error.retry_after = 4
    assert end(policy, error, "well") == ("well", 2, 4.0)


def test_those_told_to_come_back_do_not_all_come_at_once():
    took = {outcome(retry(on=Busy, wait=None), Busy("p", 2.0), "well")[2] for _ in range(5)}
    assert len(took) == 5
    assert all(2.0 <= one <= 2.1 for one in took)


@pytest.mark.parametrize("retry_after", [3.0, 1e9, math.inf, 10**400])
def test_a_refusal_that_says_to_come_back_later_than_the_limit_is_never_retried(retry_after):
    heard = []
    error = Busy("p", retry_after)
    assert outcome(retry(on=Busy, timeout=3.0, listeners=[heard.append]), error) == (error, 1, 0.0)
    assert [event.reason for event in heard] == [Reason.RETRY_AFTER]


def test_without_a_limit_a_callee_is_waited_for_as_long_as_the_longest_pause():
    error = Busy("p", 5.0)
    assert outcome(retry(on=Busy, wait_max=5.0), error) == (error, 1, 0.0)
    assert outcome(retry(on=Busy, wait_max=5.2), error, "well")[0] == "well"
    assert outcome(retry(on=Busy, timeout=60), Busy("p", 50.0), "well")[0] == "well"


def test_a_refusal_that_does_not_know_when_is_retried_only_where_it_is_named():
    full = Busy("p")
    for on in (Exception, (Exception, ConnectionError)):
        assert outcome(retry(on=on), full) == (full, 1, 0.0)
    for on in (Busy, Rejected, (Exception, Rejected), lambda error: True):
        assert outcome(retry(on=on), full, "well") == ("well", 2, 1.0)


def test_when_to_come_back_may_be_read_from_the_outcome_by_a_function():
    policy = retry(
        on=(ConnectionError, Busy),
        on_result=lambda response: response["status"] == 429,
        retry_after=lambda it: it.get("retry-after") if isinstance(it, dict) else None,
        jitter=False,
    )
    assert outcome(policy, {"status": 429, "retry-after": 2.5}, {"status": 200}) == ({"status": 200}, 2, 2.5)
    assert outcome(policy, {"status": 429}, {"status": 200})[2] == 1.0
    assert outcome(policy, ConnectionError(), {"status": 200})[2] == 1.0
    assert outcome(policy, Busy("p", 2.0), {"status": 200})[2] == 2.0


@pytest.mark.parametrize("nonsense", ["soon", -1, math.nan, True, object()])
def test_a_time_to_come_back_that_makes_no_sense_is_none(nonsense, caplog):
    error = ConnectionError()
    error.retry_after = nonsense
    assert outcome(retry(), error, "well") == ("well", 2, 1.0)
    assert outcome(retry(retry_after=lambda it: nonsense), ConnectionError(), "well") == ("well", 2, 1.0)


def test_a_budget_that_is_used_up_ends_the_call_with_its_own_error():
    budget = RetryBudget("b", floor=0.0, ratio=0.5)
    heard = []
    policy = retry(budget=budget, listeners=[heard.append])
    errors = [ConnectionError(n) for n in range(4)]
    assert outcome(policy, errors[0]) == (errors[0], 1, 0.0)
    assert outcome(policy, errors[1], errors[2]) == (errors[2], 2, 1.0)
    assert [event.reason for event in heard if isinstance(event, RetryGivenUp)] == [Reason.BUDGET, Reason.BUDGET]
    assert budget.counters() == {"first": 2, "extra": 1, "refused": 2}


@pytest.mark.parametrize("ending", ["well", "failure", "cancelled in an attempt", "cancelled in a pause", "limit"])
def test_a_budget_gets_everything_back(ending):
    budget = RetryBudget("b", window=None)
    during = []

    async def call():
        during.append((budget.snapshot().in_flight, budget.snapshot().extra_in_flight))
        await asyncio.sleep(0.5)
        if ending != "well" or len(during) == 1:
            raise ConnectionError

    async def main():
        task = asyncio.create_task(retry(budget=budget, timeout=1.8 if ending == "limit" else None)(call)())
        if ending == "cancelled in a pause":
            await asyncio.sleep(1.0)
            assert budget.snapshot().extra_in_flight == 1
            task.cancel()
        if ending == "cancelled in an attempt":
            await asyncio.sleep(1.7)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() or ending == "well"

    run(main())
    assert during == [(1, 0), (1, 1), (1, 1)][: len(during)]
    assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)


def test_a_plain_function_gives_everything_back_to_a_budget():
    budget = RetryBudget("b", window=None)
    outcome_sync(retry(budget=budget), ConnectionError(), "well")
    outcome_sync(retry(budget=budget), ConnectionError(), ConnectionError(), ConnectionError())
    with pytest.raises(KeyboardInterrupt):
        outcome_sync(retry(budget=budget), ConnectionError(), KeyboardInterrupt())
    assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)


def test_a_plain_function_on_a_thread_that_runs_a_loop_gives_up_instead_of_blocking_it():
    heard, script, error = [], Script(ConnectionError(), "well"), None

    async def main():
        with pytest.raises(ConnectionError):
            retry(listeners=[heard.append])(script)()
        assert now() == 0.0

    run(main())
    assert [event.reason for event in heard] == [Reason.EVENT_LOOP]
    assert len(script.calls) == 1
    del error


def test_b20_at_its_cap_the_back_off_keeps_its_jitter():
    policy = Retry("r", on=ConnectionError, attempts=40, wait_initial=0.1, wait_max=5.0)
    heard = []
    policy.listen(heard.append)
    outcome(policy, *[ConnectionError()] * 40)
    late = [event.delay for event in heard[10:-1]]
    assert len(set(late)) == len(late)
    assert max(late) <= 5.0
    assert max(late) - min(late) > 1.0


def test_b21_an_async_generator_is_refused_unless_retried_until_its_first_item():
    async def stream():
        yield 1

    with pytest.raises(TypeError, match="async generator"):
        retry()(stream)
    assert retry(until_first_item=True)(stream)


def streaming(*opens, items=(1, 2)):
    """An async generator that on each opening does the next of `opens`, then yields; and a record of it."""
    log, script = [], AsyncScript(*opens)

    async def stream():
        log.append("opened")
        try:
            if await script() == "late failure":
                yield 0
                raise ConnectionError("late")
            for item in items:
                log.append((yield item))
        finally:
            log.append("closed")

    return stream, log


async def collect(stream):
    return [item async for item in stream]


def test_b21_a_stream_is_opened_again_until_its_first_item():
    stream, log = streaming(ConnectionError(), ConnectionError(), "well")
    policy = retry(until_first_item=True)
    assert run(collect(policy(stream)())) == [1, 2]
    assert log == ["opened", "closed", "opened", "closed", "opened", None, None, "closed"]
    assert policy.counters()["succeeded_with_retry"] == 1


def test_b21_a_stream_that_has_begun_is_on_its_own():
    stream, log = streaming("late failure", "well")
    with pytest.raises(ConnectionError, match="late"):
        run(collect(retry(until_first_item=True)(stream)()))
    assert log == ["opened", "closed"]


def test_a_stream_that_never_opens_raises_its_last_error():
    errors = [ConnectionError(n) for n in range(3)]
    stream, _ = streaming(*errors)
    with pytest.raises(ConnectionError) as caught:
        run(collect(retry(until_first_item=True)(stream)()))
    assert caught.value is errors[-1]


def test_an_empty_stream_is_a_success():
    stream, _ = streaming(ConnectionError(), "well", items=())
    assert run(collect(retry(until_first_item=True, on=Exception)(stream)())) == []


def test_an_empty_stream_has_none_as_its_result():
    script = AsyncScript((), (1, 2))

    async def stream():
        for item in await script():
            yield item

    assert run(collect(retry(until_first_item=True, on_result=lambda item: item is None)(stream)())) == [1, 2]


@pytest.mark.parametrize("opens", [["well"], [ConnectionError, "well"], [ConnectionError] * 3])
def test_b38_a_stream_leaves_no_reference_cycle(opens):
    async def main():
        stream, _ = streaming(*opens)
        guarded = retry(until_first_item=True)(stream)
        del stream, _
        gc.collect()
        with suppress(ConnectionError):
            await collect(guarded())
        return gc.collect()

    gc.disable()
    try:
        assert run(main()) == 0
    finally:
        gc.enable()


def test_the_first_item_of_a_stream_is_its_result():
    stream, log = streaming("late failure", "well", items=(1,))
    policy = retry(until_first_item=True, on_result=lambda item: item == 0)
    assert run(collect(policy(stream)())) == [1]
    assert log == ["opened", "closed", "opened", None, "closed"]


def test_what_is_sent_and_thrown_reaches_the_stream_and_it_is_closed_at_once():
    stream, log = streaming(ConnectionError(), "well", items=(1, 2, 3))

    async def main():
        async with aclosing(retry(until_first_item=True)(stream)()) as items:
            assert await items.__anext__() == 1
            assert await items.asend("sent") == 2
        assert log[-2:] == ["sent", "closed"]
        other = retry(until_first_item=True)(streaming("well")[0])()
        await other.__anext__()
        with pytest.raises(KeyError):
            await other.athrow(KeyError())

    run(main())


def test_a_stream_whose_opening_is_cancelled_is_closed():
    stream, log = streaming(after(60, "late"))

    async def main():
        items = retry(until_first_item=True, timeout=2.0)(stream)()
        with pytest.raises(CallTimeoutError):
            await items.__anext__()
        assert log == ["opened", "closed"]
        assert now() == pytest.approx(2.0)

    run(main())


def test_the_time_limit_of_a_stream_ends_with_its_first_item():
    async def slow():
        yield 1
        await asyncio.sleep(60)
        yield 2

    assert run(collect(retry(until_first_item=True, timeout=2.0)(slow)())) == [1, 2]


@pytest.mark.parametrize("settings", [{}, {"timeout": 60.0}, {"on_result": lambda result: False}, {"attempts": 1}])
@pytest.mark.parametrize("ending", ["well", "well later", "other error", "given up"])
@pytest.mark.parametrize("kind", ["async", "plain"])
def test_b38_a_call_leaves_no_reference_cycle(settings, ending, kind):
    outcomes = {
        "well": ["well"],
        "well later": [ConnectionError, "well"],
        "other error": [ConnectionError, ValueError],
        "given up": [ConnectionError] * 3,
    }
    policy = retry(**settings)

    def plain_garbage():
        gc.collect()
        for _ in range(20):
            with suppress(Exception):
                policy(Script(*outcomes[ending]))()
        return gc.collect()

    async def garbage():
        gc.collect()
        for _ in range(20):
            with suppress(Exception):
                await policy(AsyncScript(*outcomes[ending]))()
        return gc.collect()

    gc.disable()
    try:
        if kind == "async":
            assert run(garbage()) == 0
        else:
            with use_clock(VirtualClock()):
                assert plain_garbage() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["async", "plain"])
def test_b38_an_error_that_is_raised_at_the_limit_leaves_no_reference_cycle(kind):
    class Sluggish(VirtualClock):
        def sleep(self, seconds):
            super().sleep(seconds + 10)

    async def garbage():
        gc.collect()
        with suppress(ConnectionError):
            await policy(AsyncScript(ConnectionError, after(60, "late")))()
        with suppress(CallTimeoutError):
            await policy(AsyncScript(after(60, "late")))()
        return gc.collect()

    policy = retry(timeout=3.0)
    gc.disable()
    try:
        if kind == "async":
            assert run(garbage()) == 0
        else:
            gc.collect()
            with use_clock(Sluggish()), suppress(ConnectionError):
                policy(Script(ConnectionError))()
            assert gc.collect() == 0
    finally:
        gc.enable()


def test_b38_an_error_dies_with_the_call():
    class Fails(ConnectionError):
        pass

    gone = []

    async def call():
        error = Fails()
        gone.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    async def main():
        gc.disable()
        try:
            for policy in (retry(), retry(timeout=2.5), retry(timeout=1.5, attempts=2)):
                with suppress(Fails):
                    await policy(call)()
                assert [reference() for reference in gone] == [None] * len(gone)
        finally:
            gc.enable()

    run(main())
    assert len(gone) == 3 + 3 + 2


def test_a_call_keeps_its_task_and_context():
    variable = contextvars.ContextVar("variable")

    async def main():
        @retry(timeout=9.0)
        async def call():
            variable.set(asyncio.current_task())
            if not tries:
                tries.append(1)
                raise ConnectionError

        tries = []
        await call()
        assert variable.get() is asyncio.current_task()

    run(main())


def test_it_composes_with_guards_inside_and_outside():
    heard = []
    stop = listen(heard.append)
    script = AsyncScript(after(60, "late"), "well")
    try:
        guarded = Pipeline(Timeout("all", 30.0), retry(on=TimeoutError), Timeout("each", 2.0))(script)
        assert run(guarded()) == "well"
    finally:
        stop()
    assert [type(event).__name__ for event in heard] == ["CallTimedOut", "RetryScheduled"]


def test_settings_change_while_calls_are_in_flight():
    policy = retry(attempts=2)
    script = AsyncScript(then=ConnectionError())

    async def main():
        task = asyncio.create_task(policy(script)())
        await asyncio.sleep(0.5)
        policy.update(attempts=5, wait=0.1, timeout=None)
        with pytest.raises(ConnectionError):
            await task

    run(main())
    assert len(script.calls) == 5
    assert (policy.attempts, policy.wait) == (5, 0.1)
    assert policy.snapshot().retries == 4
    with pytest.raises(ValueError, match="wait_initial must be at most"):
        policy.update(wait_initial=9)
    assert policy.wait_initial == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on": 5}, "exception class, a tuple of them or a function"),
        ({"on": [ConnectionError]}, "exception class, a tuple of them or a function"),
        ({"on": (ConnectionError, 5)}, "must be an exception class"),
        ({"on_result": 5}, "on_result must be a plain function, got"),
        ({"attempts": 0}, "attempts must be 1 or more"),
        ({"attempts": True}, "whole number"),
        ({"attempts": None}, "never ends"),
        ({"timeout": 0}, "timeout must be more than 0"),
        ({"timeout": math.nan}, "timeout must be"),
        ({"timeout": math.inf}, "finite"),
        ({"timeout": "1"}, "number of seconds"),
        ({"wait_initial": 0}, "wait_initial must be more than 0"),
        ({"wait_initial": 6}, "at most wait_max"),
        ({"wait_max": math.inf}, "finite"),
        ({"wait": -1}, "wait must be 0 or more"),
        ({"wait": "1"}, "wait must be"),
        ({"stop": 3}, "stop must be a plain function, got"),
        ({"jitter": 1.0}, "jitter must be True or False"),
        ({"retry_after": 3}, "retry_after must be a plain function, got"),
        ({"budget": 0.2}, "must be a RetryBudget"),
        ({"until_first_item": 1}, "until_first_item must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        retry(**settings)


async def awaited(error):
    return True


@pytest.mark.parametrize("setting", ["on", "on_result", "wait", "stop", "retry_after"])
def test_functions_that_need_awaiting_are_refused(setting):
    with pytest.raises(TypeError, match=f"{setting} must be a plain function"):
        retry(**{setting: awaited})


def test_what_to_retry_must_be_said():
    with pytest.raises(TypeError, match="on"):
        Retry("r")


@pytest.mark.parametrize("end", [outcome, outcome_sync])
@pytest.mark.parametrize(
    "settings",
    [
        {"timeout": 1e308},
        {"wait": None, "wait_initial": 1e-310},
        {"wait": None, "wait_max": 1e308, "wait_initial": 1e308, "timeout": 3.0},
        {"wait": None, "wait_max": 1e308, "wait_initial": 1e300, "jitter": False, "timeout": 3.0},
        {"attempts": 10**9},
    ],
)
def test_absurd_settings_work(settings, end):
    end(retry(**settings), ConnectionError(), "well")


def test_the_longest_pause_of_a_plain_function_does_not_overflow():
    assert outcome_sync(retry(wait=1e308), ConnectionError(), "well")[0] == "well"


def test_eight_threads_and_three_loops_lose_no_count():
    policy = retry(wait=0, attempts=2)
    barrier = threading.Barrier(11)

    def plain():
        barrier.wait()
        for _ in range(200):
            assert policy(Script(ConnectionError, "well"))() == "well"
            assert policy(Script("well"))() == "well"

    async def many():
        barrier.wait()
        for _ in range(200):
            assert await policy(AsyncScript(ConnectionError, "well"))() == "well"
            assert await policy(AsyncScript("well"))() == "well"

    threads = [threading.Thread(target=plain) for _ in range(8)]
    threads += [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(policy.counters().values()) == [2200, 2200, 0, 0]
    assert policy.snapshot().retries == 2200


def test_it_works_on_trio():
    import trio
    import trio.testing

    policy = retry(timeout=5.0)
    tries = []

    async def fails():
        tries.append(trio.current_time())
        raise ConnectionError(len(tries))

    async def hangs():
        if not tries:
            tries.append(1)
            raise ConnectionError("first")
        await trio.sleep(60)

    async def main():
        clock = trio.current_time
        with pytest.raises(ConnectionError, match="3"):
            await policy(fails)()
        assert len(tries) == 3
        tries.clear()
        began = clock()
        with pytest.raises(ConnectionError, match="first"):
            await policy(hangs)()
        assert clock() - began == pytest.approx(5.0, abs=0.01)
        with pytest.raises(CallTimeoutError):
            await policy(trio.sleep)(60)
        with trio.move_on_after(1) as outer:
            await policy(trio.sleep)(60)
        assert outer.cancelled_caught
        assert ambient.deadline.get() == math.inf
        return clock()

    clock = trio.testing.MockClock(autojump_threshold=0)
    with use_clock(clock.current_time):
        trio.run(main, clock=clock)
