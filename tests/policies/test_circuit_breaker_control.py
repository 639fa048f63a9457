"""A breaker in the hands of an operator: states by hand, settings changed while calls run, what errors tell."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import pickle
import threading
import time
import weakref
from asyncio import CancelledError

import pytest

from seawall import (
    CallRejected,
    CircuitBreaker,
    CircuitOpenError,
    State,
    StateChanged,
    ThresholdExceeded,
    growing,
    use_clock,
)


def call(guard, now, error=None, *, took=0.0):
    guard.exit(guard.enter(now), now + took, error)


def guarding(**settings):
    return CircuitBreaker("b", **{"consecutive_failures": 2, "reset_timeout": 30.0, **settings})


def refused(guard, now):
    with pytest.raises(CircuitOpenError) as refusal:
        guard.enter(now)
    return refusal.value


@pytest.fixture(autouse=True)
def _clock():
    with use_clock(lambda: 0.0):
        yield


# By hand


def test_opened_by_hand_it_refuses_for_its_reset_timeout_and_then_probes():
    guard = guarding()
    guard.force_open()
    assert refused(guard, 10.0).retry_after == 20.0
    guard.enter(30.0)
    assert guard.state is State.HALF_OPEN


def test_opened_by_hand_for_a_time_it_refuses_for_that_time():
    guard = guarding()
    guard.force_open(5)
    guard.force_open(100)  # a second word counts
    assert refused(guard, 10.0).retry_after == 90.0
    with pytest.raises(ValueError, match="seconds must be more than 0 and finite, got 0 s"):
        guard.force_open(0)


@pytest.mark.parametrize("state", ["force_open", "isolate", "disable", "metrics_only"])
def test_closed_by_hand_it_judges_again_from_an_empty_window(state):
    guard = guarding()
    call(guard, 0.0, OSError())
    getattr(guard, state)()
    guard.force_closed()
    call(guard, 0.0, OSError())
    assert guard.state is State.CLOSED
    call(guard, 0.0, OSError())
    assert guard.state is State.OPEN


def test_closing_a_closed_breaker_by_hand_forgets_nothing_and_resetting_it_does():
    guard = guarding()
    call(guard, 0.0, OSError())
    guard.force_closed()
    assert guard.snapshot().consecutive_failures == 1
    guard.reset()
    assert guard.snapshot().consecutive_failures == 0
    assert guard.snapshot().failures == 1  # what only grows stays


def test_reset_forgets_how_often_it_opened_in_a_row():
    guard = guarding(reset_timeout=lambda opened: 10.0 * opened)
    guard.force_open()
    guard.force_open()
    assert guard.snapshot().retry_after == 20.0
    guard.reset()
    guard.force_open()
    assert guard.snapshot().retry_after == 10.0
    assert guard.snapshot().opened == 3


def test_isolated_it_refuses_for_ever_and_counts_but_does_not_report_each_refusal():
    heard = []
    guard = guarding(listeners=[heard.append])
    guard.isolate()
    for now in (0.0, 1e9):
        error = refused(guard, now)
        assert error.retry_after is None
    assert (guard.state, guard.snapshot().rejections) == (State.ISOLATED, 2)
    assert heard == [StateChanged("b", 0.0, State.CLOSED, State.ISOLATED, "isolated by hand")]
    assert "isolated" in str(error)


def test_disabled_it_lets_everything_pass_and_counts_nothing():
    heard = []
    guard = guarding(listeners=[heard.append])
    guard.disable()
    for _ in range(5):
        call(guard, 0.0, OSError())
        call(guard, 0.0, CancelledError())
        call(guard, 0.0)
    assert guard.counters() == {"success": 0, "failure": 0, "neither": 0, "rejected": 0}
    assert [event.after for event in heard] == [State.DISABLED]


def test_a_call_let_in_while_disabled_counts_nothing_later():
    guard = guarding()
    guard.disable()
    tokens = [guard.enter(0.0) for _ in range(5)]
    guard.reset()
    for token in tokens:
        guard.exit(token, 0.0, OSError())
    assert (guard.state, guard.snapshot().failures) == (State.CLOSED, 0)


def test_with_metrics_only_it_counts_never_opens_and_says_once_that_it_would():
    heard = []
    guard = guarding(listeners=[heard.append])
    guard.metrics_only()
    for _ in range(5):
        guard.admit().failure(OSError())
    assert guard.snapshot().failures == 5
    assert guard.state is State.METRICS_ONLY
    changed, exceeded = heard
    assert changed.after is State.METRICS_ONLY
    assert exceeded == ThresholdExceeded("b", 0.0, "2 failures in a row")
    guard.metrics_only()  # armed again
    for _ in range(2):
        guard.admit().failure(OSError())
    assert len(heard) == 3


def test_metrics_only_measures_rates_and_slow_calls_and_opens_for_no_callee():
    guard = guarding(
        minimum_calls=2, slow_call_rate=1.0, slow_call_duration=1.0, open_for=lambda answer: 5.0, on_result=lambda _: 1
    )
    guard.metrics_only()
    for _ in range(2):
        permit = guard.admit()
        permit.success()
    with use_clock(lambda: 2.0):
        assert (guard.state, guard.snapshot().failure_rate) == (State.METRICS_ONLY, 1.0)
        assert guard.snapshot().slow_call_rate == 0.0


@pytest.mark.parametrize("state", ["isolate", "disable", "metrics_only", "reset", "force_open"])
def test_a_result_from_before_a_change_by_hand_changes_nothing(state):
    guard = guarding(consecutive_failures=1)
    old = guard.enter(0.0)
    getattr(guard, state)()
    before = guard.state
    guard.exit(old, 0.0, OSError())
    assert guard.state is before
    assert guard.snapshot().failures == 1


def test_a_probe_from_before_a_reset_does_not_close_or_open_it():
    guard = guarding()
    guard.force_open()
    probe = guard.enter(30.0)
    guard.force_open()
    guard.exit(probe, 31.0, None)
    assert guard.state is State.OPEN


def test_a_change_by_hand_is_an_event_delivered_before_it_returns():
    heard = []
    guard = guarding(listeners=[lambda event: heard.append((event.before, event.after, event.reason, guard.state))])
    for change in (guard.force_open, guard.isolate, guard.disable, guard.force_closed, guard.metrics_only, guard.reset):
        change()
    assert [(before.value, after.value, reason) for before, after, reason, _ in heard] == [
        ("closed", "open", "opened by hand"),
        ("open", "isolated", "isolated by hand"),
        ("isolated", "disabled", "disabled by hand"),
        ("disabled", "closed", "closed by hand"),
        ("closed", "metrics_only", "metrics only, by hand"),
        ("metrics_only", "closed", "reset by hand"),
    ]
    assert all(after is state for _, after, _, state in heard)


def test_every_state_is_a_gauge():
    guard = guarding()
    for state, change in (
        (State.ISOLATED, guard.isolate),
        (State.DISABLED, guard.disable),
        (State.CLOSED, guard.reset),
    ):
        change()
        on = [name for name, value in guard.gauges().items() if value == 1.0]
        assert on == [f"state.{state.value}"]


def test_it_is_at_rest_while_a_new_one_would_do_as_well():
    guard = guarding(consecutive_failures=None, window=10.0, slow_call_rate=1.0, slow_call_duration=1.0)
    assert guard.at_rest(0.0)
    call(guard, 0.0)
    assert guard.at_rest(1.0)
    call(guard, 0.0, took=2.0)
    assert not guard.at_rest(2.0)
    call(guard, 5.0, OSError())
    assert not guard.at_rest(14.0)
    assert guard.at_rest(15.0)
    guard.update(consecutive_failures=2)
    assert not guard.at_rest(15.0)  # one more failure would open it, however long ago this one was
    for change in (guard.isolate, guard.disable, guard.metrics_only, guard.force_open):
        change()
        assert not guard.at_rest(15.0)


# What the error tells


def test_the_error_tells_what_opened_it_without_keeping_the_exception():
    guard = guarding(consecutive_failures=1, on=(OSError, RuntimeError))

    class Ours(RuntimeError):
        """Of a class that can be referred to weakly."""

    def fail():
        big = Ours("no route to the bank")
        call(guard, 0.0, big)
        return weakref.ref(big)

    gone = fail()
    gc.collect()
    assert gone() is None
    error = refused(guard, 1.0)
    assert error.failure == "Ours: no route to the bank"
    assert error.__cause__ is None
    assert guard.snapshot().failure == error.failure


@pytest.mark.parametrize(
    ("exc", "told"),
    [
        (OSError(), "OSError"),
        (OSError(2, "No such file"), "FileNotFoundError: No such file"),
        (KeyError(3), "KeyError"),
        (ExceptionGroup("several", [OSError("one")]), "ExceptionGroup: several"),
        (ValueError("x" * 10_000), "ValueError: " + "x" * 200),
    ],
)
def test_a_failure_is_told_by_its_type_and_the_first_200_characters(exc, told):
    guard = guarding(consecutive_failures=1)
    call(guard, 0.0, exc)
    assert refused(guard, 1.0).failure == told


def test_describing_a_failure_runs_no_code_of_the_users():
    class Hostile(Exception):
        def __str__(self):
            raise AssertionError("run under the lock")

        __repr__ = __str__

        @property
        def args(self):
            raise AssertionError("run under the lock")

    class Text(str):
        __slots__ = ()

        def __format__(self, spec):
            raise AssertionError("run under the lock")

    guard = guarding(consecutive_failures=1)
    call(guard, 0.0, Hostile(Text("x"), "plain"))
    assert refused(guard, 1.0).failure == "Hostile: plain"


def test_a_probe_that_fails_replaces_the_failure_told_and_closing_forgets_it():
    guard = guarding(consecutive_failures=1)
    call(guard, 0.0, OSError("first"))
    call(guard, 30.0, OSError("second"))
    assert refused(guard, 31.0).failure == "OSError: second"
    call(guard, 60.0)
    guard.force_open()
    assert refused(guard, 1.0).failure is None


def test_a_refusal_survives_copying_and_pickling():
    guard = guarding(consecutive_failures=1)
    call(guard, 0.0, OSError("first"))
    error = refused(guard, 10.0)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (twin.policy, twin.retry_after, twin.failure) == ("b", 20.0, "OSError: first")
        assert str(twin) == str(error)


# Settings changed live


def test_update_keeps_the_state_the_counts_and_the_window():
    guard = guarding(failure_rate=1.0, minimum_calls=4, consecutive_failures=None)
    for error in (None, OSError(), OSError()):
        call(guard, 1.0, error)
    guard.update(failure_rate=0.5)
    call(guard, 1.0, OSError())
    assert guard.state is State.OPEN  # 3 of 4, three of them from before


def test_update_with_one_wrong_setting_changes_none():
    guard = guarding()
    with pytest.raises(ValueError, match="minimum_calls"):
        guard.update(failure_rate=0.9, minimum_calls=0)
    with pytest.raises(TypeError, match="has no setting threshold to change"):
        guard.update(threshold=3)
    assert guard.failure_rate == 0.5


def test_update_switches_between_seconds_and_calls_and_begins_the_window_anew():
    guard = guarding(minimum_calls=3, consecutive_failures=None)
    for _ in range(2):
        call(guard, 1.0, OSError())
    guard.update(window_calls=5)
    assert (guard.window, guard.window_calls) == (None, 5)
    call(guard, 1.0, OSError())
    assert guard.state is State.CLOSED
    guard.update(window=20)
    assert (guard.window, guard.window_calls) == (20.0, None)
    for _ in range(3):
        call(guard, 1.0, OSError())
    assert guard.state is State.OPEN
    assert guard.snapshot().failures == 6


def test_update_while_open_leaves_the_time_that_runs_and_changes_the_next():
    guard = guarding()
    guard.force_open()
    guard.update(reset_timeout=growing(100, jitter=0))
    assert refused(guard, 10.0).retry_after == 20.0
    call(guard, 30.0, OSError())
    assert refused(guard, 30.0).retry_after == 200.0


@pytest.mark.parametrize(
    ("change", "state"),
    [({"success_threshold": 1}, State.CLOSED), ({"permitted_probes": 4}, State.OPEN), ({"probes": 5}, State.HALF_OPEN)],
)
def test_update_of_a_round_of_probes_that_is_decided_by_it_ends_it_at_once(change, state):
    guard = guarding(success_threshold=4, permitted_probes=6)
    guard.force_open()
    for error in (None, OSError()):
        call(guard, 30.0, error)
    guard.update(**change)
    assert guard.state is state


def test_update_turns_slow_calls_on_and_off_while_calls_run():
    guard = guarding(minimum_calls=1)
    before = guard.enter(0.0)
    guard.update(slow_call_rate=0.1, slow_call_duration=1.0)
    during = guard.enter(0.0)
    guard.exit(before, 9.0, None)  # nobody noted when it began
    assert guard.state is State.CLOSED
    guard.update(slow_call_rate=None, slow_call_duration=None)
    guard.exit(during, 9.0, None)
    assert (guard.state, guard.snapshot().successes) == (State.CLOSED, 2)


def test_update_gives_a_breaker_no_first_predicate_because_nobody_would_ask_it():
    guard = guarding()
    with pytest.raises(
        ValueError, match=r"'b' was built without predicates, .* give it the first one when it is built"
    ):
        guard.update(on_result=bool, failure_rate=0.9)
    assert (guard.failure_rate, guard.on_result) == (0.5, None)


def test_update_replaces_predicates_and_takes_them_away():
    guard = guarding(consecutive_failures=1, on_result=bool)
    decorated = guard(lambda: "bad")
    guard.update(on_result=None)
    decorated()
    assert guard.state is State.CLOSED
    guard.update(on=lambda error: True, on_result=lambda answer: answer == "bad")
    decorated()
    assert guard.state is State.OPEN


def test_every_setting_can_be_read_back_and_given_again():
    told = {
        "failure_rate": 0.4,
        "slow_call_rate": 0.3,
        "slow_call_duration": 2.0,
        "consecutive_failures": 7,
        "minimum_calls": 5,
        "window": None,
        "window_calls": 50,
        "reset_timeout": growing(3),
        "open_for": len,
        "probes": 3,
        "permitted_probes": 9,
        "success_threshold": 4,
        "probe_timeout": 6.0,
        "half_open_timeout": 60.0,
        "half_open_then": State.CLOSED,
        "on": (OSError, KeyError),
        "ignore": callable,
        "on_result": bool,
    }
    guard = CircuitBreaker("b", **told)
    assert {setting: getattr(guard, setting) for setting in told} == told
    guard.update()
    assert {setting: getattr(guard, setting) for setting in told} == told


# Peers' defects that are about threads and clocks


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_b10_no_lock_is_held_while_a_call_runs_or_awaits(kind):
    inside, go_on = threading.Event(), threading.Event()
    guard = guarding()

    @guard
    def plain():
        inside.set()
        assert go_on.wait(30)

    @guard
    async def coroutine():
        inside.set()
        assert await asyncio.to_thread(go_on.wait, 30)

    thread = threading.Thread(target=plain if kind == "plain" else lambda: asyncio.run(coroutine()))
    thread.start()
    assert inside.wait(30)
    guard(lambda: None)()  # would wait for the lock, were it held
    go_on.set()
    thread.join(30)
    assert guard.snapshot().successes == 2


def test_b29_a_wall_clock_that_steps_back_an_hour_changes_nothing(monkeypatch):
    guard = guarding(consecutive_failures=1)
    call(guard, 100.0, OSError())
    monkeypatch.setattr(time, "time", lambda: -3600.0)
    call(guard, 130.0)
    assert guard.state is State.CLOSED


def test_s4_a_stale_or_ignored_result_in_half_open_never_adds_a_permit():
    guard = guarding(ignore=KeyError, probes=2, permitted_probes=2, success_threshold=2)
    stale = [guard.enter(0.0) for _ in range(6)]
    guard.force_open()
    probes = [guard.enter(30.0), guard.enter(30.0)]
    for token, ending in zip(stale, [None, OSError(), KeyError()] * 2, strict=True):
        guard.exit(token, 31.0, ending)
        refused(guard, 31.0)
    guard.exit(probes[0], 31.0, KeyError())  # gives back one ...
    guard.enter(31.0)
    refused(guard, 31.0)  # ... and no more


def test_s5_a_listener_may_open_close_and_update_the_breaker_that_called_it():
    guard = guarding(consecutive_failures=1)
    heard = []

    def operator(event):
        heard.append(event)
        if isinstance(event, StateChanged) and event.after is State.OPEN:
            guard.update(reset_timeout=1.0)
            guard.metrics_only()

    guard.listen(operator)
    with pytest.raises(ZeroDivisionError):
        guard(lambda: 1 / 0)()
    assert guard.state is State.METRICS_ONLY
    assert [event.after for event in heard] == [State.OPEN, State.METRICS_ONLY]


def test_eight_threads_and_three_loops_admit_no_more_probes_than_permitted():
    guard = guarding(probes=3, permitted_probes=50, success_threshold=50)
    guard.force_open(1.0)
    barrier, lock = threading.Barrier(11, timeout=30), threading.Lock()
    inside, probing = 0, []

    def step(change):
        nonlocal inside
        with lock:
            inside += change
            if change > 0 and guard.state is State.HALF_OPEN:
                probing.append(inside)

    @guard
    def plain():
        step(+1)
        time.sleep(0)  # another thread's turn
        step(-1)

    @guard
    async def call():
        step(+1)
        await asyncio.sleep(0)
        step(-1)

    def in_a_thread():
        barrier.wait()
        for _ in range(100_000):
            with contextlib.suppress(CircuitOpenError):
                plain()
            if guard.state is State.CLOSED:
                break

    async def in_a_task():
        for _ in range(30):
            with contextlib.suppress(CircuitOpenError):
                await call()

    async def on_a_loop():
        barrier.wait()
        await asyncio.gather(*(in_a_task() for _ in range(10)))

    with use_clock(lambda: 1.0):
        jobs = [in_a_thread] * 8 + [lambda: asyncio.run(on_a_loop())] * 3
        threads = [threading.Thread(target=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert (guard.state, guard.snapshot().opened) == (State.CLOSED, 1)
    assert len(probing) == 50
    assert max(probing) <= 3


def test_rejections_carry_no_event_where_nobody_listens_and_one_each_where_somebody_does():
    heard = []
    guard = guarding()
    guard.force_open()
    refused(guard, 0.0)
    guard.listen(heard.append)
    error = refused(guard, 0.0)
    guard.snapshot()
    call(CircuitBreaker("other"), 0.0)
    with pytest.raises(CircuitOpenError):
        guard(lambda: 1)()  # the gate delivers what is queued
    assert heard[0] == CallRejected("b", 0.0, error)
    assert len(heard) == 2
