from __future__ import annotations

import threading

import pytest

from seawall import Bulkhead, BulkheadFullError, CallRejected, CircuitBreaker, Event, StateChanged
from seawall.core import events as core_events
from seawall.testing import capture_events


def refuse(guard):
    held = guard.admit()
    with pytest.raises(BulkheadFullError):
        guard.admit()
    held.success()


def trip(name):
    CircuitBreaker(name, consecutive_failures=1).admit().failure(OSError())


def test_events_of_every_policy_are_captured_in_order():
    with capture_events() as events:
        refuse(Bulkhead("places", max_concurrent=1))
        trip("bank")
    assert [(type(event), event.policy) for event in events] == [(CallRejected, "places"), (StateChanged, "bank")]


def test_only_the_kinds_and_the_policy_asked_for_are_captured():
    with (
        capture_events(StateChanged) as changes,
        capture_events(policy="bank") as of_bank,
        capture_events(CallRejected, StateChanged, policy="shop") as of_shop,
        capture_events(Event) as everything,
    ):
        refuse(Bulkhead("bank", max_concurrent=1))
        trip("bank")
        trip("shop")
    assert [event.policy for event in changes] == ["bank", "shop"]
    assert [type(event) for event in of_bank] == [CallRejected, StateChanged]
    assert [event.policy for event in of_shop] == ["shop"]
    assert len(everything) == 3


def test_nothing_is_captured_after_the_block_and_nobody_listens_any_more():
    before = core_events._listeners
    with pytest.raises(LookupError), capture_events() as events:
        raise LookupError
    trip("bank")
    assert events == []
    assert core_events._listeners == before


def test_events_of_other_threads_are_captured_and_none_is_lost():
    with capture_events(CallRejected, policy="places") as events:

        def use():
            guard = Bulkhead("places", max_concurrent=1)
            for _ in range(200):
                refuse(guard)

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(events) == 1600


@pytest.mark.parametrize("wrong", ["StateChanged", CircuitBreaker, None])
def test_what_is_no_class_of_events_is_refused(wrong):
    with pytest.raises(TypeError, match="classes of events"):
        capture_events(wrong)
