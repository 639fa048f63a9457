from __future__ import annotations

import asyncio
import threading

import pytest

from seawall import Bulkhead, BulkheadFullError, CallRejected, CircuitBreaker, StateChanged, listen


def refuse(guard):
    held = guard.admit()
    with pytest.raises(BulkheadFullError):
        guard.admit()
    held.success()


def test_a_listener_of_all_policies_hears_every_one_until_it_stops():
    heard = []
    stop = listen(heard.append)
    refuse(Bulkhead("one", max_concurrent=1))
    refuse(Bulkhead("two", max_concurrent=1))
    stop()
    stop()
    refuse(Bulkhead("three", max_concurrent=1))
    assert [event.policy for event in heard] == ["one", "two"]


def test_a_listener_of_one_policy_hears_that_one_only():
    heard, guard = [], Bulkhead("one", max_concurrent=1)
    guard.listen(heard.append)
    refuse(guard)
    refuse(Bulkhead("two", max_concurrent=1))
    (event,) = heard
    assert isinstance(event, CallRejected)
    assert isinstance(event.error, BulkheadFullError)


@pytest.mark.parametrize("error", [RuntimeError("mine"), asyncio.CancelledError()])
def test_a_listener_that_raises_hurts_neither_the_call_nor_the_other_listeners(error, caplog):
    heard = []

    def broken(event):
        raise error

    guard = CircuitBreaker("b", consecutive_failures=1, listeners=[broken, heard.append])
    with pytest.raises(ZeroDivisionError):
        guard(lambda: 1 / 0)()
    assert [type(event) for event in heard] == [StateChanged]
    assert "the call goes on" in caplog.text


def test_listeners_run_without_the_lock_so_other_threads_go_on():
    other = Bulkhead("other", max_concurrent=1)
    done = threading.Event()

    def slow(event):
        thread = threading.Thread(target=lambda: (other.admit().success(), done.set()))
        thread.start()
        assert done.wait(30), "the lock was held while a listener ran"
        thread.join(30)

    guard = Bulkhead("k", max_concurrent=1, listeners=[slow])
    refuse(guard)
    assert done.is_set()


def test_events_a_listener_causes_come_after_the_one_it_hears():
    heard = []
    second = Bulkhead("second", max_concurrent=1)

    def first(event):
        heard.append(f"first hears {event.policy}")
        if event.policy == "first":
            refuse(second)

    stops = [listen(first), listen(lambda event: heard.append(f"then {event.policy}"))]
    try:
        refuse(Bulkhead("first", max_concurrent=1))
    finally:
        for stop in stops:
            stop()
    assert heard == ["first hears first", "then first", "first hears second", "then second"]


def test_an_event_is_frozen():
    heard = []
    refuse(Bulkhead("one", max_concurrent=1, listeners=[heard.append]))
    with pytest.raises(AttributeError):
        heard[0].policy = "two"
