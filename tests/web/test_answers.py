"""Errors become the HTTP answers that clients can act on."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall import (
    BulkheadFullError,
    CallTimeoutError,
    CircuitOpenError,
    DeadlineExceededError,
    DeadlinePassedError,
    LoadShedError,
    RateLimitedError,
    RateLimiter,
    Rejected,
)
from seawall.web.answers import Answer, Answers, sf_string, whole_quota


class Own(Rejected): ...


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RateLimitedError("search", 3.0), 429, "rate_limit_exceeded"),
        (CircuitOpenError("payments", 3.0), 503, "circuit_open"),
        (BulkheadFullError("payments"), 503, "overloaded"),
        (LoadShedError("front"), 503, "overloaded"),
        (Own("mine"), 503, "overloaded"),
        (CallTimeoutError("payments", 2.0), 504, "deadline_exceeded"),
        (DeadlineExceededError("payments", 2.0), 504, "deadline_exceeded"),
        (DeadlinePassedError("payments"), 504, "deadline_exceeded"),
    ],
)
def test_each_refusal_has_its_status_and_code(error, status, code):
    answer = Answers().answer_to(error)
    assert (answer.status, answer.code) == (status, code)
    problem = json.loads(answer.problem())
    assert problem["status"] == status
    assert problem["detail"] == str(error)


def test_the_applications_own_errors_are_its_own_business():
    answers = Answers()
    assert answers.answer_to(ValueError("mine")) is None
    assert answers.answer_to(TimeoutError("mine")) is None
    assert answers.answer_to(KeyboardInterrupt()) is None


def test_a_refusal_always_says_when_to_come_back_and_a_timeout_never_does():
    answers = Answers(unknown_wait=5.0, rng=random.Random(1))
    assert int(answers.headers(answers.answer_to(BulkheadFullError("b")))["retry-after"]) in {5, 6, 7}
    assert "retry-after" not in answers.headers(answers.answer_to(CallTimeoutError("b", 1.0)))


def test_a_deadline_that_has_passed_is_not_worth_a_retry():
    answers = Answers()
    headers = answers.headers(answers.answer_to(DeadlinePassedError("d")))
    assert headers["x-should-retry"] == "false"
    assert "retry-after" not in headers


def test_a_call_that_costs_more_than_the_limit_is_never_worth_a_retry():
    answers = Answers()
    headers = answers.headers(answers.answer_to(RateLimitedError("search", None)))
    assert headers["x-should-retry"] == "false"
    assert "retry-after" not in headers


def test_a_limiter_says_its_quota_and_when_there_is_more():
    limiter = RateLimiter("search", rate=10, per=60, burst=1)
    limiter.enter(0.0)
    with pytest.raises(RateLimitedError) as refused:
        limiter.enter(0.0)
    answers = Answers(rng=random.Random(1))
    headers = answers.headers(answers.answer_to(refused.value))
    assert headers["ratelimit-policy"] == '"search";q=10;w=60'
    assert headers["ratelimit"] == '"search";r=0;t=6'
    assert int(headers["retry-after"]) >= 6  # never earlier than t
    assert headers["content-type"] == "application/problem+json"


@given(st.floats(0, 1e6), st.integers())
def test_retry_after_is_a_whole_number_never_too_early_and_never_past_the_cap(seconds, seed):
    wait = Answers(rng=random.Random(seed)).wait(seconds)
    assert 1 <= wait <= 120
    assert wait >= min(seconds, 120)


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e5))
def test_a_quota_in_whole_numbers_never_promises_more_than_the_rate(rate, per):
    quota, window = whole_quota(rate, per)
    assert quota >= 1
    assert window >= 1
    assert quota / window <= rate / per * (1 + 1e-9)


@given(st.text())
def test_a_name_can_never_break_out_of_its_header(name):
    field = sf_string(name)
    assert field.isascii()
    assert "\n" not in field
    assert "\r" not in field
    inner = field[1:-1].replace("\\\\", "").replace('\\"', "")
    assert '"' not in inner
    assert not inner.endswith("\\")


def test_answers_can_be_given_others_by_status_or_by_function():
    class Busy(Exception):
        retry_after = 2.0

    class Broken(Busy): ...

    answers = Answers({Busy: 503, Broken: lambda error: Answer(502, "broken", "sorry"), CircuitOpenError: 502})
    assert answers.answer_to(Busy()).status == 503
    assert answers.answer_to(Busy()).retry_after == 2.0
    assert answers.answer_to(Broken()).code == "broken"
    assert answers.answer_to(CircuitOpenError("p")).status == 502


@pytest.mark.parametrize("mapped", [200, 600, "503", True, None])
def test_a_status_that_is_no_error_is_refused(mapped):
    with pytest.raises(ValueError, match="400 to 599"):
        Answers({KeyError: mapped})


def test_answers_are_for_classes_of_exceptions():
    with pytest.raises(TypeError, match="classes of exceptions"):
        Answers({"KeyError": 503})
    with pytest.raises(TypeError, match="classes of exceptions"):
        Answers({KeyboardInterrupt: 503})


@pytest.mark.parametrize(("unknown", "longest"), [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_waits_are_checked(unknown, longest):
    with pytest.raises(ValueError, match="unknown_wait"):
        Answers(unknown_wait=unknown, longest_wait=longest)
