from __future__ import annotations

import math
import subprocess
import sys

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from tenacity.asyncio import retry as async_rules

from seawall import use_clock
from seawall.core.errors import Rejected
from seawall.policies.retry import Attempt, Reason, Retry
from seawall.testing import Script, VirtualClock


def rules(**settings):
    return Retry("r", **{"on": ConnectionError, "attempts": 10**6, **settings})


def failed(number=1, **fields):
    return Attempt(number, fields.pop("error", ConnectionError()), None, fields.pop("elapsed", 0.0), **fields)


def call(policy, *outcomes):
    """What a plain call gives, and the pauses it made."""
    clock, script = VirtualClock(), Script(*outcomes)
    with use_clock(clock):
        try:
            end = policy(script)()
        except Exception as exc:
            end = exc
    return end, clock.slept


durations = st.floats(1e-6, 1e6)


@given(durations, durations, st.floats(0, 1e6), st.floats(1e-9, 1e7) | st.just(math.inf))
def test_a_pause_is_drawn_from_the_shortest_to_thrice_the_last_one_within_the_longest_and_what_is_left(
    one, other, drawn, left
):
    shortest, longest = sorted((one, other))
    after = rules(wait_initial=shortest, wait_max=longest).follow(failed(), drawn, left)
    if isinstance(after, Reason):
        assert after is Reason.TIMEOUT
        assert left <= shortest
    else:
        pause, again = after
        assert pause == again
        assert shortest <= pause <= longest * (1 + 1e-9)
        assert pause <= max(3 * drawn, 3 * shortest) * (1 + 1e-9)
        assert pause < left


def test_a_pause_is_drawn_from_what_is_left_rather_than_given_up():
    policy = rules(wait_initial=0.1, wait_max=100.0)
    pauses = [policy.follow(failed(), 50.0, 1.0)[0] for _ in range(50)]
    assert max(pauses) < 1.0
    assert policy.follow(failed(), 50.0, 0.1) is Reason.TIMEOUT


def test_pauses_without_jitter_double_up_to_the_longest():
    _, slept = call(rules(jitter=False, attempts=8), *[ConnectionError] * 8)
    assert slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0])


def test_pauses_with_jitter_grow_from_the_shortest():
    first = [call(rules(), ConnectionError, "well")[1][0] for _ in range(50)]
    later = [call(rules(), *[ConnectionError] * 6, "well")[1][-1] for _ in range(50)]
    assert 0.1 <= min(first)
    assert max(first) <= 0.3
    assert sum(later) / 50 > 3 * sum(first) / 50


@given(st.floats(0, 100), st.floats(1e-6, 100) | st.just(math.inf))
def test_a_time_to_come_back_is_kept_or_the_call_ends(hint, left):
    after = rules(on=Rejected).follow(failed(error=Rejected("p", hint)), 0.0, left)
    limit = left if left < math.inf else 5.0
    if isinstance(after, Reason):
        assert after is Reason.RETRY_AFTER
        assert hint >= limit - 1e-9
    else:
        assert hint <= after[0] <= min(limit, hint + 0.1)


def test_the_pause_may_be_a_function_of_the_attempt():
    seen = []

    def wait(attempt):
        seen.append((attempt.number, type(attempt.error), attempt.elapsed, attempt.slept))
        return attempt.number * 10.0

    assert call(rules(wait=wait), ConnectionError, ConnectionResetError, "well") == ("well", [10.0, 20.0])
    assert seen == [(1, ConnectionError, 0.0, 0.0), (2, ConnectionResetError, 10.0, 10.0)]


@pytest.mark.parametrize("said", [None, -1.0, math.nan, "soon"])
def test_a_pause_that_makes_no_sense_is_drawn_instead(said):
    _, (slept,) = call(rules(wait=lambda attempt: said), ConnectionError, "well")
    assert 0.1 <= slept <= 0.3


def test_a_function_that_fails_to_say_a_pause_harms_no_call(caplog):
    _, (slept,) = call(rules(wait=lambda attempt: 1 / 0), ConnectionError, "well")
    assert 0.1 <= slept <= 0.3
    assert "division by zero" in caplog.text


def test_an_infinite_pause_is_never_taken():
    end, slept = call(rules(wait=lambda attempt: math.inf), ConnectionError, "well")
    assert (type(end), slept) == (ConnectionError, [])


def test_when_to_stop_may_be_a_function_of_the_attempt_and_the_pause_before_the_next():
    seen = []

    def stop(attempt):
        seen.append((attempt.number, attempt.pause))
        return attempt.number == 2

    end, slept = call(rules(attempts=1, stop=stop, wait=1.5), *[ConnectionError] * 3)
    assert (type(end), slept) == (ConnectionError, [1.5])
    assert seen == [(1, 1.5), (2, 1.5)]


def test_a_stop_rule_that_fails_stops(caplog):
    assert call(rules(stop=lambda attempt: 1 / 0), ConnectionError, "well")[1] == []
    assert "division by zero" in caplog.text


# tenacity


def test_importing_seawall_does_not_import_tenacity_and_neither_does_a_retry():
    code = """
import sys
from seawall import use_clock
from seawall.policies.retry import Retry
from seawall.testing import VirtualClock, Script
with use_clock(VirtualClock()):
    assert Retry("r", on=ConnectionError, wait=lambda attempt: 1.0)(Script(ConnectionError, "well"))() == "well"
assert "tenacity" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize(
    ("wait", "slept"),
    [
        (tenacity.wait_fixed(2), [2, 2, 2]),
        (tenacity.wait_none(), [0, 0, 0]),
        (tenacity.wait_incrementing(1, 2), [1, 3, 5]),
        (tenacity.wait_exponential(multiplier=1), [1, 2, 4]),
        (tenacity.wait_exponential(multiplier=1, max=2) + tenacity.wait_fixed(1), [2, 3, 3]),
        (tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_fixed(7)), [1, 7, 7]),
        (tenacity.wait_exception(lambda error: error.args[0]), [3, 3, 3]),
    ],
)
def test_the_pauses_may_be_one_of_tenacitys(wait, slept):
    assert call(rules(wait=wait), *[ConnectionError(3)] * 3, "well") == ("well", slept)


@pytest.mark.parametrize(
    ("stop", "pauses"),
    [
        (tenacity.stop_after_attempt(5), 4),
        (tenacity.stop_after_delay(2), 2),
        (tenacity.stop_before_delay(2), 1),
        (tenacity.stop_after_delay(3) | tenacity.stop_after_attempt(2), 1),
        (tenacity.stop_after_delay(3) & tenacity.stop_after_attempt(2), 3),
    ],
)
def test_when_to_stop_may_be_one_of_tenacitys_and_replaces_the_attempts(stop, pauses):
    end, slept = call(rules(attempts=1, stop=stop, wait=1.0), *[ConnectionError] * 9)
    assert (type(end), len(slept)) == (ConnectionError, pauses)


@pytest.mark.parametrize(
    ("on", "outcomes", "attempts"),
    [
        (tenacity.retry_if_exception_type(OSError), [ConnectionError, ValueError, 1], 2),
        (tenacity.retry_if_exception(lambda error: True), [KeyError, ValueError, 1], 3),
        (tenacity.retry_if_not_exception_type(ValueError), [KeyError, ValueError, 1], 2),
        (tenacity.retry_if_result(lambda result: result == 0), [0, 0, ValueError], 3),
        (tenacity.retry_if_exception_message(match="again"), [OSError("again"), OSError("no")], 2),
        (tenacity.retry_if_result(lambda result: result == 0) | tenacity.retry_if_exception_type(), [0, OSError, 1], 3),
        (tenacity.retry_never, [OSError, 1], 1),
        (tenacity.retry_always, [1, 2, 3, 4], 3),
    ],
)
def test_what_to_retry_may_be_one_of_tenacitys(on, outcomes, attempts):
    end, slept = call(rules(on=on, attempts=3, wait=0), *outcomes)
    assert len(slept) == attempts - 1
    last = outcomes[attempts - 1]
    assert end == last or isinstance(end, (last if isinstance(last, type) else type(last)))


def test_one_of_tenacitys_in_the_wrong_place_is_refused():
    for setting, rule in (
        ("wait", tenacity.stop_after_attempt(3)),
        ("stop", tenacity.wait_fixed(1)),
        ("on", tenacity.wait_fixed(1)),
    ):
        with pytest.raises(TypeError, match=f"{setting} must be one of tenacity's"):
            rules(**{setting: rule})


def test_one_of_tenacitys_that_needs_awaiting_is_refused():
    async def check(error):
        return True

    with pytest.raises(TypeError, match="plain function"):
        rules(on=async_rules.retry_if_exception(check))


def test_settings_of_all_kinds_can_be_read_back_and_given_again():
    wait, stop, on = tenacity.wait_fixed(2), tenacity.stop_after_attempt(5), tenacity.retry_if_exception_type(OSError)
    policy = rules(on=on, wait=wait, stop=stop)
    policy.update(timeout=5.0)
    assert (policy.on, policy.wait, policy.stop, policy.timeout) == (on, wait, stop, 5.0)
    policy.update(on=KeyError, wait=1.0, stop=None, attempts=2)
    assert call(policy, KeyError("k"), KeyError("k"))[1] == [1.0]
