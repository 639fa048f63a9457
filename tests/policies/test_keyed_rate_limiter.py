from __future__ import annotations

import asyncio
import math
import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall import CallRejected, KeyedRateLimiter, Pipeline, RateLimitedError, RateLimiter, Wait, live, use_clock
from seawall.core.ambient import deadline
from seawall.testing import run


def first(key, *rest):
    return key


def limiter(**settings):
    return KeyedRateLimiter("tenants", **{"key": first, "rate": 10, "burst": 2, **settings})


def ask(enter, now):
    try:
        return enter(now)
    except (RateLimitedError, Wait) as answer:
        return answer


def test_each_key_has_a_rate_of_its_own_and_its_own_retry_after():
    tenants = limiter(burst=1)
    tenants["a"].enter(0.0)
    tenants["b"].enter(0.05)
    for key, after in (("a", 0.05), ("b", 0.1)):
        with pytest.raises(RateLimitedError) as refused:
            tenants[key].enter(0.05)
        assert refused.value.retry_after == pytest.approx(after)
        assert refused.value.key == key


def test_b25_one_exhausted_key_never_blocks_another():
    tenants = limiter(rate=1, burst=1, max_wait=60)
    starts = []

    @tenants
    async def call(key, number):
        starts.append((key, number, round(asyncio.get_running_loop().time(), 6)))

    async def main():
        busy = [asyncio.create_task(call("busy", number)) for number in range(4)]
        await asyncio.sleep(0.5)
        await call("idle", 0)
        assert tenants.snapshot().waiting == 3
        await asyncio.gather(*busy)

    run(main())
    assert starts == [("busy", 0, 0), ("idle", 0, 0.5), ("busy", 1, 1), ("busy", 2, 2), ("busy", 3, 3)]
    assert (tenants.snapshot().waiting, tenants._lines) == (0, {})


@given(
    calls=st.lists(st.tuples(st.floats(0, 0.5), st.sampled_from("abc"), st.integers(1, 3)), max_size=60),
    max_wait=st.sampled_from([0.0, 0.3]),
)
def test_to_each_key_it_is_a_rate_limiter_of_its_own(calls, max_wait):
    tenants = limiter(burst=3, max_wait=max_wait)
    alone = {key: RateLimiter(key, rate=10, burst=3, max_wait=max_wait) for key in "abc"}
    now, waits = 0.0, []
    for gap, key, cost in calls:
        now += gap
        asked = [[one.resume, other.resume] for one, other in waits]
        view = tenants[key]
        view.cost = cost
        asked.append([view.enter, alone[key].costing(cost).enter])
        waits = []
        for enters in asked:
            one, other = [ask(enter, now) for enter in enters]
            if isinstance(one, Wait):
                assert one.until == other.until
                waits.append((one, other))
            elif isinstance(one, RateLimitedError):
                assert one.retry_after == other.retry_after
            else:
                assert one is other is None
    with use_clock(lambda: now):
        assert [tenants[key].available for key in "abc"] == [alone[key].snapshot().available for key in "abc"]
        assert tenants.snapshot().waiting == sum(guard.snapshot().waiting for guard in alone.values()) == len(waits)


def test_the_key_and_the_cost_come_from_the_arguments():
    tenants = limiter(key=lambda user, prompt="": (user["team"], user["id"]), burst=10, cost=lambda user, prompt="": 3)

    @tenants
    def answer(user, prompt=""):
        return prompt

    with use_clock(lambda: 0.0):
        assert [answer({"team": 1, "id": 2}, prompt="x") for _ in range(3)] == ["x"] * 3
        assert tenants[1, 2].available == 1
        with pytest.raises(RateLimitedError) as refused:
            answer({"team": 1, "id": 2})
        assert refused.value.key == (1, 2)
        assert answer({"team": 2, "id": 2}) == ""
        tenants.update(cost=lambda user, prompt="": 11)
        with pytest.raises(ValueError, match=r"cost must be at most the burst of 'tenants', 10, .* got 11"):
            answer({"team": 3, "id": 3})
        tenants.update(cost=lambda user, prompt="": 0)
        with pytest.raises(ValueError, match="cost must be 1 or more, got 0"):
            answer({"team": 3, "id": 3})


def test_an_unhashable_key_gives_a_clear_error_and_a_key_function_that_raises_its_own():
    tenants = limiter(key=lambda key: key or {}[key])

    @tenants
    def call(key):
        return key

    for use in (call, tenants.__getitem__):
        with pytest.raises(TypeError, match=r"a key of 'tenants' must be hashable \(a string, .*\), got \['a'\]"):
            use(["a"])
    with pytest.raises(KeyError):
        call("")
    assert tenants.snapshot().admitted == 0


def test_b25_with_a_line_each_every_key_is_told_its_own_time():
    tenants = KeyedRateLimiter("t", key=first, rate=1, burst=1, max_wait=2.0)
    for key, waiting in (("slow", 1), ("slower", 2)):
        tenants[key].enter(0.0)
        for _ in range(waiting):
            with pytest.raises(Wait):
                tenants[key].enter(0.0)
    with pytest.raises(RateLimitedError) as refused:
        tenants["slower"].enter(0.5)
    assert (refused.value.key, refused.value.retry_after) == ("slower", 2.5)
    with pytest.raises(Wait) as waits:
        tenants["slow"].enter(0.5)
    assert waits.value.until == 2.0


def test_key_functions_run_without_the_lock():
    free = []

    def key(name):
        other = threading.Thread(target=lambda: free.append(tenants.snapshot()))
        other.start()
        other.join(10)
        return name

    tenants = limiter(key=key)
    tenants(lambda name: name)("a")
    assert len(free) == 1


def test_blocks_permits_decorators_and_pipelines_take_one_key_or_all():
    tenants = limiter(burst=6)

    async def main():
        async with tenants["a"].scope():
            pass
        with tenants["a"].scope():
            pass
        tenants["a"].admit().success()
        tenants["a"](lambda: None)()
        await Pipeline(tenants).call(double, "a")
        assert tenants["a"].available == 1

    async def double(key):
        return key * 2

    with use_clock(lambda: 0.0):
        asyncio.run(main())
    assert repr(tenants["a"]) == "<<KeyedRateLimiter 'tenants'> at 'a'>"


def test_streams_and_generators_take_their_key_once():
    tenants = limiter()

    @tenants
    async def stream(key):
        yield 1
        yield 2

    @tenants
    def generator(key):
        yield 1

    async def main():
        assert [item async for item in stream("a")] == [1, 2]
        assert list(generator("a")) == [1]
        assert tenants["a"].available == 0

    with use_clock(lambda: 0.0):
        asyncio.run(main())


def test_keys_that_are_back_at_their_full_burst_are_forgotten():
    tenants = limiter()  # a burst refills in 0.2 s
    for number in range(1000):
        tenants[f"key {number}"].enter(number / 100)
    assert tenants.snapshot().keys <= 2 * 20 + 1
    assert tenants.snapshot().forgotten == 0


@given(moments=st.lists(st.tuples(st.floats(0, 0.3), st.integers(0, 5)), max_size=80))
def test_forgetting_gives_no_key_a_turn_too_many(moments):
    tenants, now, taken = limiter(), 0.0, {}
    for gap, key in moments:
        now += gap
        if ask(tenants[key].enter, now) is None:
            taken.setdefault(key, []).append(now)
    for times in taken.values():
        for begin in range(len(times)):
            for end in range(begin, len(times)):
                assert end - begin + 1 <= 2 + 10 * (times[end] - times[begin]) + 1e-3


def test_memory_is_bounded_under_a_flood_of_keys_and_the_latest_are_remembered():
    tenants = limiter(max_keys=100, rate=0.001)
    for number in range(10_000):
        tenants[number].enter(number / 1e6)
    snapshot = tenants.snapshot()
    assert snapshot.keys <= 101
    assert snapshot.forgotten >= 9_800
    with use_clock(lambda: 0.01):
        assert tenants[9_999].available == 1
        assert tenants[0].available == 2


def test_a_key_costs_at_most_three_hundred_bytes():
    tenants = limiter(rate=1e-3)
    tenants["warm"].enter(0.0)
    tenants["guard"].enter(0.0)
    count = 10_000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            tenants[f"tenant {number}"].enter(0.0)  # the key itself counts too
        used = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    assert used <= 300


def test_a_key_for_which_somebody_waits_is_not_forgotten():
    tenants = limiter(rate=1, burst=1, max_wait=math.inf, max_keys=2)
    tenants["a"].enter(0.0)
    wait = ask(tenants["a"].enter, 0.0)
    for number in range(20):
        tenants[number].enter(0.1)
    assert isinstance(ask(wait.resume, 0.5), Wait)
    assert wait.resume(1.0) is None
    assert isinstance(ask(tenants["a"].enter, 1.0), Wait)
    assert tenants.snapshot().waiting == 1


def test_lines_of_which_nobody_is_left_are_closed():
    tenants = limiter(rate=1, burst=1, max_wait=60)
    tenants["z"].enter(0.0)
    ask(tenants["z"].enter, 0.0).abandon(0.0)
    assert tenants._lines == {}
    tenants["a"].enter(0.0)
    waits = [ask(tenants["a"].enter, 0.0) for _ in range(3)]
    waits[0].abandon(0.0)
    for wait in waits[1:]:
        wait.sleeper = type("Gone", (), {"ring": staticmethod(lambda: False)})
    tenants["b"].enter(10.0)
    tenants["b"].enter(20.0)
    assert tenants._lines == {}


def test_those_who_wait_for_a_key_are_refused_or_moved_as_with_one_limiter():
    tenants = limiter(rate=1, burst=1, max_wait=2)
    log = []

    @tenants
    async def call(key, number):
        log.append((number, round(asyncio.get_running_loop().time(), 6)))

    async def main():
        calls = [asyncio.create_task(call("a", number)) for number in range(4)]
        await asyncio.sleep(0.5)
        calls[1].cancel()
        tenants.update(rate=2, burst=1)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [
            type(None),
            asyncio.CancelledError,
            type(None),
            RateLimitedError,
        ]
        with pytest.raises(RateLimitedError):
            tenants.guard_for(("a",), {}).admit()

    run(main())
    assert log == [(0, 0), (2, 0.75)]


def test_s1_a_wait_for_a_key_that_would_outlast_the_ambient_deadline_is_refused_at_once():
    tenants = limiter(rate=1, burst=1, max_wait=60)
    tenants["a"].enter(0.0)
    token = deadline.set(0.9)
    try:
        assert isinstance(ask(tenants["a"].enter, 0.0), RateLimitedError)
        deadline.reset(token)
        token = deadline.set(1.0)
        assert ask(tenants["a"].enter, 0.0).until == 1.0
    finally:
        deadline.reset(token)
    assert tenants.snapshot().waiting == 1


def test_a_change_of_settings_keeps_what_each_key_has_left():
    tenants = limiter(rate=1, burst=10)
    for _ in range(7):
        tenants["a"].enter(0.0)
    with use_clock(lambda: 0.0):
        tenants.update(rate=100, burst=20, max_keys=50)
        assert (tenants["a"].available, tenants["b"].available) == (3, 20)
        tenants.update(burst=2)
        assert tenants["a"].available == 2
    assert (tenants.rate, tenants.burst, tenants.max_keys) == (100, 2, 50)


def test_it_reports_totals_and_is_one_entry_in_the_registry_however_many_keys():
    heard = []
    before = set(live())
    tenants = limiter(listeners=[heard.append])
    with use_clock(lambda: 0.0):
        call = tenants(lambda key: key)
        for key in "aab":
            call(key)
        with pytest.raises(RateLimitedError) as refused:
            call("a")
        assert tenants.counters() == {"admitted": 3, "rejected": 1}
        assert tenants.gauges() == {"keys": 2, "waiting": 0}
    assert heard == [CallRejected("tenants", 0.0, refused.value)]
    assert set(live()) - before == {tenants}


def test_threads_and_loops_share_the_rate_of_a_key():
    tenants = limiter(rate=1000, burst=5, max_wait=60)
    call = tenants(lambda key: None)

    async def call_async(key):
        pass

    guarded = tenants(call_async)

    def thread(key):
        for _ in range(10):
            call(key)

    def loop(key):
        async def main():
            await asyncio.gather(*(guarded(key) for _ in range(10)))

        asyncio.run(main())

    targets = [(target, key) for target in (thread, thread, loop) for key in "abc"]
    threads = [threading.Thread(target=target, args=(key,)) for target, key in targets]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert tenants.snapshot().admitted == 90
    assert (tenants.snapshot().waiting, tenants._lines) == (0, {})


async def an_async_key(key):
    return key


@pytest.mark.parametrize(
    ("kwargs", "error", "rule"),
    [
        ({"key": "tenant"}, TypeError, "key must be a plain function of a call's arguments, got 'tenant'"),
        ({"key": an_async_key}, TypeError, "key must be a plain function"),
        ({"cost": an_async_key}, TypeError, "cost must be a plain function"),
        ({"cost": 3}, ValueError, "cost must be at most the burst of 'tenants', 2"),
        ({"cost": 0}, ValueError, "cost must be 1 or more, got 0"),
        ({"max_keys": 1}, ValueError, "max_keys must be 2 or more, got 1"),
        ({"rate": 1e308}, ValueError, "rate and per must make between"),
        ({"burst": 0.5}, ValueError, "burst must be 1 or more"),
        ({"max_wait": -1}, ValueError, "max_wait must be 0 or more, got -1 s"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(kwargs, error, rule):
    with pytest.raises(error, match=rule):
        limiter(**kwargs)


@pytest.mark.parametrize(("cost", "left"), [(3, 7), (lambda key: 3, 9)])
def test_a_block_costs_the_price_of_a_call_and_one_where_that_depends_on_arguments_it_has_not(cost, left):
    tenants = limiter(burst=10, cost=cost)
    with use_clock(lambda: 0.0):
        with tenants["a"].scope():
            pass
        assert tenants["a"].available == left
