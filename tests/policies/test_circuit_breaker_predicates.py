"""What counts as failure by predicates of the user's, and opening for a time that the callee named."""

from __future__ import annotations

import asyncio
import math
import threading
from asyncio import CancelledError
from datetime import timedelta

import pytest

from seawall import (
    BulkheadFullError,
    CircuitBreaker,
    CircuitOpenError,
    Pipeline,
    State,
    Timeout,
    breaker,
    policies_of,
    use_clock,
)
from seawall.core import gate


class Answer:
    def __init__(self, status, retry_after=None):
        self.status, self.retry_after = status, retry_after


class AnswerError(Exception):
    def __init__(self, status, retry_after=None):
        self.status, self.retry_after = status, retry_after


def served(guard, outcome=None):
    """One call through the gate, at its clock, that returns or raises `outcome`."""

    @guard
    def call():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    if isinstance(outcome, BaseException):
        with pytest.raises(type(outcome)) as raised:
            call()
        assert raised.value is outcome
    else:
        assert call() is outcome


def guarding(**settings):
    return CircuitBreaker("b", **{"consecutive_failures": 1, "reset_timeout": 30.0, **settings})


@pytest.fixture(autouse=True)
def _clock():
    with use_clock(lambda: 100.0):
        yield


def test_a_result_that_a_predicate_condemns_is_a_failure_and_reaches_the_caller():
    guard = guarding(on_result=lambda answer: answer.status >= 500)
    served(guard, Answer(200))
    assert guard.state is State.CLOSED
    served(guard, Answer(503))
    assert guard.state is State.OPEN
    assert (guard.snapshot().successes, guard.snapshot().failures) == (1, 1)


@pytest.mark.asyncio
async def test_results_are_judged_on_coroutines_generators_scopes_and_permits():
    guard = guarding(on_result=lambda answer: answer == "bad", consecutive_failures=100)

    @guard
    async def call():
        return "bad"

    @guard
    def items():
        yield 1
        return "bad"

    await call()
    list(items())
    guard.admit().success("bad")
    assert guard.snapshot().failures == 3
    async with guard:
        pass
    with guard.scope():
        pass
    assert guard.snapshot().successes == 2  # a block has the result None


def test_a_predicate_of_exceptions_decides_what_is_a_failure():
    guard = guarding(on=lambda error: error.status >= 500)
    served(guard, AnswerError(404))
    assert (guard.state, guard.snapshot().neither) == (State.CLOSED, 1)
    served(guard, AnswerError(503))
    assert guard.state is State.OPEN


def test_a_predicate_of_exceptions_decides_what_is_ignored():
    guard = guarding(on=AnswerError, ignore=lambda error: error.status == 404)
    served(guard, ValueError())
    served(guard, AnswerError(404))
    assert (guard.state, guard.snapshot().neither) == (State.CLOSED, 2)
    served(guard, AnswerError(503))
    assert guard.state is State.OPEN


def test_predicates_are_never_asked_about_cancelled_or_refused_calls():
    asked = []
    guard = guarding(on=asked.append, ignore=asked.append, on_result=asked.append, open_for=asked.append)
    for ending in (CancelledError(), KeyboardInterrupt(), BulkheadFullError("further in")):
        permit = guard.admit()
        permit.failure(ending)
    assert asked == []
    assert (guard.state, guard.snapshot().neither) == (State.CLOSED, 3)


@pytest.mark.parametrize("setting", ["on", "ignore", "on_result", "open_for"])
def test_a_predicate_runs_without_the_lock(setting):
    """Another thread could take it meanwhile; the lock is re-entrant, so this one can't tell."""
    free = []

    def ask(outcome):
        taken = []

        def other_thread():
            taken.append(gate.lock.acquire(timeout=5))
            gate.lock.release()

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        free.extend(taken)

    guard = guarding(**{setting: ask})
    served(guard, 1)
    served(guard, OSError())
    assert free
    assert all(free)


@pytest.mark.parametrize(
    ("setting", "outcome", "state"),
    [
        ("on", OSError(), State.OPEN),  # an exception is a failure unless somebody knows better
        ("ignore", OSError(), State.OPEN),
        ("on_result", "fine", State.CLOSED),
        ("open_for", "fine", State.CLOSED),
    ],
)
def test_a_predicate_that_raises_is_logged_and_hurts_no_call(setting, outcome, state, caplog):
    def broken(outcome):
        raise ZeroDivisionError("mine")

    guard = guarding(**{setting: broken})
    served(guard, outcome)
    assert guard.state is state
    assert "mine" in caplog.text


def test_a_predicate_that_answers_neither_yes_nor_no_is_logged_and_hurts_no_call(caplog):
    class Unsure:
        def __bool__(self):
            raise ValueError("the truth of an array is ambiguous")

    guard = guarding(on_result=lambda answer: Unsure())
    served(guard, "fine")
    assert guard.state is State.CLOSED
    assert "ambiguous" in caplog.text


def test_an_interruption_in_a_predicate_reaches_the_caller_and_leaves_nothing_behind():
    def interrupted(answer):
        raise KeyboardInterrupt

    guard = guarding(on_result=interrupted)
    with pytest.raises(KeyboardInterrupt):
        guard(lambda: 1)()
    assert (guard.state, guard.snapshot().neither) == (State.CLOSED, 1)


def test_it_opens_for_as_long_as_a_result_says_whatever_the_rate():
    guard = guarding(open_for=lambda answer: answer.retry_after, consecutive_failures=None)
    served(guard, Answer(200))
    served(guard, Answer(429, retry_after=7.5))
    assert guard.state is State.OPEN
    with pytest.raises(CircuitOpenError) as refused:
        served(guard)
    assert refused.value.retry_after == 7.5


def test_it_opens_for_as_long_as_an_exception_says_even_an_ignored_one():
    guard = guarding(open_for=lambda error: timedelta(seconds=error.retry_after), ignore=AnswerError)
    served(guard, AnswerError(429, retry_after=9))
    assert guard.snapshot().retry_after == 9.0
    assert guard.snapshot().neither == 1


@pytest.mark.parametrize("nothing", [None, 0, -5.0, timedelta(0)])
def test_a_time_that_is_over_or_not_named_opens_nothing(nothing, caplog):
    guard = guarding(open_for=lambda answer: nothing)
    served(guard, Answer(200))
    assert guard.state is State.CLOSED
    assert caplog.text == ""


@pytest.mark.parametrize("nonsense", ["soon", math.nan, math.inf, 1 + 2j])
def test_a_time_that_makes_no_sense_is_logged_and_opens_nothing(nonsense, caplog):
    guard = guarding(open_for=lambda answer: nonsense)
    served(guard, Answer(200))
    assert guard.state is State.CLOSED
    assert "failed; the call goes on" in caplog.text


def test_a_probe_that_is_told_to_wait_opens_it_for_that_long():
    now = [0.0]
    guard = guarding(open_for=lambda answer: answer and answer.retry_after)
    with use_clock(lambda: now[0]):
        guard.force_open(10.0)
        now[0] = 10.0
        served(guard, Answer(200, retry_after=100.0))
        assert (guard.state, guard.snapshot().retry_after) == (State.OPEN, 100.0)


def test_a_late_result_opens_it_for_no_time():
    guard = guarding(open_for=lambda answer: answer.retry_after)
    late = guard.admit()
    guard.force_open(1.0)
    guard.reset()
    late.success(Answer(200, retry_after=100.0))
    assert guard.state is State.CLOSED


def test_predicates_see_what_policies_further_in_made_of_the_call():
    seen = []
    guard = guarding(on=lambda error: seen.append(type(error).__name__))

    @Pipeline(guard, Timeout("t", 0.001))
    async def hang():
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        asyncio.run(hang())
    assert seen == ["CallTimeoutError"]


def test_only_breakers_with_predicates_make_a_row_judge():
    assert not guarding(on=OSError, ignore=(KeyError,)).judges
    assert not guarding(reset_timeout=lambda opened: 1.0, slow_call_rate=0.5, slow_call_duration=1.0).judges
    for setting in ("on", "ignore", "on_result", "open_for"):
        assert guarding(**{setting: lambda outcome: False}).judges


def test_the_decorator_takes_predicates_too():
    @breaker(on_result=lambda answer: answer == "bad", consecutive_failures=1)
    def call():
        return "bad"

    call()
    (guard,) = policies_of(call)
    assert guard.state is State.OPEN


@pytest.mark.asyncio
async def test_a_judged_call_that_is_cancelled_is_neither():
    guard = guarding(on_result=lambda answer: True, open_for=lambda answer: 5.0)

    @guard
    async def hang():
        await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(CancelledError):
        await task
    assert (guard.state, guard.snapshot().neither) == (State.CLOSED, 1)
