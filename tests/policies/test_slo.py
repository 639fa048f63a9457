from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import SLO, BudgetExhausted, Bulkhead, BulkheadFullError, CircuitOpenError, RateLimitedError, use_clock
from seawall.slo.brownout import BrownedOutError
from seawall.testing import VirtualClock, run


def call(guard, now, error=None, took=0.0):
    guard.exit(guard.enter(now - took), now, error)


def budget(guard, now):
    with use_clock(lambda: now):
        return guard.error_budget


def test_success_in_time_is_good_and_failure_or_lateness_bad():
    guard = SLO("s", target=0.9, latency=0.5)
    call(guard, 10.0)
    call(guard, 10.0, took=0.5)
    call(guard, 10.0, took=0.501)
    call(guard, 10.0, OSError())
    call(guard, 10.0, BulkheadFullError("k"))
    call(guard, 10.0, asyncio.CancelledError())
    call(guard, 10.0, GeneratorExit(), took=9)
    assert guard.counters() == {"good": 2, "bad": 3, "neither": 2}


def test_a_refused_call_is_bad_even_where_other_errors_are_not():
    guard = SLO("s", target=0.9, on=OSError, ignore=FileNotFoundError)
    for error in (CircuitOpenError("b"), PermissionError(), FileNotFoundError(), ValueError()):
        call(guard, 1.0, error)
    assert guard.counters() == {"good": 0, "bad": 2, "neither": 2}


def test_a_refusal_that_is_the_callers_own_fault_may_be_ignored():
    guard = SLO("s", target=0.9, ignore=RateLimitedError)
    for error in (RateLimitedError("r"), CircuitOpenError("b")):
        call(guard, 1.0, error)
    assert guard.counters() == {"good": 0, "bad": 1, "neither": 1}


def test_it_sees_refusals_and_waits_of_the_policies_further_in():
    guard, places = SLO("s", target=0.9, latency=1.0), Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=10)

    @guard
    @places
    async def work():
        await asyncio.sleep(0.8)

    async def main():
        await asyncio.gather(*(work() for _ in range(3)), return_exceptions=True)

    run(main())
    assert guard.counters() == {"good": 1, "bad": 2, "neither": 0}  # the second waited .8 s, the third was refused


def test_the_budget_is_used_up_exactly_at_the_target():
    for target, bad in ((0.9, 100), (0.99, 10), (0.999, 1), (0.5, 500)):
        guard = SLO("s", target=target)
        for number in range(1000):
            call(guard, 5.0, OSError() if number < bad else None)
        assert budget(guard, 5.0) == 0.0


def test_the_budget_may_be_overspent_and_is_whole_before_any_call():
    guard = SLO("s", target=0.9)
    assert budget(guard, 0.0) == 1.0
    call(guard, 1.0, OSError())
    assert budget(guard, 1.0) == pytest.approx(-9.0)


def test_exhaustion_is_told_once_and_again_after_a_recovery():
    heard = []
    guard = SLO("s", target=0.5, window=100.0, listeners=[heard.append])
    with use_clock(lambda: 0.0):
        for at in (0.0, 1.0, 2.0):
            call(guard, at, OSError())
    for _ in range(10):
        call(guard, 50.0)
    for _ in range(20):
        call(guard, 60.0, OSError())
    from seawall.core import events

    events.deliver()
    assert [(type(event), event.policy, event.at) for event in heard] == [
        (BudgetExhausted, "s", 0.0),
        (BudgetExhausted, "s", 60.0),
    ]
    assert heard[0].burn_rate == 2.0


@settings(deadline=None, max_examples=150)
@given(
    calls=st.lists(
        st.tuples(st.floats(0, 5000), st.sampled_from([None, None, OSError(), KeyboardInterrupt()])), max_size=60
    ),
    window=st.sampled_from([1800.0, 7200.0, 30 * 86400.0]),
    target=st.sampled_from([0.5, 0.9, 0.99]),
    look=st.floats(0, 1),
)
def test_budget_and_burn_rates_agree_with_a_replay_of_all_calls(calls, window, target, look):
    guard = SLO("s", target=target, window=window)
    history, now = [], 1000.0
    for gap, error in calls:
        now += gap
        call(guard, now, error)
        if not isinstance(error, KeyboardInterrupt):
            history.append((now, error is not None))

    def share(since):
        outcomes = [bad for at, bad in history if at >= since]
        return sum(outcomes) / len(outcomes) if outcomes else 0.0

    def possible(seconds, slot):
        """Each answer that is right to within a slot: the look back begins at one of these moments."""
        starts = {now - seconds - slot, now - seconds + slot}
        starts |= {at for at, _ in history if now - seconds - slot - 1e-6 <= at <= now - seconds + slot + 1e-6}
        return {round(share(start) / (1 - target), 6) for one in starts for start in (one, math.nextafter(one, 1e99))}

    with use_clock(lambda: now):
        seen = round(guard.burn_rate(window), 6)
        assert seen in possible(
            window, window / 720 if window > 21600 else window / 72 if window > 3600 else window / 360
        )
        assert guard.error_budget == pytest.approx(1 - guard.burn_rate(window))
        seconds = max(10.0, look * min(3600.0, window))
        assert round(guard.burn_rate(seconds), 6) in possible(seconds, min(3600.0, window) / 360)


def test_a_burn_rate_looks_back_as_far_as_it_was_asked_to():
    guard = SLO("s", target=0.9)
    call(guard, 1000.0, OSError())
    for _ in range(3):
        call(guard, 3000.0)
    with use_clock(lambda: 3005.0):
        assert guard.burn_rate(60) == 0.0
        assert guard.burn_rate() == pytest.approx(2.5)
        with pytest.raises(ValueError, match=r"seconds must be at most the window \(2.592e\+06 s\)"):
            guard.burn_rate(31 * 86400)
        with pytest.raises(ValueError, match="seconds must be more than 0"):
            guard.burn_rate(0)


def test_counters_only_grow_though_the_window_forgets():
    guard = SLO("s", target=0.9, window=60)
    call(guard, 0.0, OSError())
    call(guard, 1e6)
    with use_clock(lambda: 1e6):
        seen = guard.snapshot()
    assert (seen.good, seen.bad, seen.error_budget, seen.burn_rate_1h, seen.target) == (1, 1, 1.0, 0.0, 0.9)


@pytest.mark.parametrize(
    ("kwargs", "error", "rule"),
    [
        ({"target": 1}, ValueError, r"target must be in \(0, 1\), got 1"),
        ({"target": 99.9}, ValueError, r"target must be in \(0, 1\), got 99.9; for 99.9 % write 0.999"),
        ({"target": 0}, ValueError, r"target must be in \(0, 1\), got 0"),
        ({"target": 0.9, "latency": 0}, ValueError, "latency must be more than 0 and finite, got 0 s"),
        ({"target": 0.9, "window": -1}, ValueError, "window must be more than 0 and finite, got -1 s"),
        ({"target": 0.9, "on": 5}, TypeError, "on must be an exception class or a tuple of them, got 5"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(kwargs, error, rule):
    with pytest.raises(error, match=rule):
        SLO("s", **kwargs)


def test_a_burn_rate_over_six_hours_begins_six_hours_ago():
    guard = SLO("s", target=0.9)
    call(guard, 0.0, OSError())
    call(guard, 5.9 * 3600)
    with use_clock(lambda: 5.9 * 3600):
        assert guard.burn_rate(6 * 3600) == pytest.approx(5.0)
    with use_clock(lambda: 6.2 * 3600):
        assert guard.burn_rate(6 * 3600) == 0.0


def test_another_window_begins_anew_and_another_target_judges_what_was_seen():
    guard = SLO("s", target=0.9, window=60.0)
    with use_clock(lambda: 10.0):
        for error in (None, None, None, OSError()):
            call(guard, 10.0, error)
        assert guard.burn_rate() == pytest.approx(2.5)
        guard.update(target=0.5, latency=0.25, on=ValueError, ignore=OSError)
        assert guard.burn_rate() == pytest.approx(0.5)
        call(guard, 10.0, took=0.3)
        call(guard, 10.0, OSError())
        assert guard.counters() == {"good": 3, "bad": 2, "neither": 1}
        guard.update(window=120.0)
        assert (guard.window, guard.burn_rate(120.0), guard.error_budget) == (120.0, 0.0, 1.0)
        call(guard, 10.0, ValueError())
        assert guard.burn_rate(120.0) == 2.0
        assert guard.counters() == {"good": 3, "bad": 3, "neither": 1}


def test_a_budget_that_a_new_target_makes_whole_may_be_exhausted_and_told_again():
    heard = []
    guard = SLO("s", target=0.9, listeners=[heard.append])
    with use_clock(lambda: 1.0):
        guard.admit().success()
        guard.admit().failure(OSError())
        assert len(heard) == 1
        guard.update(target=0.2)
        guard.admit().failure(OSError())
        assert len(heard) == 1
        guard.update(target=0.9)
        guard.admit().failure(OSError())
    assert len(heard) == 2


class Answer:
    def __init__(self, status):
        self.status = status


def by_status(answer, error):
    if error is not None:
        return None if isinstance(error, LookupError) else False
    return None if answer.status == 404 else answer.status < 500


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_classifier_says_what_a_result_and_an_error_count_as(kind):
    slo = SLO("answers", target=0.9, latency=1.0, classify=by_status)
    clock = VirtualClock()

    def answer(status, seconds=0.0):
        clock.advance(seconds)
        if isinstance(status, Exception):
            raise status
        return Answer(status)

    async def answer_async(*args):
        return answer(*args)

    def call(*args):
        if kind == "plain":
            return slo(answer)(*args)
        return asyncio.run(slo(answer_async)(*args))

    with use_clock(clock):
        for args in [(200,), (200, 2.0), (503,), (404,)]:
            call(*args)
        for error in (OSError(), LookupError()):
            with pytest.raises(type(error)):
                call(error)
    seen = slo.snapshot()
    assert (seen.good, seen.bad, seen.neither) == (1, 3, 2)


def test_a_refusal_by_choice_is_told_apart_behind_a_classifier_too():
    heard = []

    class Told:
        def observe(self, source, burn):
            heard.append((burn.good, burn.bad))

    clock = VirtualClock()
    slo = SLO("answers", target=0.9, classify=lambda result, error: error is None, actions=[Told()])
    with use_clock(clock):
        for _ in range(3):
            with pytest.raises(BrownedOutError), slo.scope():
                raise BrownedOutError("dimmer", 1.0)
            clock.advance(2.0)
        slo.snapshot()
    assert slo.snapshot().bad == 3
    assert heard[-1] == (0, 0)


def test_a_cancelled_call_is_neither_and_its_classifier_is_not_asked():
    asked = []
    slo = SLO("answers", target=0.9, classify=lambda *given: asked.append(given) or True)
    with pytest.raises(KeyboardInterrupt), slo.scope():
        raise KeyboardInterrupt
    assert (slo.snapshot().neither, asked) == (1, [])


@pytest.mark.parametrize("answer", [3, "good", ZeroDivisionError])
def test_a_classifier_that_fails_is_logged_and_the_call_counts_as_without_it(answer, caplog):
    def broken(result, error):
        if answer is ZeroDivisionError:
            raise answer
        return answer

    slo = SLO("answers", target=0.9, classify=broken)
    assert slo(lambda: 1)() == 1
    with pytest.raises(OSError), slo.scope():
        raise OSError
    assert (slo.snapshot().good, slo.snapshot().bad) == (1, 1)
    assert "the call goes on" in caplog.text


def test_a_classifier_may_change_and_go_but_not_come_while_in_use():
    slo = SLO("answers", target=0.9)
    with pytest.raises(ValueError, match="classify of SLO 'answers' can't be added"):
        slo.update(classify=by_status)
    slo = SLO("answers", target=0.9, classify=by_status)
    call = slo(lambda: Answer(503))
    slo.update(classify=lambda result, error: True)
    call()
    slo.update(classify=None)
    call()
    assert slo.snapshot().good == 2
