from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from seawall import Bulkhead, CircuitBreaker, Pipeline
from seawall.core import registry
from seawall.testing import LeakError, VirtualTimeLoop, no_leaks, run


def test_a_block_that_gives_everything_back_passes():
    async def main():
        async with Bulkhead("places", max_concurrent=1):
            await asyncio.sleep(1)

    with no_leaks():
        run(main())
        Bulkhead("places", max_concurrent=1).admit().success()


def test_a_permit_that_is_still_out_is_a_leak():
    places = Bulkhead("places", max_concurrent=2)
    first = places.admit()
    with pytest.raises(LeakError, match="Bulkhead 'places' has 2 active, 1 before"), no_leaks():
        second = places.admit()
    first.cancel()
    second.cancel()


def test_what_was_out_before_is_no_leak():
    places = Bulkhead("places", max_concurrent=2)
    held = places.admit()
    with no_leaks():
        places.admit().success()
    with no_leaks():
        held.success()


def test_a_policy_that_is_dropped_with_a_place_taken_does_not_hide_the_leak():
    with pytest.raises(LeakError, match="Bulkhead 'mine' has 1 active"), no_leaks():
        Bulkhead("mine", max_concurrent=2)._active += 1


def test_a_probe_that_is_still_out_is_a_leak():
    bank = CircuitBreaker("bank", consecutive_failures=1, reset_timeout=1e-9)
    bank.admit().failure(OSError())
    with pytest.raises(LeakError, match="1 probes"), no_leaks():
        probe = bank.admit()
    probe.cancel()


def test_what_only_garbage_holds_is_no_leak():
    places = Bulkhead("places", max_concurrent=2)

    @places
    async def stream():
        yield 1
        yield 2

    class Reader:
        def __init__(self):
            self.me = self
            self.items = stream()

    async def main():
        await anext(Reader().items)

    gc.disable()
    try:
        with no_leaks():
            loop = asyncio.new_event_loop()
            loop.run_until_complete(main())
            loop.close()  # finalises no stream
    finally:
        gc.enable()


@pytest.mark.parametrize("runner", [run, asyncio.run], ids=["virtual", "real"])
def test_a_guarded_call_that_runs_on_when_its_loop_stops_is_a_leak(runner):
    async def main():
        main.task = asyncio.ensure_future(Pipeline()(asyncio.sleep)(3600))
        await asyncio.sleep(0)

    with pytest.raises(LeakError, match=r"task Task-\d+ of sleep"), no_leaks():
        runner(main())


def test_a_call_that_goes_on_when_its_loop_runs_again_is_no_leak():
    async def begin():
        return asyncio.ensure_future(Pipeline()(asyncio.sleep)(10))

    async def end(task):
        await task

    with no_leaks(), asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(end(runner.run(begin())))


def test_inside_a_loop_the_tasks_count_that_the_block_began():
    async def main():
        sleep = Pipeline()(asyncio.sleep)
        before = asyncio.ensure_future(sleep(3600))
        with no_leaks():
            await asyncio.ensure_future(sleep(1))
        with pytest.raises(LeakError, match="task"), no_leaks():
            after = asyncio.ensure_future(sleep(3600))
        before.cancel()
        after.cancel()

    run(main())


def test_tasks_of_the_user_are_none_of_our_business():
    async def main():
        main.task = asyncio.ensure_future(asyncio.sleep(3600))
        await asyncio.sleep(0)

    with no_leaks():
        asyncio.run(main())


def test_a_thread_of_ours_that_runs_on_is_a_leak_and_one_that_ends_soon_is_none():
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="seawall-engine", args=(60,))
    others = threading.Thread(target=done.wait, name="somebody", args=(60,))
    with pytest.raises(LeakError, match="thread seawall-engine") as caught, no_leaks():
        thread.start()
        others.start()
    assert "somebody" not in str(caught.value)
    done.set()
    thread.join()

    class Ending(threading.Thread):
        def join(self, timeout=None):
            asked.set()
            super().join(timeout)

    asked = threading.Event()
    with no_leaks():
        Ending(target=asked.wait, name="seawall-engine", args=(60,)).start()
    others.join()


def test_the_error_of_the_block_is_not_replaced_and_everything_is_unhooked():
    register, run_forever = registry.register, asyncio.BaseEventLoop.run_forever
    with pytest.raises(LookupError), no_leaks():
        permit = Bulkhead("places", max_concurrent=1).admit()
        raise LookupError
    assert (registry.register, asyncio.BaseEventLoop.run_forever) == (register, run_forever)
    permit.cancel()
