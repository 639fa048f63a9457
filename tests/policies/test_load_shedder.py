from __future__ import annotations

import asyncio
import gc
import math
import random
import statistics
import threading
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import (
    CallRejected,
    CpuSignal,
    Event,
    LoadShedder,
    LoadShedError,
    Priority,
    QueueDelaySignal,
    Rejected,
    SheddingStarted,
    SheddingStopped,
    load_shedder,
    policies_of,
    priority,
    use_clock,
)
from seawall.core import events, gate
from seawall.policies.load_shedder import signals
from seawall.policies.load_shedder.shedder import by_priority
from seawall.testing import run


def shedder(**settings):
    return LoadShedder("s", **{"rng": random.Random(1), **settings})


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Pressure:
    """A signal that says what it is set to."""

    def __init__(self, value=0.0):
        self.value = value
        self.sampled = []

    def sample(self, now):
        self.sampled.append(now)
        return self.value


def send(guard, calls, now=0.0, error=None, level=Priority.NORMAL):
    """How many of `calls` are let in; each ends with `error`."""
    entered = 0
    with priority(level):
        for _ in range(calls):
            try:
                token = guard.enter(now)
            except LoadShedError:
                continue
            guard.exit(token, now, error)
            entered += 1
    return entered


def rate(guard, now):
    """The share it refuses now."""
    guard._due = -math.inf
    guard._reckon(now)
    return guard.snapshot().rate


# Failures of the callee


def test_up_to_the_failure_rate_nothing_is_refused():
    guard = shedder(failure_rate=0.1)
    send(guard, 900)
    send(guard, 100, error=ConnectionError())
    assert rate(guard, 0.1) == 0
    assert send(guard, 100, now=0.1) == 100


def test_beyond_it_the_share_is_that_of_the_sre_book():
    guard = shedder(failure_rate=0.1)
    send(guard, 50)
    send(guard, 50, error=ConnectionError())
    assert rate(guard, 0.1) == pytest.approx((100 - 50 / 0.9) / 101)


def test_the_share_is_what_is_refused():
    guard = shedder(failure_rate=0.1)
    send(guard, 50)
    send(guard, 50, error=ConnectionError())
    refused = 0
    for _ in range(4000):
        try:
            guard.enter(0.1)
        except LoadShedError:
            refused += 1
    assert refused / 4000 == pytest.approx((100 - 50 / 0.9) / 101, abs=0.03)


def test_however_bad_it_is_some_calls_are_let_in_to_find_out():
    guard = shedder(max_rejection=0.9)
    send(guard, 100, error=ConnectionError())
    assert rate(guard, 0.1) == 0.9
    assert 60 <= send(guard, 1000, now=0.1, error=ConnectionError()) <= 140


def test_a_failure_counts_from_when_it_came_not_from_when_its_call_began():
    guard = shedder(window=60.0)
    tokens = [guard.enter(0.0) for _ in range(20)]
    for token in tokens:
        guard.exit(token, 59.0, ConnectionError())
    assert rate(guard, 100.0) == 0.9


def test_few_calls_say_nothing():
    guard = shedder(minimum_calls=10)
    send(guard, 9, error=ConnectionError())
    assert rate(guard, 0.1) == 0
    send(guard, 1, now=0.2, error=ConnectionError())
    assert rate(guard, 0.3) == 0.9


def test_what_it_refused_itself_is_no_failure_so_it_opens_when_the_failures_have_left_the_window():
    guard = shedder(window=60.0)
    for second in range(120):
        send(guard, 100, now=float(second), error=ConnectionError())
    assert rate(guard, 120.0) == 0.9
    for second in range(120, 181):  # the callee is well again
        send(guard, 100, now=float(second))
    assert rate(guard, 181.0) == 0
    assert send(guard, 100, now=181.0) == 100


def test_the_share_falls_all_the_way_while_the_failures_age():
    guard = shedder(window=60.0)
    send(guard, 600, now=0.0, error=ConnectionError())
    shares = []
    for second in range(1, 60):
        send(guard, 200, now=float(second))
        shares.append(rate(guard, float(second)))
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 < shares[0]


@pytest.mark.parametrize("error", [asyncio.CancelledError(), Rejected("inner"), GeneratorExit(), KeyError()])
def test_cancelled_refused_abandoned_and_ignored_calls_are_neither(error):
    guard = shedder(ignore=KeyError)
    send(guard, 20, error=error)
    assert guard.counters() == {"success": 0, "failure": 0, "neither": 20, "rejected": 0}


def test_without_a_failure_rate_failures_do_not_matter():
    guard = shedder(failure_rate=None)
    send(guard, 1000, error=ConnectionError())
    assert rate(guard, 0.1) == 0


# Priorities


def test_the_least_important_are_refused_first_and_the_share_of_all_stays_the_same():
    guard = shedder(max_rejection=0.9)
    for level, calls in ((Priority.SHEDDABLE, 100), (Priority.NORMAL, 300), (Priority.CRITICAL, 100)):
        send(guard, calls // 2, level=level)
        send(guard, calls // 2, level=level, error=ConnectionError())
    share = rate(guard, 0.1)  # a bit less than half
    assert guard._rates[Priority.SHEDDABLE] == 1.0
    assert guard._rates[Priority.CRITICAL] == 0.0
    assert guard._rates[Priority.NORMAL] * 300 + 100 == pytest.approx(share * 500)
    assert send(guard, 50, now=0.1, level=Priority.SHEDDABLE) == 0
    assert send(guard, 50, now=0.1, level=Priority.CRITICAL) == 50


def test_important_calls_alone_share_what_there_is():
    assert by_priority(0.5, [0, 0, 0, 0, 100])[4] == 0.5


def test_before_any_call_came_all_are_treated_alike():
    assert by_priority(0.5, [0] * 5) == [0.5] * 5


@settings(deadline=None, max_examples=200)
@given(share=st.floats(0, 1), came=st.lists(st.integers(0, 1000), min_size=5, max_size=5))
def test_over_any_traffic_the_share_is_kept_and_no_call_is_refused_before_a_lesser_one(share, came):
    rates = by_priority(share, came)
    assert all(0 <= one <= 1 for one in rates)
    if sum(came):
        assert sum(one * calls for one, calls in zip(rates, came, strict=True)) == pytest.approx(share * sum(came))
        seen = [one for one, calls in zip(rates, came, strict=True) if calls]
        assert seen == sorted(seen, reverse=True)
        assert sum(0 < one < 1 for one in seen) <= 1


# Signals


def test_a_signal_is_sampled_outside_the_lock_and_at_most_ten_times_a_second():
    class Locked(Pressure):
        def sample(self, now):
            free = []

            def look():
                free.append(gate.lock.acquire(blocking=False))
                if free[0]:
                    gate.lock.release()

            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            assert free == [True]
            return super().sample(now)

    signal, clock = Locked(), Clock()
    guard = shedder(signals=[signal])
    with use_clock(clock):
        for step in range(100):
            clock.now = step / 100
            guard.admit().success()
    assert len(signal.sampled) == 10


def test_while_a_sample_is_under_way_no_other_is_asked_for():
    signal = Pressure()
    guard = shedder(signals=[signal])
    for step in range(5):
        send(guard, 1, now=step / 2)
    events.deliver()
    assert signal.sampled == [0.0]


def test_a_signal_sheds_as_much_as_it_asks_for_and_the_greatest_counts():
    clock = Clock()
    guard = shedder(signals=[Pressure(0.2), Pressure(0.6)])
    with use_clock(clock):
        send(guard, 1, now=0.0)
        guard._sample(Event("s", 0.0))
        send(guard, 1, now=0.2)
        assert guard.snapshot().rate == 0.6
        assert guard.gauges() == {"rejection_rate": 0.6}
        events.deliver()


def test_when_a_signal_asks_for_nothing_any_more_it_is_open_within_two_tenths_of_a_second():
    clock, signal = Clock(), Pressure(1.0)
    guard = shedder(signals=[signal], max_rejection=1.0)

    @guard
    def call(): ...

    with use_clock(clock):
        call()
        clock.now = 0.11
        with pytest.raises(LoadShedError):
            call()
        signal.value = 0.0
        clock.now = 0.22
        with pytest.raises(LoadShedError):
            call()
        clock.now = 0.33
        call()


def test_an_old_sample_says_nothing():
    clock = Clock()
    guard = shedder(signals=[Pressure(1.0)])
    with use_clock(clock):
        guard.admit().success()
        clock.now = 3600.0
        for _ in range(20):
            guard.admit().success()


@pytest.mark.parametrize("value", [math.nan, -1.0, "much", None])
def test_what_is_no_share_is_no_pressure(value, caplog):
    clock = Clock()
    guard = shedder(signals=[Pressure(value)])
    with use_clock(clock):
        for clock.now in (0.0, 0.2):
            guard.admit().success()
    assert guard.snapshot().rate == 0


def test_a_signal_that_raises_is_logged_and_hurts_no_call(caplog):
    class Broken:
        def sample(self, now):
            raise OSError("no such file")

    clock = Clock()
    guard = shedder(signals=[Broken(), Pressure(0.5)])
    with use_clock(clock), priority(Priority.CRITICAL):
        guard.admit().success()
    send(guard, 1, now=0.2)
    assert guard.snapshot().rate == 0.5
    events.deliver()
    assert "no such file" in caplog.text


def test_it_works_around_async_calls_scopes_and_permits_alike():
    clock, signal = Clock(), Pressure(1.0)
    guard = shedder(signals=[signal], max_rejection=1.0)

    @guard
    async def call(): ...

    async def main():
        await call()
        clock.now = 0.2
        with pytest.raises(LoadShedError):
            await call()
        with pytest.raises(LoadShedError):
            async with guard:
                raise AssertionError
        with pytest.raises(LoadShedError):
            guard.admit()

    with use_clock(clock):
        asyncio.run(main())


def test_cpu_in_use_over_the_cores_there_are():
    signal = CpuSignal(start=0.5, full=1.0, cores=2)
    used = iter([0.0, *(step * 1.5 for step in range(1, 11))])
    signal._used = lambda: next(used)
    found = [signal.sample(float(now)) for now in range(11)]
    assert found[0] == 0
    assert found[-1] == pytest.approx(0.5, abs=0.01)  # 0.75 in use is half-way
    assert found == sorted(found)


def test_cpu_is_smoothed_so_that_a_tenth_of_a_second_is_no_overload():
    signal = CpuSignal(start=0.5, full=1.0, cores=1)
    used = iter([0.0, 0.1, 0.1, 0.1])
    signal._used = lambda: next(used)
    assert [signal.sample(now / 10) for now in range(4)] == [0.0] * 4


def test_cpu_sampled_twice_at_one_moment_changes_nothing():
    signal = CpuSignal(cores=1)
    assert [signal.sample(5.0), signal.sample(5.0), signal.sample(4.0)] == [0.0] * 3


def test_cpu_of_this_process_is_read_and_no_file_is_opened_for_it(monkeypatch):
    monkeypatch.setattr(signals.Path, "read_text", lambda *_: pytest.fail("read a file"))
    signal = CpuSignal()
    assert signal.cores >= 1
    assert 0 <= signal.sample(0.0) <= 1


def test_cpu_of_a_container_is_read_from_its_cgroup(tmp_path, monkeypatch):
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(signals, "_cgroup", lambda: tmp_path)
    signal = CpuSignal(container=True)
    assert signal.cores == 0.5
    assert signal._used() == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert CpuSignal(container=True).cores >= 1


def test_a_container_without_cgroups_is_refused_with_the_cure(monkeypatch):
    monkeypatch.setattr(signals.Path, "exists", lambda _: False)
    with pytest.raises(ValueError, match="container=True needs cgroup v2"):
        CpuSignal(container=True)


def test_the_cgroup_is_the_one_of_this_process_and_where_that_looks_like_none_the_root(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "Path", lambda path: tmp_path / path[1:])
    root, named = tmp_path / "sys/fs/cgroup", tmp_path / "proc/self/cgroup"
    for folder in (root / "app.slice", named.parent):
        folder.mkdir(parents=True)
    named.write_text("1:name=old:/elsewhere\n0::/app.slice\n")
    (root / "cpu.stat").touch()
    assert signals._cgroup() == root
    (root / "app.slice/cpu.stat").touch()
    assert signals._cgroup() == root / "app.slice"


def test_a_queue_that_is_empty_now_and_then_is_no_overload():
    delays = iter([0.9, 0.9, 0.0, 0.9, 0.9, 0.9, 0.9, 0.9])
    late = QueueDelaySignal(lambda: next(delays), start=0.1, full=0.5)
    assert [late.sample(now) for now in range(8)] == [0, 0, 0, 0, 0, 0, 0, 1]


def test_a_loop_that_is_late_is_an_overload():
    late = QueueDelaySignal(start=0.1, full=0.3)

    async def main():
        loop = asyncio.get_running_loop()
        found = []
        for _ in range(8):
            found.append(late.sample(0.0))
            loop.moment += 0.2  # a callback blocks the loop
            await asyncio.sleep(0)
        return found

    found = run(main())
    assert found[0] == 0
    assert found[-1] == pytest.approx(0.5)


def test_a_loop_that_is_still_blocked_is_late_already():
    late = QueueDelaySignal(start=0.1, full=0.3)

    async def main():
        for _ in range(8):
            found = late.sample(0.0)
            asyncio.get_running_loop().moment += 0.1
        return found

    assert run(main()) == pytest.approx(1.0)


def test_off_the_loop_the_lag_seen_last_counts_and_a_closed_loop_is_not_kept():
    late = QueueDelaySignal(start=0.1, full=0.3)

    async def main():
        late.sample(0.0)
        return weakref.ref(asyncio.get_running_loop())

    loop = run(main())
    assert late.sample(0.0) == 0
    gc.collect()
    assert loop() is None


# Events, decorators, settings


def test_that_shedding_began_and_ended_is_told_once_and_why():
    heard, clock, signal = [], Clock(), Pressure(0.0)
    guard = shedder(signals=[signal], max_rejection=0.5, listeners=[heard.append])

    def calls(until):
        while clock.now < until:
            clock.now = round(clock.now + 0.1, 1)
            try:
                guard.admit().success()
            except LoadShedError:
                continue

    with use_clock(clock):
        calls(1.0)
        assert heard == []
        signal.value = 0.4
        calls(3.0)
        signal.value = 0.0
        calls(10.0)
    told = [event for event in heard if not isinstance(event, CallRejected)]
    assert told == [
        SheddingStarted("s", pytest.approx(1.2, abs=0.11), 0.4, "Pressure"),
        SheddingStopped("s", pytest.approx(8.2, abs=0.31)),  # five seconds after the last
    ]
    refused = [event for event in heard if isinstance(event, CallRejected)]
    assert len(refused) == guard.counters()["rejected"] > 0
    assert str(refused[0].error) == "'s' is shedding load"
    assert refused[0].error.retry_after is None


def test_failures_are_named_as_the_cause():
    heard = []
    guard = shedder(listeners=[heard.append])
    clock = Clock()
    with use_clock(clock):
        for clock.now in (0.0, 0.1, 0.2, 0.4):
            for _ in range(10):
                try:
                    guard.admit().failure(ConnectionError())
                except LoadShedError:
                    continue
    assert heard[0] == SheddingStarted("s", 0.1, 0.9, "failures")


def test_two_runs_with_the_same_seed_refuse_the_same_calls():
    def refusals():
        guard = shedder()
        send(guard, 50)
        send(guard, 50, error=ConnectionError())
        return [send(guard, 1, now=0.2) for _ in range(100)]

    assert refusals() == refusals()
    assert 0 < statistics.mean(refusals()) < 1


def test_an_update_keeps_the_counts_and_what_the_window_has_seen():
    guard = shedder()
    send(guard, 100, error=ConnectionError())
    guard.update(max_rejection=0.5)
    assert rate(guard, 0.2) == 0.5
    guard.update(failure_rate=None, signals=[Pressure()])
    assert rate(guard, 0.3) == 0
    with use_clock(lambda: 0.3):
        guard.update(failure_rate=0.1, window=10.0)
    assert rate(guard, 0.4) == 0  # a new window has seen nothing yet
    send(guard, 20, now=0.5, error=ConnectionError())
    assert rate(guard, 0.6) == 0.5


def test_as_a_decorator():
    @load_shedder
    def bare(): ...

    @load_shedder(failure_rate=0.2)
    async def set_up(): ...

    assert policies_of(bare)[0].name.endswith("bare")
    assert policies_of(set_up)[0].failure_rate == 0.2
    assert bare() is None


@pytest.mark.parametrize(
    ("settings", "error", "rule"),
    [
        ({"failure_rate": 1.0}, ValueError, r"failure_rate must be in \(0, 1\), got 1.0"),
        ({"failure_rate": 10}, ValueError, "for 10 % write 0.1"),
        ({"window": 1e-310}, ValueError, "window must be 0.001 s or more, got 1e-310 s"),
        ({"window": math.nan}, ValueError, "window must be more than 0"),
        ({"minimum_calls": 0}, ValueError, "minimum_calls must be 1 or more, got 0"),
        ({"max_rejection": 0}, ValueError, "max_rejection must be in"),
        ({"signals": [max]}, TypeError, r"signals must have a method sample\(now\)"),
        ({"signals": object()}, TypeError, "signals must be an iterable of signals"),
        ({"on": "errors"}, TypeError, "on must be an exception class"),
        ({"rng": 7}, TypeError, "rng must be a random.Random, got 7"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value_and_the_rule(settings, error, rule):
    with pytest.raises(error, match=rule):
        LoadShedder("s", **settings)


def test_a_window_of_ages_works():
    guard = shedder(window=1e308)
    assert send(guard, 20, now=1e6) == 20


@pytest.mark.parametrize(
    ("make", "error", "rule"),
    [
        (lambda: CpuSignal(start=0.9, full=0.8), ValueError, "start must be less than full, got 0.9 and 0.8"),
        (lambda: CpuSignal(cores=0), ValueError, "cores must be more than 0"),
        (lambda: QueueDelaySignal(start=0), ValueError, "start must be more than 0"),
        (lambda: QueueDelaySignal(5), TypeError, "source must be a function that returns seconds, got 5"),
    ],
)
def test_a_bad_setting_of_a_signal_is_refused(make, error, rule):
    with pytest.raises(error, match=rule):
        make()


def test_threads_and_loops_count_every_call():
    guard = shedder(signals=[Pressure()])

    @guard
    def plain(): ...

    @guard
    async def call(): ...

    async def many():
        await asyncio.gather(*(call() for _ in range(200)))

    jobs = [lambda: [plain() for _ in range(200)]] * 8 + [lambda: asyncio.run(many())] * 3
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert guard.counters() == {"success": 2200, "failure": 0, "neither": 0, "rejected": 0}


def test_it_works_on_trio():
    trio = pytest.importorskip("trio")
    guard = shedder(signals=[QueueDelaySignal()])

    @guard
    async def call():
        return "done"

    assert trio.run(call) == "done"
