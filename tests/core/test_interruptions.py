"""What comes at the worst moment: Ctrl-C, a fork, a finaliser, a listener that leaves, a caller that can't wait."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from types import SimpleNamespace

import pytest

from seawall import (
    Bulkhead,
    BulkheadFullError,
    CallTimeoutError,
    CircuitBreaker,
    LoadShedder,
    Pipeline,
    Priority,
    QueueDelaySignal,
    RateLimiter,
    Rejected,
    StateChanged,
    Timeout,
    listen,
    live,
    policies_of,
    priority,
    use_clock,
)
from seawall.core import gate, locking, registry, watching
from seawall.core.decorate import label
from seawall.testing import VirtualClock, run


def free():
    """Whether another thread can take the lock."""
    taken = []

    def take():
        taken.append(gate.lock.acquire(timeout=5))
        if taken[0]:
            gate.lock.release()

    other = threading.Thread(target=take)
    other.start()
    other.join()
    return taken[0]


class Interrupting:
    """A clock that is interrupted at its reading number `at`."""

    def __init__(self, at):
        self.at, self.readings = at, 0

    def __call__(self):
        self.readings += 1
        if self.readings == self.at:
            raise KeyboardInterrupt
        return float(self.readings)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_an_interrupt_under_the_lock_lets_every_guard_exit_and_leaves_the_lock_free(at, fails, is_async):
    places, breaker = Bulkhead("k", max_concurrent=1), CircuitBreaker("b")

    def work():
        if fails:
            raise ConnectionError

    async def async_work():
        work()

    call = Pipeline(places, breaker)(async_work if is_async else work)
    with use_clock(Interrupting(at)):
        try:
            asyncio.run(call()) if is_async else call()
        except (KeyboardInterrupt, ConnectionError) as error:
            caught = type(error)
        else:
            caught = None
    assert caught is {(3, False): None, (3, True): ConnectionError}.get((at, fails), KeyboardInterrupt)
    assert places.snapshot().active == 0
    assert not locking.held()
    assert free()


def test_an_interrupt_while_another_thread_holds_the_lock_is_not_masked():
    places = Bulkhead("k", max_concurrent=1)

    @places
    def work(): ...

    def hold():
        with gate.lock:
            held.set()
            interrupted.wait(5)

    def interrupt(number, frame):
        interrupted.set()
        raise KeyboardInterrupt

    held, interrupted = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGALRM, interrupt)
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(5)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        interrupted.set()
        holder.join()
    assert places.snapshot().active == 0
    assert free()


def a_span(ended):
    return SimpleNamespace(end=lambda exc: ended.append(type(exc)), sampled=None)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_listener_that_ends_the_program_ends_the_span_too(monkeypatch, is_async):
    spans = []
    monkeypatch.setattr(watching, "hooked", True)
    monkeypatch.setattr(watching, "tracer", SimpleNamespace(call=lambda name: a_span(spans)))

    def leave(event):
        raise SystemExit

    breaker = CircuitBreaker("b", consecutive_failures=1, reset_timeout=1.0, listeners=[leave])
    fails = [True]

    def work():
        if fails:
            raise ConnectionError

    async def async_work():
        work()

    call = breaker(async_work if is_async else work)
    with use_clock(clock := VirtualClock()), pytest.raises(SystemExit):
        asyncio.run(call()) if is_async else call()
    fails.clear()
    clock.advance(2.0)
    with use_clock(clock), pytest.raises(SystemExit):  # it half opens, closes, and tells both
        asyncio.run(call()) if is_async else call()
    assert spans == [SystemExit, SystemExit]
    assert breaker.snapshot().probes == 0


def test_a_span_that_cannot_be_ended_harms_nobody(monkeypatch, caplog):
    def end(exc):
        raise LookupError

    span = SimpleNamespace(end=end, sampled=None)
    monkeypatch.setattr(watching, "hooked", True)
    monkeypatch.setattr(watching, "tracer", SimpleNamespace(call=lambda name: span))

    async def work():
        return "done"

    assert asyncio.run(CircuitBreaker("b")(work)()) == "done"
    assert CircuitBreaker("b")(lambda: "done")() == "done"
    assert "the call goes on" in caplog.text


def test_a_listener_never_runs_under_the_lock_even_if_a_finaliser_leaves_a_stream_there():
    seen = []
    stop = listen(lambda event: seen.append(locking.held()))
    breaker = CircuitBreaker("b", consecutive_failures=1)

    @breaker
    def numbers():
        try:
            yield 1
        finally:
            raise ConnectionError  # the generator is closed, and fails: the breaker opens

    items = [numbers()]
    next(items[0])

    class Dropping:
        def enter(self, now):
            items.clear()

        def exit(self, token, now, exc): ...

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.unraisablehook", lambda unraisable: None)
            Pipeline(Dropping())(lambda: None)()
            gc.collect()
    finally:
        stop()
    assert seen == [False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_the_lock_and_the_events_to_itself():
    """While another thread holds the lock and delivers, which a prefork server's may."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(event):
        inside.set()
        go_on.wait(10)

    open_breaker = CircuitBreaker("b", consecutive_failures=1, listeners=[slow])
    other = threading.Thread(target=lambda: open_breaker.admit().failure(OSError()))
    other.start()
    inside.wait(10)
    heard = []
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(10)
            limiter = RateLimiter("r", rate=1, burst=1, listeners=[heard.append])
            call = limiter(lambda: None)
            call()
            try:
                call()
            except Rejected:
                code = 0 if len(heard) == 1 else 2
        finally:
            os._exit(code)
    go_on.set()
    other.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_keeps_the_errands_of_its_policies_and_no_event_of_the_parents():
    shedder = LoadShedder("front", signals=[QueueDelaySignal(lambda: 0.0)])
    heard = []
    breaker = CircuitBreaker("b", listeners=[heard.append])
    with gate.lock:
        shedder.enter(0.0)  # which queues its errand
        breaker._emit(StateChanged, 0.0, breaker.state, breaker.state)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            with use_clock(lambda: 1.0):
                shedder(lambda: None)()
            code = 0 if not heard and not shedder._sampling else 2
        finally:
            os._exit(code)
    shedder(lambda: None)()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(heard) == 1


def test_a_plain_block_that_can_not_hold_a_timeout_enters_nothing():
    breaker = CircuitBreaker("b", consecutive_failures=1)
    with pytest.raises(TypeError, match="Timeout needs an event loop"):
        Pipeline(breaker, Timeout("a", 1.0), CircuitBreaker("c"), Timeout("t", 1.0)).scope().__enter__()
    assert breaker.state.value == "closed"
    assert breaker.snapshot().failures == breaker.snapshot().neither == 0


def test_a_timeout_chosen_per_call_is_refused_unless_the_chooser_says_so():
    class Chooses:
        def guard_for(self, args, kwargs):
            return Timeout("t", 1.0)

    class Says(Chooses):
        issues_deadlines = True

    async def main():
        with pytest.raises(TypeError, match="so it needs issues_deadlines = True as well"):
            await Pipeline(Chooses())(asyncio.sleep)(5)
        with pytest.raises(CallTimeoutError):
            await Pipeline(Says())(asyncio.sleep)(5)

    run(main())


def test_who_can_not_wait_takes_nobodys_turn():
    places = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=60.0)

    async def main():
        with places.scope():
            waiter = asyncio.create_task(places(asyncio.sleep)(0, "served"))
            await asyncio.sleep(0)
            with priority(Priority.CRITICAL):
                with pytest.raises(BulkheadFullError):
                    places.admit()
                with pytest.raises(BulkheadFullError):
                    places(lambda: None)()
            assert places.snapshot().waiting == 1
        return await waiter

    assert run(main()) == "served"


def test_a_hand_written_stack_leaves_its_own_tasks_block():
    guard = Timeout("t", 2.0)

    async def enter():
        await guard.__aenter__()

    async def leave():
        await guard.__aexit__(None, None, None)

    async def one(seconds):
        await enter()
        await asyncio.sleep(seconds)
        await leave()
        return seconds

    async def main():
        return await asyncio.gather(one(1.0), one(1.5))

    assert run(main()) == [1.0, 1.5]


def test_a_plain_call_waits_on_a_clock_of_its_own():
    with use_clock(clock := VirtualClock()):
        limiter = RateLimiter("r", rate=1, burst=1, max_wait=5.0)
        times = [limiter(clock)() for _ in range(3)]
    assert times == [0.0, 1.0, 2.0]


def test_a_class_of_policies_is_no_policy():
    with pytest.raises(TypeError, match=r"is a class of policies; make one: CircuitBreaker\(\.\.\.\)"):
        Pipeline(CircuitBreaker)


def test_a_plain_function_that_returns_a_stream_is_refused_and_a_clients_object_is_not_closed():
    class Client:
        closed = False

        def close(self):
            self.closed = True

        def __await__(self):
            yield

    async def stream():
        yield

    client = Client()
    for returned in (client, stream()):
        with pytest.raises(TypeError, match="which nothing guards"):
            CircuitBreaker("b")(lambda returned=returned: returned)()
    assert not client.closed


def test_every_function_has_a_label_that_a_policy_can_bear():
    assert label(str.upper) == "builtins.str.upper"

    def fn(): ...

    fn.__qualname__ = "x" * 500
    assert len(CircuitBreaker(label(fn)).name) == 200


def test_two_changes_at_once_lose_neither():
    places = Bulkhead("k", max_concurrent=1)
    settings = [{"max_concurrent": 5}, {"max_queued": 9}, {"max_wait": 7.0}, {"aging": 3.0}]
    threads = [threading.Thread(target=places.update, kwargs=setting) for setting in settings * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (places.max_concurrent, places.max_queued, places.max_wait, places.aging) == (5, 9, 7.0, 3.0)


def test_a_change_shows_no_second_policy_to_exporters(monkeypatch):
    seen = []
    places = Bulkhead("only one", max_concurrent=1)
    adopt = Bulkhead._adopt

    def watching(self, fresh, now):
        seen.extend(policy for policy in live() if getattr(policy, "name", None) == "only one")
        adopt(self, fresh, now)

    monkeypatch.setattr(Bulkhead, "_adopt", watching)
    places.update(max_concurrent=2)
    assert seen == [places]
    with registry.unlisted():
        hidden = Bulkhead("hidden", max_concurrent=1)
    assert hidden not in set(live())


def test_policies_of_a_function_are_found_through_its_rows():
    row = (CircuitBreaker("b"), Timeout("a", 1.0), Bulkhead("k", max_concurrent=1), Timeout("t", 1.0))
    assert policies_of(Pipeline(*row)(asyncio.sleep)) == row
