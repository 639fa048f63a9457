from __future__ import annotations

import asyncio
import gc
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall import LimiterDrained, RateLimitedError, RateLimiter, Reservation, Wait, use_clock
from seawall.testing import run

ALGORITHMS = ["gcra", "fixed_window", "sliding_window"]


def queued(guard, now):
    with pytest.raises(Wait) as waiting:
        guard.enter(now)
    return waiting.value


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_call_that_costs_n_takes_n_turns(algorithm):
    guard = RateLimiter("r", rate=10, algorithm=algorithm)
    guard.costing(7).enter(0.0)
    for _ in range(3):
        guard.enter(0.0)
    with pytest.raises(RateLimitedError):
        guard.enter(0.0)
    with pytest.raises(RateLimitedError) as refused:
        guard.costing(5).enter(0.0)
    assert refused.value.retry_after == pytest.approx(0.5 if algorithm == "gcra" else 1.0)


def test_the_cost_may_come_from_the_arguments():
    guard = RateLimiter("tokens", rate=10)

    @guard.costing(lambda prompt, most=0: len(prompt) + most)
    def answer(prompt, most=0):
        return prompt

    with use_clock(lambda: 0.0):
        assert answer("four", most=4) == "four"
        assert guard.snapshot().available == 2
        with pytest.raises(RateLimitedError) as refused:
            answer("four")
        assert refused.value.retry_after == pytest.approx(0.2)
        with pytest.raises(ValueError, match=r"cost must be at most the burst of 'tokens', 10, .* never start; got 11"):
            answer("eleven", most=5)
        with pytest.raises(TypeError, match=r"cost must be a whole number, got 0.5"):
            answer("", most=0.5)


@pytest.mark.parametrize(("algorithm", "setting"), [("gcra", "burst"), ("sliding_window", "rate")])
def test_a_cost_that_no_call_could_ever_pay_is_refused_where_it_is_given(algorithm, setting):
    guard = RateLimiter("r", rate=10, algorithm=algorithm)
    for give in (guard.costing, guard.reserve):
        with pytest.raises(ValueError, match=f"cost must be at most the {setting} of 'r', 10, .* got 11"):
            give(11)
        with pytest.raises(ValueError, match="cost must be 1 or more, got 0"):
            give(0)
    assert guard.snapshot().admitted == 0


def test_b22_one_that_costs_ten_among_many_that_cost_one_starts_within_its_own_time():
    guard = RateLimiter("r", rate=10, burst=10, max_wait=math.inf)
    starts = []

    async def call(number, cost):
        async with guard.costing(cost).scope():
            starts.append((number, round(asyncio.get_running_loop().time(), 3)))

    async def main():
        for number in range(10):
            await call(number, 1)
        calls = [asyncio.create_task(call("dear", 10))]
        for number in range(10, 40):
            calls.append(asyncio.create_task(call(number, 1)))
            await asyncio.sleep(0.05)
        await asyncio.gather(*calls)

    run(main())
    assert starts[10] == ("dear", 1.0)
    assert [number for number, _ in starts[11:]] == list(range(10, 40))
    assert starts[11:] == [(10 + number, pytest.approx(1.1 + number / 10)) for number in range(30)]


@given(costs=st.lists(st.integers(1, 5), min_size=1, max_size=12), algorithm=st.sampled_from(ALGORITHMS))
def test_costs_in_the_line_start_in_order_when_they_were_told_to(costs, algorithm):
    guard = RateLimiter("r", rate=5, algorithm=algorithm, max_wait=math.inf)
    started, promised = [], []

    async def call(number, cost):
        async with guard.costing(cost).scope():
            started.append((number, asyncio.get_running_loop().time()))

    async def main():
        calls = []
        for number, cost in enumerate(costs):
            promised.append(guard._line.starts(asyncio.get_running_loop().time(), cost))
            calls.append(asyncio.create_task(call(number, cost)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*calls)

    run(main())
    assert started == [(number, pytest.approx(at, abs=1e-5)) for number, at in enumerate(promised)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_reservation_that_is_not_used_gives_its_turns_back(algorithm):
    guard = RateLimiter("r", rate=10, algorithm=algorithm)
    with use_clock(lambda: 0.0):
        reservation = guard.reserve(7)
        assert (reservation.cost, guard.snapshot().available) == (7, 3)
        with pytest.raises(RateLimitedError) as refused:
            guard.reserve(4)
        assert refused.value.retry_after > 0
        reservation.refund()
        assert guard.snapshot().available == 10
        with pytest.raises(RuntimeError, match="settled already"):
            reservation.refund()
        assert guard.snapshot().available == 10


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_reservation_is_settled_at_what_the_call_cost(algorithm):
    guard = RateLimiter("r", rate=10, algorithm=algorithm)
    with use_clock(lambda: 0.0):
        guard.reserve(7).settle(2)
        assert guard.snapshot().available == 8
        guard.reserve(2).settle(2)
        assert guard.snapshot().available == 6
        guard.reserve(1).settle(14)  # more than is left: others wait the longer
        assert guard.snapshot().available == 0
        with pytest.raises(RateLimitedError) as refused:
            guard.enter(0.0)
        assert refused.value.retry_after == pytest.approx(0.9 if algorithm == "gcra" else 1.0)
        for actual, error in ((-1, ValueError), (1.5, TypeError), (10**400, ValueError)):
            with pytest.raises(error, match="actual must be"):
                guard_of(algorithm).reserve().settle(actual)


def guard_of(algorithm):
    return RateLimiter("other", rate=10, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_reservation_dropped_without_a_word_has_been_used(algorithm):
    guard = RateLimiter("r", rate=10, algorithm=algorithm)
    with use_clock(lambda: 0.0):
        guard.reserve(4)
        gc.collect()
        assert guard.snapshot().available == 6
        for _ in range(6):
            guard.enter(0.0)
        with pytest.raises(RateLimitedError):
            guard.enter(0.0)


def test_a_turn_held_while_the_bucket_overflowed_is_worth_nothing_any_more():
    guard, now = RateLimiter("r", rate=1, burst=1), 0.0
    with use_clock(lambda: now):
        reservation = guard.reserve()
        now = 1.0
        guard.enter(now)  # with or without the reservation, that was the one turn there was
        reservation.refund()
        with pytest.raises(RateLimitedError) as refused:
            guard.enter(now)
        assert refused.value.retry_after == pytest.approx(1.0)


@pytest.mark.parametrize("algorithm", ["fixed_window", "sliding_window"])
def test_a_turn_of_a_window_that_is_over_is_worth_nothing_any_more(algorithm):
    guard, now = RateLimiter("r", rate=1, algorithm=algorithm), 0.0
    with use_clock(lambda: now):
        reservation = guard.reserve()
        now = 1.0
        guard.enter(now)
        reservation.refund()
        with pytest.raises(RateLimitedError):
            guard.enter(now)


@given(
    steps=st.lists(
        st.tuples(st.floats(0, 2), st.sampled_from(["call", "reserve", "refund", "settle"]), st.integers(1, 3)),
        max_size=40,
    )
)
def test_refunds_let_nobody_start_who_could_not_have_without_the_reservation(steps):
    now = 0.0
    guard = RateLimiter("r", rate=1, burst=3)
    kept, open_ones = [], []
    with use_clock(lambda: now):
        for gap, what, cost in steps:
            now += gap
            try:
                if what == "call":
                    guard.costing(cost).enter(now)
                    kept.append([now, cost])
                elif what == "reserve":
                    record = [now, cost]
                    open_ones.append((guard.reserve(cost), record))
                    kept.append(record)
            except RateLimitedError:
                continue
            if what in {"refund", "settle"} and open_ones:
                reservation, record = open_ones.pop(0)
                actual = 0 if what == "refund" else min(cost, record[1])
                reservation.settle(actual)
                record[1] = actual
    for first in range(len(kept)):
        for last in range(first, len(kept)):
            used = sum(cost for _, cost in kept[first : last + 1])
            if used and kept[first][1]:
                assert used <= 3 + kept[last][0] - kept[first][0] + 1e-5


def test_a_refund_comes_back_once_though_a_shorter_period_began_a_group_at_the_same_moment():
    guard, now = RateLimiter("r", rate=10, per=320.0, algorithm="sliding_window"), 0.0
    with use_clock(lambda: now):
        guard.enter(0.0)
        now = 9.0
        reservation = guard.reserve(4)
        guard.update(per=32.0)
        guard.enter(9.0)
        reservation.refund()
        assert guard.snapshot().available == 8


def test_a_refund_moves_those_who_wait_up():
    guard = RateLimiter("r", rate=1, burst=5, max_wait=60)
    starts = []

    @guard
    async def call(number):
        starts.append((number, round(asyncio.get_running_loop().time(), 6)))

    async def main():
        reservation = await guard.reserve_async(5)
        calls = [asyncio.create_task(call(number)) for number in range(4)]
        await asyncio.sleep(0.5)
        reservation.settle(3)
        await asyncio.gather(*calls)

    run(main())
    assert starts == [(0, 0.5), (1, 0.5), (2, 1.0), (3, 2.0)]


def test_what_a_call_cost_more_than_reserved_is_charged_to_those_who_wait():
    guard = RateLimiter("r", rate=1, burst=2, max_wait=3)
    starts, refused = [], []

    @guard
    async def call(number):
        starts.append((number, round(asyncio.get_running_loop().time(), 6)))

    async def main():
        reservation = await guard.reserve_async(2)
        calls = [asyncio.create_task(call(number)) for number in range(3)]
        await asyncio.sleep(0.5)
        reservation.settle(3)
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if outcome:
                refused.append(type(outcome))

    run(main())
    assert starts == [(0, 2.0), (1, 3.0)]
    assert refused == [RateLimitedError], "its turn would now come after 4 s"
    assert guard.snapshot().waiting == 0


def test_reservations_wait_in_the_line_like_calls_on_a_loop_and_in_a_thread():
    guard = RateLimiter("r", rate=1, burst=1, max_wait=60)

    async def main():
        await guard.reserve_async()
        second, third = asyncio.create_task(guard.reserve_async()), asyncio.create_task(guard.reserve_async())
        await asyncio.sleep(0)
        second.cancel()
        reservation = await third
        assert asyncio.get_running_loop().time() == pytest.approx(1.0)
        assert isinstance(reservation, Reservation)
        with pytest.raises(RateLimitedError):
            guard.reserve()  # it would block the loop
        assert guard.snapshot().waiting == 0

    run(main())
    fast, done = RateLimiter("r", rate=1000, burst=1, max_wait=60), []
    fast.reserve()
    thread = threading.Thread(target=lambda: done.append(fast.reserve()))
    thread.start()
    thread.join(30)
    assert len(done) == 1


def test_a_reservation_that_its_caller_never_got_gives_its_turns_back():
    guard = RateLimiter("r", rate=10)

    def interrupt(event):
        raise KeyboardInterrupt

    with use_clock(lambda: 0.0):
        guard.listen(interrupt)
        guard._emit(LimiterDrained, 0.0, 1.0)  # an event of another call, delivered on the way
        with pytest.raises(KeyboardInterrupt):
            guard.reserve(3)
        assert guard.snapshot().available == 10


def test_while_a_reservation_is_open_calls_pass_in_order_and_it_leaves_nothing_behind():
    guard = RateLimiter("r", rate=10, burst=10)
    with use_clock(lambda: 0.0):
        reservations = [guard.reserve(2), guard.reserve(3)]
        guard.enter(0.0)
        for reservation in reservations:
            reservation.refund()
        assert guard.snapshot().available == 9
        assert (guard._meter.bars, guard._meter.held) == (0, 0)


def test_a_cost_given_before_the_burst_went_down_is_refused_with_the_reason():
    guard = RateLimiter("r", rate=10, max_wait=60)
    dear = guard.costing(10)
    dear.enter(0.0)
    with pytest.raises(Wait) as waiting:
        dear.enter(0.0)
    with use_clock(lambda: 0.5):
        guard.update(burst=5)
    with pytest.raises(RateLimitedError) as refused:
        waiting.value.resume(0.5)
    assert refused.value.retry_after is None
    with pytest.raises(ValueError, match=r"cost must be at most the burst of 'r', 5, .* got 10"):
        dear.enter(0.5)
    assert guard.snapshot().waiting == 0


def test_nothing_is_available_while_a_dear_call_waits_though_a_cheap_one_would_fit():
    guard = RateLimiter("r", rate=1, burst=5, max_wait=60.0)
    with use_clock(lambda: 0.0):
        for _ in range(3):
            guard.enter(0.0)
        assert guard.snapshot().available == 2
        with pytest.raises(Wait):
            guard.enter_at(0.0, 5)
        seen = guard.snapshot()
        assert (seen.available, seen.waiting) == (0, 1)


@pytest.mark.parametrize("rate", [0.5, 4])
def test_what_a_reservation_did_not_need_comes_back_at_once_at_any_rate(rate):
    guard = RateLimiter("r", rate=rate, burst=10)
    with use_clock(lambda: 100.0):
        guard.reserve(8).settle(3)
        assert guard.snapshot().available == 7
    with use_clock(lambda: 100.0 + 2 / rate):
        assert guard.snapshot().available == 9


@pytest.mark.parametrize("cost", [2, lambda status: 2])
def test_a_dear_calls_result_drains_it_as_any_other_calls_does(cost):
    guard = RateLimiter("r", rate=1, burst=10, drain_on=lambda status: status == 429)
    call = guard.costing(cost)(lambda status: status)
    with use_clock(lambda: 0.0):
        call(200)
        assert guard.snapshot().available == 8
        call(429)
        assert guard.snapshot().available < 2
