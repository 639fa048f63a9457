"""Settings are refused where they are given, with the value and the rule."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest

from seawall import SLO, CircuitBreaker, Keyed, KeyedRateLimiter, Timeout
from seawall.core import checks


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 10**400, -(10**400), True, "2", None, [2]])
def test_seconds_are_a_positive_finite_number(value):
    with pytest.raises((ValueError, TypeError), match=r"^after must be "):
        Timeout("t", value)


def test_seconds_may_be_a_timedelta():
    assert Timeout("t", timedelta(milliseconds=1500)).after == 1.5


@pytest.mark.parametrize("window", [1e-310, 1e-4, 0, math.inf, 10**400])
def test_a_window_too_short_for_any_clock_is_refused_where_it_is_given(window):
    with pytest.raises(ValueError, match=r"^window must be "):
        SLO("s", target=0.9, window=window)


def test_the_shortest_window_works():
    objective = SLO("s", target=0.9, window=0.001)
    for now in (0.0, 0.0005, 1.0, 1e9):
        objective.exit(objective.enter(now), now, OSError())
    assert objective.snapshot().bad == 4


@pytest.mark.parametrize(
    ("value", "hint"), [(50, "for 50 % write 0.5"), (0, "got 0"), (-0.5, "got -0.5"), (101, "101")]
)
def test_a_fraction_out_of_range_says_what_was_meant(value, hint):
    with pytest.raises(ValueError, match=r"^rate must be in \(0, 1\]") as caught:
        checks.fraction("rate", value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("value", [1.0, True, "3", None])
def test_a_count_is_a_whole_number(value):
    with pytest.raises(TypeError, match=r"^probes must be a whole number"):
        checks.count("probes", value)


@pytest.mark.parametrize("name", ["", "a" * 201, "two\nlines", "\x00"])
def test_a_name_is_short_and_printable(name):
    with pytest.raises(ValueError, match="name must be 1 to 200 printable characters"):
        Timeout(name, 1.0)


@pytest.mark.parametrize("on", [1, "OSError", [OSError], (OSError, 1), int])
def test_exceptions_are_classes(on):
    with pytest.raises(TypeError, match="on must be an exception class or a tuple of them"):
        checks.exceptions("on", on)


class Awaited:
    """Called, it gives a coroutine."""

    async def __call__(self, value): ...


async def awaited(value): ...


@pytest.mark.parametrize("value", [5, None, "len", awaited, Awaited()])
def test_what_nobody_would_await_must_be_a_plain_function(value):
    with pytest.raises(TypeError, match=r"^key must be a plain function of the arguments, got "):
        checks.function("key", value, of="the arguments")
    assert checks.function("key", len) is len


@pytest.mark.parametrize("limits", [False, True])
def test_a_key_that_would_be_a_coroutine_is_refused_where_it_is_given(limits):
    with pytest.raises(TypeError, match=r"^key must be a plain function of a call's arguments, got .*awaited"):
        KeyedRateLimiter("k", rate=1, key=Awaited()) if limits else Keyed("k", CircuitBreaker, key=Awaited())
