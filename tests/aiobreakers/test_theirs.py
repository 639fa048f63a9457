"""An aiobreaker breaker as a policy among ours."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
import weakref
from datetime import timedelta

import aiobreaker
import pytest

from seawall import Bulkhead, CallRejected, CircuitBreaker, CircuitOpenError, Pipeline, Rejected, State
from seawall.aiobreakers import CircuitBreakerError, from_aiobreaker, to_seawall
from seawall.testing import AsyncScript, Script, after, capture_events, run


def theirs_of(**settings):
    return aiobreaker.CircuitBreaker(**{"fail_max": 1, "timeout_duration": timedelta(seconds=30), **settings})


def down():
    raise ConnectionError("down")


def test_it_guards_functions_of_both_kinds_by_its_own_rules_and_state():
    theirs = theirs_of(fail_max=3)
    policy = from_aiobreaker(theirs)
    plain, awaited = policy(Script(then=OSError("down"))), policy(AsyncScript(then=OSError("down")))
    still_theirs = theirs(down)

    async def main():
        with pytest.raises(OSError, match="down"):
            plain()
        with pytest.raises(OSError, match="down"):
            await awaited()
        assert (theirs.fail_counter, policy.snapshot().fail_counter) == (2, 2)
        with pytest.raises(aiobreaker.CircuitBreakerError):
            still_theirs()  # the third failure, which their decorator hides
        for call in (plain, awaited):
            with pytest.raises(CircuitBreakerError):
                await call()

    asyncio.run(main())
    assert (policy.snapshot().state, policy.snapshot().admitted, policy.snapshot().rejections) == ("open", 2, 2)
    assert policy.counters() == {"admitted": 2, "rejected": 2}


def test_it_stacks_with_policies_of_ours():
    theirs, places = theirs_of(name="bank"), Bulkhead("bank", max_concurrent=1)

    @Pipeline(places, from_aiobreaker(theirs))
    @CircuitBreaker("inner", consecutive_failures=1)
    async def pay():
        raise ConnectionError("down")

    async def main():
        with pytest.raises(ConnectionError):
            await pay()
        with pytest.raises(aiobreaker.CircuitBreakerError) as caught:
            await pay()
        assert caught.value.policy == "bank"

    asyncio.run(main())
    assert places.snapshot().active == 0


def test_a_refusal_is_one_for_handlers_of_both_kinds_and_for_policies_around_it(clock):
    theirs, outer = theirs_of(), CircuitBreaker("outer", consecutive_failures=2)
    call = Pipeline(outer, from_aiobreaker(theirs, name="bank"))(down)
    with pytest.raises(ConnectionError):
        call()
    clock.advance(10)
    with capture_events(CallRejected, policy="bank") as events:
        for kind in (aiobreaker.CircuitBreakerError, CircuitOpenError, Rejected):
            with pytest.raises(kind) as caught:
                call()
            assert caught.value.retry_after == 20.0
            assert caught.value.time_remaining == timedelta(seconds=20)
    assert len(events) == 3
    assert outer.state is State.CLOSED, "refused further in is no failure"


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
def test_b28_its_time_zone_does_not_reach_the_error(monkeypatch, zone):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        call = from_aiobreaker(theirs_of())(down)
        with pytest.raises(ConnectionError):
            call()
        with pytest.raises(CircuitBreakerError) as caught:
            call()
        assert 29 < caught.value.retry_after <= 30
        assert timedelta(seconds=29) < caught.value.time_remaining <= timedelta(seconds=30)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("trips", [1, 2])
def test_b30_the_call_that_trips_it_keeps_its_own_exception_and_the_cause_of_that(trips):
    cause, error = OSError("no route"), ConnectionError("down")

    def call():
        raise error from cause

    async def call_async():
        raise error from cause

    for fn in (call, call_async):
        theirs = theirs_of(fail_max=trips)
        guarded = from_aiobreaker(theirs)(fn)

        async def main(guarded=guarded):
            with pytest.raises(ConnectionError) as caught:
                (result := guarded()) and await result
            assert caught.value is error
            assert error.__cause__ is cause

        asyncio.run(main())


def test_an_open_circuit_of_somebody_else_further_in_is_a_failure_as_it_is_for_aiobreaker():
    inner = aiobreaker.CircuitBreakerError("inner", None)
    theirs = theirs_of(fail_max=5)
    with pytest.raises(aiobreaker.CircuitBreakerError) as caught:
        from_aiobreaker(theirs)(Script(inner))()
    assert caught.value is inner


def test_a_cancelled_call_counts_for_nothing():
    theirs = theirs_of()
    call = from_aiobreaker(theirs)(AsyncScript(after(10, "late")))

    async def main():
        task = asyncio.ensure_future(call())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert (theirs.fail_counter, theirs.current_state.name) == (0, "CLOSED")


def test_its_listeners_and_exclusions_go_on_working():
    heard = []

    class Listener(aiobreaker.CircuitBreakerListener):
        def failure(self, breaker, exception):
            heard.append((breaker.name, str(exception)))

    call = from_aiobreaker(theirs_of(name="bank", exclude=[KeyError], listeners=[Listener()]))(
        Script(KeyError("no such account"), ConnectionError("down"))
    )
    with pytest.raises(KeyError):
        call()
    with pytest.raises(ConnectionError):
        call()
    assert heard == [("bank", "down")]


def test_streams_are_refused_when_decorating():
    policy = from_aiobreaker(theirs_of())
    with pytest.raises(TypeError, match="runs whole calls"):

        @policy
        async def stream():
            yield 1


@pytest.mark.parametrize("wrong", [CircuitBreaker("ours"), None, "bank"])
def test_what_is_no_breaker_of_theirs_is_refused(wrong):
    with pytest.raises(TypeError, match=r"aiobreaker\.CircuitBreaker"):
        from_aiobreaker(wrong)


@pytest.mark.parametrize("wrap", [from_aiobreaker, to_seawall])
def test_neither_a_failure_nor_a_refusal_leaves_a_reference_cycle(wrap):
    class Down(ConnectionError):
        """Can be referred to weakly."""

    call = wrap(theirs_of())(Script(then=Down))
    seen = []
    gc.collect()
    gc.disable()
    try:
        for kind in (Down, CircuitBreakerError):
            try:
                call()
            except kind as error:
                seen.append(weakref.ref(error))
        assert [one() for one in seen] == [None, None]
    finally:
        gc.enable()


def test_without_aiobreaker_the_error_names_the_extra():
    script = "import sys; sys.modules['aiobreaker'] = None; import seawall.aiobreakers"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert "pip install 'seawall[aiobreaker]'" in done.stderr.splitlines()[-1]


def test_seawall_itself_does_not_load_aiobreaker():
    script = "import sys, seawall; print('aiobreaker' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "False"
