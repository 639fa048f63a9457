"""Priority and deadline come with a request and go on with the next one, and nothing else does."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.baggage import get_all, set_baggage
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, attach, detach, get_current
from prometheus_client import CollectorRegistry, generate_latest

from seawall import Bulkhead, Deadline, DeadlinePassedError, Pipeline, Priority, priority, time_left, use_clock
from seawall.core.ambient import current_priority
from seawall.telemetry import install
from seawall.telemetry.baggage import inherited, passed_on, told_priority, told_seconds
from seawall.testing import VirtualClock


class Request:
    """What a header of baggage becomes current as."""

    def __init__(self, header):
        self.header = header

    def __enter__(self):
        self.token = attach(W3CBaggagePropagator().extract({"baggage": self.header}, Context()))

    def __exit__(self, *_):
        detach(self.token)


def sent():
    """The header that goes out."""
    carrier = {}
    W3CBaggagePropagator().inject(carrier)
    return carrier.get("baggage", "")


def test_a_request_has_the_priority_and_the_deadline_of_its_caller():
    clock = VirtualClock()
    with use_clock(clock), Request("seawall.priority=low,seawall.deadline=1.5,theirs=1"):
        with inherited():
            assert current_priority.get() is Priority.LOW
            assert time_left() == 1.5
            clock.advance(2.0)
            with pytest.raises(DeadlinePassedError):
                asyncio.run(Deadline("inner", 10.0)(asyncio.sleep)(0))
        assert (current_priority.get(), time_left()) == (Priority.NORMAL, math.inf)


def test_what_goes_out_has_the_seconds_that_are_left_and_keeps_what_is_not_ours():
    clock = VirtualClock()
    with use_clock(clock), Request("seawall.deadline=2,theirs=1"), inherited(), priority(Priority.HIGH):
        clock.advance(0.5)
        before = get_current()
        with passed_on():
            assert dict(part.split("=") for part in sent().split(",")) == {
                "seawall.priority": "high",
                "seawall.deadline": "1.500",
                "theirs": "1",
            }
        assert get_current() is before


def test_without_a_deadline_none_goes_out_and_a_stale_one_is_taken_off():
    with Request("seawall.deadline=2"), passed_on():  # nobody inherited it
        assert sent() == "seawall.priority=normal"


def test_a_deadline_that_is_over_says_so():
    clock = VirtualClock()
    with use_clock(clock), Request("seawall.deadline=1"), inherited():
        clock.advance(5.0)
        with passed_on():
            assert "seawall.deadline=0.000" in sent()


def test_the_sooner_deadline_holds():
    clock = VirtualClock()
    with use_clock(clock), Request("seawall.deadline=1"), inherited():
        with Request("seawall.deadline=9"), inherited():
            assert time_left() == 1.0
        assert time_left() == 1.0


def test_a_caller_gets_no_more_than_it_may_claim():
    with Request("seawall.priority=critical"):
        with inherited():
            assert current_priority.get() is Priority.HIGH
        with inherited(highest=Priority.CRITICAL):
            assert current_priority.get() is Priority.CRITICAL
        with inherited(highest=Priority.LOW):
            assert current_priority.get() is Priority.LOW


@given(st.text(max_size=50) | st.sampled_from(["nan", "inf", "-1", "1e9", "9" * 30, "1_0", "\u0661", "0x1", " 1", ""]))
def test_whatever_stands_there_is_a_number_a_level_or_nothing(value):
    context = set_baggage("seawall.deadline", value, set_baggage("seawall.priority", value, Context()))
    token = attach(context)
    try:
        with inherited():
            pass
        seconds, level = told_seconds(), told_priority()
    finally:
        detach(token)
    assert seconds is None or 0 <= seconds <= 86_400
    assert level is None or isinstance(level, Priority)


@pytest.mark.parametrize("value", [3, None, ["high"], "x" * 1_000_000])
def test_what_is_no_short_text_is_ignored(value):
    token = attach(set_baggage("seawall.priority", value, set_baggage("seawall.deadline", value, Context())))
    try:
        assert (told_priority(), told_seconds()) == (None, None)
    finally:
        detach(token)


def test_nothing_of_the_baggage_is_exported(provider, fresh):
    registry = CollectorRegistry()
    uninstall = install(tracer_provider=provider, registry=registry)
    secret = "visible-to-nobody"

    @Pipeline(Bulkhead("b", max_concurrent=1), name="call")
    async def call():
        return get_all()

    with Request(f"seawall.priority=high,customer={secret}"), inherited():
        assert asyncio.run(call())["customer"] == secret  # it travels
    told = generate_latest(registry).decode() + "".join(str(dict(span.attributes)) for span in provider.finished())
    uninstall()
    assert "pipeline_name" in told
    assert secret not in told
    assert "seawall.priority" not in told


def test_a_generator_closed_in_another_task_logs_no_context_error(caplog):
    async def stream():
        with passed_on():
            yield 1

    async def main():
        one = stream()
        await asyncio.create_task(anext(one))
        await asyncio.create_task(one.aclose())

    asyncio.run(main())
    assert not caplog.records
