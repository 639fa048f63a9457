from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref

import pytest

from seawall import (
    SLO,
    Bulkhead,
    BulkheadFullError,
    CircuitBreaker,
    CircuitOpenError,
    Keyed,
    KeyedAround,
    LoadShedder,
    Pipeline,
    RateLimitedError,
    RateLimiter,
    Timeout,
    keyed,
    live,
    policies_of,
    use_clock,
)
from seawall.core.policy import AroundPolicy
from seawall.testing import run


def first(key, *rest):
    return key


def bulkheads(**settings):
    return Keyed("tenants", lambda key: Bulkhead(f"tenant {key}", max_concurrent=1), **{"key": first, **settings})


def breakers(**settings):
    def make(key):
        return CircuitBreaker(str(key), consecutive_failures=1, reset_timeout=1000)

    return Keyed("hosts", make, **{"key": first, **settings})


class Twice(AroundPolicy):
    """Runs the call twice."""

    kind = "twice"

    def __init__(self, name):
        super().__init__(name)
        self.calls = 0
        self._register()

    async def around(self, call):
        self.calls += 1
        await call()
        return await call()

    def around_sync(self, call):
        self.calls += 1
        call()
        return call()

    def counters(self):
        return {"calls": self.calls}

    def gauges(self):
        return {}


def fail(call, *args):
    with pytest.raises(ZeroDivisionError):
        call(*args)


def test_each_key_has_a_policy_of_its_own():
    hosts = breakers()

    @hosts
    def fetch(host, path):
        return 1 / 0 if path == "bad" else path

    fail(fetch, "a", "bad")
    with pytest.raises(CircuitOpenError) as refused:
        fetch("a", "good")
    assert refused.value.policy == "a"
    assert fetch("b", "good") == "good"
    assert hosts["a"].policy.state.value == "open"
    assert (list(hosts), len(hosts), "a" in hosts, "c" in hosts) == (["b", "a"], 2, True, False)


def test_it_guards_every_kind_of_function_blocks_and_pipelines():
    tenants = bulkheads()

    @tenants
    async def call(key):
        assert tenants[key].policy.snapshot().active == 1
        return key

    @tenants
    async def stream(key):
        yield tenants[key].policy.snapshot().active

    @tenants
    def generator(key):
        yield tenants[key].policy.snapshot().active

    async def main():
        assert await call("a") == "a"
        assert [item async for item in stream("a")] == [1]
        assert list(generator("a")) == [1]
        async with tenants["a"].scope():
            with pytest.raises(BulkheadFullError):
                await call("a")
            assert await call("b") == "b"
        with tenants["a"].scope(), pytest.raises(BulkheadFullError):
            tenants["a"].admit()
        tenants["a"].admit().success()
        assert await Pipeline(tenants, RateLimiter("r", rate=1e6)).call(call, "c") == "c"

    with pytest.raises(BulkheadFullError):  # the pipeline's and the function's own are the same bulkhead
        asyncio.run(main())
    assert tenants["a"].policy.snapshot().finished == 6


def test_waiting_calls_wait_for_their_own_key():
    tenants = Keyed("t", lambda key: Bulkhead(key, max_concurrent=1, max_queued=9, max_wait=60), key=first)
    log = []

    @tenants
    async def call(key, number):
        log.append((key, number, asyncio.get_running_loop().time()))
        await asyncio.sleep(1)

    async def main():
        await asyncio.gather(*(call(key, number) for number in range(2) for key in "ab"))

    run(main())
    assert log == [("a", 0, 0), ("b", 0, 0), ("a", 1, 1), ("b", 1, 1)]


def test_there_are_never_more_than_max_keys_and_the_least_recently_used_go():
    tenants = bulkheads(max_keys=3)
    call = tenants(lambda key: key)
    for key in (1, 2, 3, 1, 4):
        call(key)
    assert list(tenants) == [3, 1, 4]
    for key in range(1000):
        call(key)
    snapshot = tenants.snapshot()
    assert (snapshot.keys, snapshot.created, snapshot.evicted) == (3, 1003, 1000)


def test_a_policy_with_calls_in_flight_or_waiting_is_never_evicted():
    tenants = Keyed("t", lambda key: Bulkhead(str(key), max_concurrent=1, max_queued=1, max_wait=60), key=first)
    tenants.update(max_keys=2)
    hold = asyncio.Event()

    @tenants
    async def call(key):
        await hold.wait()

    async def main():
        calls = [asyncio.create_task(call(key)) for key in ("a", "a", "b", "c", "d")]
        await asyncio.sleep(0)
        assert set(tenants) == set("abcd"), "in flight they may be more"
        for number in range(50):
            tenants[number]
        assert set("abcd") <= set(tenants)
        with pytest.raises(BulkheadFullError):
            await call("a")
        hold.set()
        await asyncio.gather(*calls)
        for number in range(50, 60):
            tenants[number]
        assert list(tenants) == [58, 59]

    asyncio.run(main())


@pytest.mark.parametrize("end", [None, ZeroDivisionError, asyncio.CancelledError])
def test_however_a_call_ends_its_policy_may_go_again(end):
    tenants = bulkheads(max_keys=1)

    @tenants
    async def call(key):
        if end:
            raise end

    async def main():
        for key in ("a", "b"):
            try:
                await call(key)
            except BaseException as exc:
                if not isinstance(exc, end or ()):
                    raise

    asyncio.run(main())
    assert list(tenants) == ["b"]
    assert [entry.holders for entry in tenants._entries.values()] == [0]


def test_a_call_refused_by_another_guard_of_the_row_lets_its_policy_go():
    tenants, closed = bulkheads(max_keys=1), RateLimiter("r", rate=1)
    closed.admit().success()
    call = Pipeline(closed, tenants)(lambda key: key)
    for key in ("a", "b"):
        with pytest.raises(RateLimitedError):
            call(key)
    assert [entry.holders for entry in tenants._entries.values()] == [0]


def test_an_open_breaker_is_kept_while_others_can_go_but_memory_has_an_end():
    hosts = breakers(max_keys=3)

    @hosts
    def fetch(host):
        return 1 / 0 if str(host).startswith("bad") else host

    fail(fetch, "bad")
    for number in range(100):
        fetch(number)
    assert hosts["bad"].policy.state.value == "open"
    assert len(hosts) == 3
    for number in range(100):
        fail(fetch, f"bad {number}")
        assert len(hosts) == 3
    assert list(hosts) == ["bad 97", "bad 98", "bad 99"]
    assert {hosts[key].policy.state.value for key in list(hosts)} == {"open"}


def test_idle_policies_are_dropped_unless_they_have_something_to_remember():
    hosts, now = breakers(idle=60), 0.0
    fetch = hosts(lambda host: 1 / 0 if host == "bad" else host)
    with use_clock(lambda: now):
        fetch("a")
        fail(fetch, "bad")
        now = 30.0
        fetch("b")
        now = 60.0
        fetch("c")
        assert set(hosts) == {"bad", "b", "c"}
        now = 89.0
        fetch("c")
        assert "b" in hosts
        now = 90.0
        fetch("c")
        assert set(hosts) == {"bad", "c"}


def test_a_view_that_a_finaliser_drops_while_room_is_made_breaks_nothing():
    views = []

    class Watched(Bulkhead):
        def at_rest(self, now):
            views.clear()  # as the garbage collector may, at any allocation
            return True

    tenants = Keyed("t", lambda key: Watched(str(key), max_concurrent=1), key=first, max_keys=2)
    call = tenants(lambda key: key)
    for key in range(8):
        assert call(key) == key
        views.append(tenants[key])
    views.clear()
    assert list(tenants) == [6, 7]
    assert tenants.counters()["finished"] == 8


def test_an_objective_and_a_shedder_remember_what_went_wrong():
    for make in (lambda key: SLO(str(key), target=0.9), lambda key: LoadShedder(str(key), window=60)):
        tenants = Keyed("t", make, key=first, max_keys=2, idle=3600)
        call = tenants(lambda key: 1 / 0 if key == "bad" else key)
        with use_clock(lambda: 0.0):
            fail(call, "bad")
            for key in range(5):
                call(key)
            assert list(tenants) == ["bad", 4]
        with use_clock(lambda: 31 * 86400.0):
            for key in range(5):
                call(key)
            assert list(tenants) == [3, 4]


def test_a_limiter_says_itself_when_it_is_at_rest():
    tenants = Keyed("t", lambda key: RateLimiter(str(key), rate=1, burst=2), key=first, max_keys=2, idle=math.inf)
    call, now = tenants(lambda key: key), 0.0
    with use_clock(lambda: now):
        call("used")
        for key in range(5):
            call(key)
            now += 0.01
        now = 1.0
        assert "used" not in tenants, "all had used a turn, so the oldest went"
        for _ in range(2):
            call("mine")
        now = 1.5
        tenants["rests"]
        tenants["rests too"]
        assert "mine" in tenants


def test_the_factory_runs_without_the_lock_and_of_two_policies_for_one_key_all_share_one():
    barrier = threading.Barrier(8)
    made = []

    def make(key):
        barrier.wait(10)  # all eight are here at once
        made.append(Bulkhead(key, max_concurrent=100))
        return made[-1]

    tenants = Keyed("t", make, key=first)
    got = []
    threads = [threading.Thread(target=lambda: got.append(tenants["a"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(made) == 8
    assert len({id(view.policy) for view in got}) == 1
    assert tenants.snapshot().created == 1
    assert tenants._entries["a"].holders == 8


def test_what_key_and_factory_raise_the_caller_gets_and_nothing_stays():
    tenants = Keyed("t", lambda key: Bulkhead(key, max_concurrent=0), key=lambda key: {"good": key}[key])
    call = tenants(lambda key: key)
    with pytest.raises(KeyError):
        call("bad")
    with pytest.raises(ValueError, match="max_concurrent must be 1 or more"):
        call("good")
    with pytest.raises(TypeError, match=r"a key of 't' must be hashable \(a string, number or tuple\), got \[\]"):
        tenants[[]]
    assert len(tenants) == 0


def test_only_the_keyed_policy_is_in_the_registry_and_counts_for_all_also_for_those_that_are_gone():
    before = set(live())
    tenants = Keyed("t", lambda key: RateLimiter(str(key), rate=1), key=first, max_keys=2)
    call = tenants(lambda key: key)
    with use_clock(lambda: 0.0):
        for key in range(5):
            call(key)
            with pytest.raises(RateLimitedError):
                call(key)
    assert set(live()) - before == {tenants}
    assert tenants.counters() == {"admitted": 5, "rejected": 5}
    assert tenants.gauges() == {"keys": 2}


def test_a_factory_that_shares_policies_takes_none_of_them_out_of_the_registry():
    shared = Bulkhead("shared", max_concurrent=5)
    tenants = Keyed("t", lambda key: shared, key=first)
    assert tenants["a"].policy is tenants["b"].policy is shared
    assert shared in set(live())


def test_policies_that_look_at_results_and_costs_work_per_key():
    limiters = Keyed(
        "t",
        lambda key: RateLimiter(key, rate=10, drain_on=lambda outcome: outcome == 429).costing(lambda key, cost: cost),
        key=first,
    )
    call = limiters(lambda key, cost: 429 if cost == 9 else 200)
    with use_clock(lambda: 0.0):
        call("a", 4)
        assert limiters._entries["a"].policy.policy.snapshot().available == 6
        call("b", 9)
        assert limiters._entries["b"].policy.policy.snapshot().available == 0
    assert limiters.counters() == {"admitted": 2, "rejected": 0}


def test_arounds_per_key_run_the_call():
    tenants = KeyedAround("t", Twice, key=first, max_keys=2)
    runs = []

    @tenants
    async def call(key):
        runs.append(key)
        assert tenants._entries[key].holders == 1
        return key

    async def main():
        for key in ("a", "b", "a", "c"):
            assert await call(key) == key

    asyncio.run(main())
    assert runs == ["a", "a", "b", "b", "a", "a", "c", "c"]
    assert (list(tenants), tenants.counters()) == (["a", "c"], {"calls": 4})
    assert tenants["a"].policy.calls == 2
    assert tenants(lambda key: key)("z") == "z"
    assert tenants["z"](lambda: 5)() == 5
    with pytest.raises(TypeError, match="KeyedAround runs whole calls"):

        @tenants
        async def stream(key):
            yield key


def test_a_dropped_keyed_policy_takes_its_policies_with_it():
    tenants = bulkheads()
    call = tenants(lambda key: key)
    call("a")
    gone = [weakref.ref(tenants), weakref.ref(tenants["a"].policy)]
    del tenants, call
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_settings_change_under_way():
    tenants = bulkheads(max_keys=10)
    call = tenants(lambda key: key)
    for key in range(10):
        call(key)
    tenants.update(max_keys=3, idle=5.0)
    call(9)
    assert len(tenants) == 3
    assert (tenants.max_keys, tenants.idle) == (3, 5.0)
    with pytest.raises(ValueError, match="max_keys must be 1 or more"):
        tenants.update(max_keys=0)


def test_the_decorator_makes_one_named_after_the_function():
    @keyed(CircuitBreaker, key=first, max_keys=5)
    def call(key):
        return key

    @keyed(Twice, key=first, around=True, name="twice")
    def twice(key):
        return key

    assert call("a") == twice("a") == "a"
    (guards,), (arounds,) = policies_of(call), policies_of(twice)
    assert guards.name.endswith("call")
    assert guards["a"].policy.name == "a"
    assert repr(arounds["a"]) == "<<KeyedAround 'twice'> at 'a'>"


async def an_async_key(key):
    return key


@pytest.mark.parametrize(
    ("make", "error", "rule"),
    [
        (lambda: Keyed("t", 5, key=first), TypeError, "factory must be a plain function of a key, got 5"),
        (
            lambda: Keyed("t", Twice, key=None),
            TypeError,
            "key must be a plain function of a call's arguments, got None",
        ),
        (lambda: Keyed("t", Twice, key=an_async_key), TypeError, "key must be a plain function"),
        (lambda: bulkheads(max_keys=0), ValueError, "max_keys must be 1 or more, got 0"),
        (lambda: bulkheads(idle=0), ValueError, "idle must be more than 0"),
        (lambda: bulkheads(idle=math.nan), ValueError, "idle must be more than 0, got nan s"),
        (lambda: Keyed("t", Twice, key=first)["a"], TypeError, "must make guards, got <Twice 'a'>; KeyedAround takes"),
        (
            lambda: KeyedAround("t", CircuitBreaker, key=first)["a"],
            TypeError,
            "must make arounds, .*; Keyed takes guards",
        ),
        (lambda: Keyed("t", str, key=first)["a"], TypeError, "must make guards, got 'a'$"),
        (lambda: Keyed("t", lambda key: Timeout(key, 1), key=first)["a"], TypeError, "Timeout remembers nothing"),
    ],
)
def test_what_can_not_work_is_refused_with_its_value_and_the_rule(make, error, rule):
    with pytest.raises(error, match=rule):
        make()
