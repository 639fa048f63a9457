"""What a request's headers say about its deadline, and what hostile ones can't do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.web.intake import READERS, deadline_headers, seconds_left

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("name", "value", "seconds"),
    [
        ("grpc-timeout", "1H", 3600.0),
        ("grpc-timeout", "2M", 120.0),
        ("grpc-timeout", "3S", 3.0),
        ("grpc-timeout", "250m", 0.25),
        ("grpc-timeout", "250u", 250e-6),
        ("grpc-timeout", "250n", 250e-9),
        ("x-envoy-expected-rq-timeout-ms", "1500", 1.5),
        ("x-envoy-expected-rq-timeout-ms", "-5", -0.005),
        ("x-request-deadline", "1800000002.5", 2.5),
        ("x-request-deadline", "1799999999", -1.0),
    ],
)
def test_each_header_in_its_own_unit(name, value, seconds):
    assert seconds_left([(name, value)], NOW) == pytest.approx(seconds)


def test_the_earliest_counts_also_of_a_repeated_header():
    found = [("grpc-timeout", "5S"), ("x-envoy-expected-rq-timeout-ms", "9000"), ("grpc-timeout", "2S")]
    assert seconds_left(found, NOW) == 2.0


@pytest.mark.parametrize(
    "value",
    ["", "nan", "inf", "-inf", "1e9", "0x10", "٣S", "3 S", "123456789S", "S", "1.5S", "--1", "9" * 400, "\x00", "1\n2"],
)
@pytest.mark.parametrize("name", READERS)
def test_what_is_malformed_is_ignored(name, value):
    assert seconds_left([(name, value), ("x-envoy-expected-rq-timeout-ms", "1500")], NOW) == 1.5


@given(st.sampled_from(list(READERS)), st.text(max_size=40))
def test_no_header_ever_gives_more_than_a_finite_number(name, value):
    seconds = seconds_left([(name, value)], NOW)
    assert seconds is None or math.isfinite(seconds)


def test_without_a_deadline_header_nothing_is_said():
    assert seconds_left([("accept", "text/html")], NOW) is None


@given(st.floats(0.002, 86_000))
def test_what_is_handed_on_is_read_as_it_was_to_the_millisecond(seconds):
    for header in deadline_headers(seconds, NOW).items():
        assert seconds_left([header], NOW) == pytest.approx(seconds, abs=2e-3)


def test_nothing_is_handed_on_where_there_is_no_deadline():
    assert deadline_headers(math.inf, NOW) == {}


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e12])
def test_what_is_handed_on_always_fits_its_header(seconds):
    for header in deadline_headers(seconds, NOW).items():
        assert seconds_left([header], NOW) is not None
