from __future__ import annotations

import asyncio
import gc
import inspect
import threading

import pytest

from seawall import Bulkhead, BulkheadFullError, CircuitBreaker, Pipeline, Timeout, use_clock
from seawall.testing import AsyncScript, Script, ScriptRanOut, VirtualClock, after, run


def test_each_call_has_the_next_outcome():
    backend = Script(1, ConnectionError("down"), LookupError, after(0, 2), None)
    assert backend() == 1
    with pytest.raises(ConnectionError, match="down"):
        backend()
    with pytest.raises(LookupError):
        backend()
    assert (backend(), backend()) == (2, None)
    assert backend.left == 0


def test_an_async_script_is_the_same_with_await():
    async def main():
        backend = AsyncScript(1, ConnectionError("down"), after(60, 2), after(1, OSError("late")))
        loop = asyncio.get_running_loop()
        assert await backend() == 1
        with pytest.raises(ConnectionError, match="down"):
            await backend()
        assert (await backend(), loop.time()) == (2, 60.0)
        with pytest.raises(OSError, match="late"):
            await backend()
        assert loop.time() == 61.0

    run(main())


def test_delays_of_a_plain_script_pass_on_the_virtual_clock():
    clock, backend = VirtualClock(), Script(after(60, "late"), after(1, OSError("later")))
    with use_clock(clock):
        assert backend() == "late"
        with pytest.raises(OSError, match="later"):
            backend()
    assert clock() == 61.0


def test_a_plain_script_refuses_to_block_an_event_loop():
    backend = Script(after(60, "late"))

    async def main():
        with pytest.raises(RuntimeError, match="AsyncScript"):
            backend()

    asyncio.run(main())
    assert backend.running == 0


def test_calls_are_recorded_with_their_arguments_and_times():
    clock, backend = VirtualClock(), Script(then="yes")
    with use_clock(clock):
        backend(1, two=2)
        clock.advance(5)
        backend()
    first, second = backend.calls
    assert (first.args, first.kwargs, first.at) == ((1,), {"two": 2}, 0.0)
    assert (second.args, second.kwargs, second.at) == ((), {}, 5.0)


@pytest.mark.parametrize("then", ["again", None])
def test_a_script_with_a_then_never_runs_out(then):
    backend = Script("once", then=then)
    assert [backend() for _ in range(4)] == ["once", then, then, then]


def test_a_script_that_runs_out_says_which_call_was_too_many():
    backend = Script("a", "b")
    backend()
    backend()
    with pytest.raises(ScriptRanOut, match=r"call 3 of a script of 2 outcomes, with \(1, key='x'\); give it one more"):
        backend(1, key="x")


def test_running_out_is_no_failure_of_the_backend_to_policies_or_handlers():
    breaker = CircuitBreaker("bank", consecutive_failures=1)

    @breaker
    def call():
        try:
            return Script()()
        except Exception:
            return "handled"

    with pytest.raises(ScriptRanOut):
        call()
    assert breaker.snapshot().failures == 0


def test_scripts_can_be_guarded_as_functions_of_their_kind():
    clock = VirtualClock()
    plain = Pipeline(CircuitBreaker("bank", consecutive_failures=1))(Script(OSError("down")))
    patient = Timeout("bank", 1.0)(AsyncScript(after(2, "late")))
    with use_clock(clock), pytest.raises(OSError, match="down"):
        plain()
    assert inspect.iscoroutinefunction(patient)
    with pytest.raises(TimeoutError):
        run(patient())


def test_calls_in_flight_are_counted_and_cancelled_ones_leave():
    places, backend = Bulkhead("places", max_concurrent=3), AsyncScript(then=after(10, "done"))

    async def main():
        call = places(backend)
        tasks = [asyncio.ensure_future(call()) for _ in range(5)]
        await asyncio.sleep(1)
        assert (backend.running, places.snapshot().active) == (3, 3)
        tasks[0].cancel()
        await asyncio.sleep(1)
        assert backend.running == 2
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError, str, str, BulkheadFullError, BulkheadFullError]

    run(main())
    assert (backend.running, backend.most_running, len(backend.calls)) == (0, 3, 3)


def test_threads_share_a_script_and_no_outcome_is_lost_or_had_twice():
    backend, had = Script(*range(4000)), []
    threads = [threading.Thread(target=lambda: [had.append(backend()) for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(had) == list(range(4000))
    assert (len(backend.calls), backend.running) == (4000, 0)


def test_an_error_raised_again_and_again_keeps_no_older_traceback():
    error = OSError("down")
    backend = Script(then=error)
    lengths = []
    for _ in range(3):
        with pytest.raises(OSError, match="down") as caught:
            backend()
        lengths.append(len(list(caught.traceback)))
    assert len(set(lengths)) == 1
    gc.collect()


def test_a_delay_is_checked_where_it_is_written():
    with pytest.raises(ValueError, match="seconds must be 0 or more"):
        after(-1, "late")
