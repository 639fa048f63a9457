"""Draining on what the callee says, and settings that change under way."""

from __future__ import annotations

import asyncio
import contextlib
import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall import CallRejected, LimiterDrained, RateLimitedError, RateLimiter, Wait, rate_limiter, use_clock
from seawall.testing import run

ALGORITHMS = ["gcra", "fixed_window", "sliding_window"]


class TooManyRequestsError(Exception):
    def __init__(self, retry_after=None):
        super().__init__(retry_after)
        self.retry_after = retry_after


def too_many(outcome):
    if isinstance(outcome, TooManyRequestsError):
        return outcome.retry_after or True
    return outcome == 429


def retry_after(guard, now):
    with pytest.raises(RateLimitedError) as refused:
        guard.enter(now)
    return refused.value.retry_after


def fail_with(error):
    raise error


@pytest.mark.parametrize(("algorithm", "after"), [("gcra", 0.1), ("fixed_window", 1.0), ("sliding_window", 1.0)])
def test_a_429_empties_the_limiter_whether_it_is_an_exception_or_a_result(algorithm, after):
    for answer in (lambda: 429, lambda: fail_with(TooManyRequestsError())):
        guard = RateLimiter("r", rate=10, algorithm=algorithm, drain_on=too_many)
        with use_clock(lambda: 5.0):
            with contextlib.suppress(TooManyRequestsError):
                assert guard(answer)() == 429
            assert guard.snapshot().available == 0
        assert retry_after(guard, 5.0) == pytest.approx(after)
        guard.enter(5.0 + after)


def test_retry_after_lets_one_call_start_then_and_the_next_an_interval_later():
    guard, now = RateLimiter("r", rate=10, drain_on=too_many), 0.0
    call = guard(lambda: fail_with(TooManyRequestsError(3.0)))
    with use_clock(lambda: now):
        with pytest.raises(TooManyRequestsError):
            call()
        assert retry_after(guard, 0.0) == pytest.approx(3.0)
        guard.enter(3.0)
        assert retry_after(guard, 3.0) == pytest.approx(0.1)


def test_a_window_takes_the_time_the_callee_named_instead_of_its_own_count():
    for algorithm in ("fixed_window", "sliding_window"):
        guard = RateLimiter("r", rate=10, per=60, algorithm=algorithm)
        with use_clock(lambda: 0.0):
            guard.drain(3.0)
        assert retry_after(guard, 0.0) == pytest.approx(3.0)
        for _ in range(10):
            guard.enter(3.0)


def test_outcomes_that_say_nothing_change_nothing():
    guard = RateLimiter("r", rate=10, drain_on=too_many)
    with use_clock(lambda: 0.0):
        assert guard(lambda: 200)() == 200
        with pytest.raises(KeyError):
            guard(lambda: fail_with(KeyError()))()
        for end in (KeyboardInterrupt, asyncio.CancelledError, GeneratorExit):
            with pytest.raises(end):
                guard(lambda end=end: fail_with(end()))()
        assert guard.snapshot().available == 5


@pytest.mark.parametrize(
    ("said", "after"),
    [
        (True, 0.1),
        (2, 2.0),
        (timedelta(seconds=2), 2.0),
        ("yes", 0.1),
        (math.nan, 0.1),
        (1e308, 60.0),
        (math.inf, 60.0),
        pytest.param(10**400, 60.0, id="huge"),
        (-5.0, None),
        (0.0, None),
    ],
)
def test_what_drain_on_says_is_taken_as_far_as_it_makes_sense(said, after):
    guard = RateLimiter("r", rate=10, drain_on=lambda outcome: said)
    with use_clock(lambda: 0.0):
        guard(lambda: None)()
        if after is None:  # one may start at once, and the next as usual
            guard.enter(0.0)
            after = 0.1
        assert retry_after(guard, 0.0) == pytest.approx(after)


def test_a_drain_on_that_raises_is_logged_and_hurts_no_call(caplog):
    guard = RateLimiter("r", rate=10, drain_on=lambda outcome: 1 / 0)
    with use_clock(lambda: 0.0):
        assert guard(lambda: "fine")() == "fine"
        assert guard.snapshot().available == 9
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.asyncio
async def test_drain_on_works_on_coroutines_streams_blocks_permits_and_at_a_cost():
    def limiter():
        return RateLimiter("r", rate=10, drain_on=too_many)

    async def answer():
        return 429

    async def stream():
        yield 1
        raise TooManyRequestsError

    guards = [limiter() for _ in range(5)]
    with use_clock(lambda: 0.0):
        assert await guards[0](answer)() == 429
        with pytest.raises(TooManyRequestsError):
            _ = [item async for item in guards[1](stream)()]
        with pytest.raises(TooManyRequestsError):
            async with guards[2]:
                raise TooManyRequestsError
        guards[3].admit().success(429)
        assert await guards[4].costing(3)(answer)() == 429
        assert [guard.snapshot().available for guard in guards] == [0] * 5


def test_who_waits_beyond_what_the_callee_asks_for_is_refused_at_once_and_the_others_wait_for_it():
    heard = []
    guard = RateLimiter("r", rate=1, burst=1, max_wait=5, listeners=[heard.append])
    log = []

    async def call(name):
        try:
            async with guard:
                log.append((name, asyncio.get_running_loop().time()))
        except RateLimitedError as error:
            log.append((name, "refused", asyncio.get_running_loop().time(), round(error.retry_after, 6)))

    async def main():
        calls = [asyncio.create_task(call(name)) for name in "abcd"]
        await asyncio.sleep(0.25)
        guard.drain(3.5)
        await asyncio.gather(*calls)

    run(main())
    # d would start at 5.75; a newcomer then would wait for b and c.
    assert log == [("a", 0.0), ("d", "refused", 0.25, 5.5), ("b", 3.75), ("c", 4.75)]
    assert heard[0] == LimiterDrained("r", 0.25, 3.5)
    assert [type(event) for event in heard[1:]] == [CallRejected]


def test_a_drain_never_lets_anything_start_sooner():
    for algorithm in ALGORITHMS:
        guard = RateLimiter("r", rate=10, algorithm=algorithm)
        with use_clock(lambda: 0.0):
            guard.drain(30.0)
            guard.drain()
            guard.drain(1.0)
        assert retry_after(guard, 0.0) == pytest.approx(30.0)
        with use_clock(lambda: 0.0):
            assert guard.snapshot().available == 0
            with pytest.raises(ValueError, match="seconds must be 0 or more and finite, got -1 s"):
                guard.drain(-1)


def test_what_is_drained_by_hand_is_not_cut_to_what_a_header_may_ask_for():
    guard = RateLimiter("r", rate=10, max_block=60.0)
    with use_clock(lambda: 0.0):
        guard.drain(3600.0)
    assert retry_after(guard, 0.0) == pytest.approx(3600.0)


def test_a_refund_does_not_undo_a_drain():
    guard = RateLimiter("r", rate=10)
    with use_clock(lambda: 0.0):
        reservation = guard.reserve(5)
        guard.drain(3.0)
        reservation.refund()
    assert retry_after(guard, 0.0) == pytest.approx(3.0)


def test_only_a_limiter_with_a_drain_on_judges_its_calls():
    assert not RateLimiter("r", rate=10).judges
    assert RateLimiter("r", rate=10, drain_on=too_many).judges


# Settings that change


def test_more_burst_is_no_gift_and_fills_at_the_rate():
    guard = RateLimiter("r", rate=1, burst=2)
    guard.enter(0.0)
    with use_clock(lambda: 0.0):
        guard.update(burst=100)
        assert guard.snapshot().available == 1
    with use_clock(lambda: 10.0):
        assert guard.snapshot().available == 11
    with use_clock(lambda: 1000.0):
        assert guard.snapshot().available == 100


def test_less_burst_is_no_debt():
    guard = RateLimiter("r", rate=10, burst=100)
    for _ in range(95):
        guard.enter(0.0)
    with use_clock(lambda: 0.0):
        guard.update(burst=10)
        assert guard.snapshot().available == 5
        guard.update(burst=3)
        assert guard.snapshot().available == 3


def test_a_new_rate_keeps_what_is_left_and_a_burst_that_was_never_told_follows_it():
    guard = RateLimiter("r", rate=10)
    for _ in range(6):
        guard.enter(0.0)
    with use_clock(lambda: 0.0):
        guard.update(rate=20)
        assert (guard.rate, guard.burst, guard.snapshot().available) == (20, None, 4)
    with use_clock(lambda: 10.0):
        assert guard.snapshot().available == 20


@given(
    used=st.integers(0, 20),
    ago=st.floats(0, 3),
    rates=st.lists(st.floats(0.5, 50), min_size=1, max_size=5),
    bursts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
)
def test_no_change_of_settings_gives_anything_away(used, ago, rates, bursts):
    guard = RateLimiter("r", rate=5, burst=20)
    for _ in range(used):
        guard.enter(0.0)
    now = ago
    with use_clock(lambda: now):
        left = guard._meter.left(now)
        for rate, burst in zip(rates, bursts, strict=False):
            guard.update(rate=rate, burst=burst)
            assert guard._meter.left(now) <= left + 1e-6
            assert guard._meter.left(now) == pytest.approx(min(left, burst), abs=1e-6)
            left = guard._meter.left(now)


def test_a_time_the_callee_named_stays_when_the_rate_changes():
    guard = RateLimiter("r", rate=10)
    with use_clock(lambda: 0.0):
        guard.drain(30.0)
        guard.update(rate=1000, burst=5)
    assert retry_after(guard, 0.0) == pytest.approx(30.0)
    guard.enter(30.0)
    assert retry_after(guard, 30.0) == pytest.approx(0.001)


def test_those_who_wait_learn_of_a_faster_rate_at_once():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=60)
    starts = []

    @guard
    async def call(number):
        starts.append((number, round(asyncio.get_running_loop().time(), 6)))

    async def main():
        calls = [asyncio.create_task(call(number)) for number in range(4)]
        await asyncio.sleep(0.5)
        guard.update(rate=10, burst=1)
        await asyncio.gather(*calls)

    run(main())
    assert starts == [(0, 0), (1, 0.55), (2, 0.65), (3, 0.75)]


def test_those_who_can_not_be_in_time_at_a_slower_rate_are_refused_at_once():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=5)
    log = []

    async def call(number):
        try:
            async with guard:
                log.append((number, round(asyncio.get_running_loop().time(), 6)))
        except RateLimitedError:
            log.append((number, "refused", round(asyncio.get_running_loop().time(), 6)))

    async def main():
        calls = [asyncio.create_task(call(number)) for number in range(4)]
        await asyncio.sleep(0.5)
        guard.update(rate=0.5)
        await asyncio.gather(*calls)

    run(main())
    # Half a turn was there; at 0.5 a second the next ones are whole at 1.5, 3.5 and 5.5.
    assert log == [(0, 0), (3, "refused", 0.5), (1, 1.5), (2, 3.5)]


def test_a_shorter_max_wait_holds_for_those_who_wait_too_and_a_longer_one_as_well():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=10)
    guard.enter(0.0)
    waits = []
    for _ in range(3):
        with pytest.raises(Wait) as waiting:
            guard.enter(0.0)
        waits.append(waiting.value)
    with use_clock(lambda: 0.0):
        guard.update(max_wait=2)
    with pytest.raises(RateLimitedError) as refused:
        waits[2].resume(0.0)
    assert refused.value.retry_after == pytest.approx(3.0)
    with use_clock(lambda: 0.0):
        guard.update(max_wait=math.inf, rate=0.1)
    assert guard.snapshot().waiting == 2
    with pytest.raises(Wait):
        waits[0].resume(1.0)
    assert waits[0].until == pytest.approx(10.0)


@pytest.mark.parametrize("algorithm", ["fixed_window", "sliding_window"])
def test_a_window_that_changes_keeps_its_count(algorithm):
    guard = RateLimiter("r", rate=4, per=10, algorithm=algorithm)
    for _ in range(3):
        guard.enter(0.0)
    with use_clock(lambda: 1.0):
        guard.update(rate=6)
        assert guard.snapshot().available == 3
        guard.update(rate=2)
        assert guard.snapshot().available == 0
        guard.update(per=20)
    assert retry_after(guard, 1.0) == pytest.approx(19.0)


def test_what_can_not_change_is_refused_and_nothing_changes():
    guard = RateLimiter("r", rate=10)
    with pytest.raises(ValueError, match="can't change its algorithm"):
        guard.update(algorithm="sliding_window", rate=5)
    with pytest.raises(ValueError, match="can't change whether it has a drain_on"):
        guard.update(drain_on=too_many, rate=5)
    with pytest.raises(ValueError, match="rate must be more than 0"):
        guard.update(rate=0)
    with pytest.raises(TypeError, match="has no setting speed"):
        guard.update(speed=5)
    assert guard.rate == 10
    judging = RateLimiter("r", rate=10, drain_on=too_many)
    with use_clock(lambda: 0.0):
        judging.update(drain_on=lambda outcome: False)
        judging(lambda: 429)()
        assert judging.snapshot().available == 9


def test_the_decorator_takes_every_setting():
    @rate_limiter("quota", rate=5, per=60, algorithm="sliding_window", max_wait=1, drain_on=too_many, max_block=10)
    def call():
        return 429

    (guard,) = call.__seawall__.policies
    assert (guard.name, guard.algorithm, guard.max_block) == ("quota", "sliding_window", 10)
