"""Whatever entered exits once, in reverse, however a call ends; and nothing of the call is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import weakref
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import (
    SLO,
    Bulkhead,
    CallTimeoutError,
    Chaos,
    CircuitBreaker,
    Fallback,
    Pipeline,
    RateLimiter,
    Rejected,
    Retry,
    RetryBudget,
    Timeout,
    Wait,
    use_clock,
)
from seawall.testing import run
from tests.cancelling import CancelAt

call_id = contextvars.ContextVar("call_id", default=0)


class Refused(Rejected):
    pass


class Replaced(Exception):
    """What a guard raised in exit."""


class Token:
    pass


class Pause(Wait):
    """Sleeps `naps` times, then lets the call in or refuses it."""

    def __init__(self, guard, now):
        super().__init__(now)
        self.guard = guard
        self.naps = guard.naps

    def resume(self, now):
        self.naps -= 1
        if self.naps:
            self.until = now + self.guard.nap
            raise self
        if self.guard.refuses:
            self.guard.say("refused")
            raise Refused("recorder")
        return self.guard.let_in()

    def abandon(self, now):
        self.guard.say("abandoned")

    def refuse(self, now):
        return Refused("recorder")


class Recorder:
    """A guard that writes down what it is asked, by call."""

    def __init__(self, log, index, *, naps=0, nap=0.0, refuses=False, breaks=False):
        self.log, self.index = log, index
        self.naps, self.nap, self.refuses, self.breaks = naps, nap, refuses, breaks

    def __repr__(self):
        return f"Recorder({self.index}, {self.naps=}, {self.nap=}, {self.refuses=}, {self.breaks=})"

    def say(self, what, token=None):
        self.log[call_id.get()].append((what, self.index, id(token)))

    def let_in(self):
        token = Token()
        self.say("enter", token)
        return token

    def enter(self, now):
        if self.naps:
            self.say("wait")
            raise Pause(self, now + self.nap)
        if self.refuses:
            raise Refused("recorder")
        return self.let_in()

    def exit(self, token, now, exc):
        self.say("exit", token)
        if self.breaks:
            raise Replaced


REAL = {
    "bulkhead": lambda: Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=2.0),
    "limiter": lambda: RateLimiter("r", rate=1, burst=1, max_wait=1.5),
    "strict limiter": lambda: RateLimiter("r", rate=1, burst=1),
    "breaker": lambda: CircuitBreaker("b", consecutive_failures=2, reset_timeout=1.0),
    "slo": lambda: SLO("s", target=0.9, latency=1.0),
    "timeout": lambda: Timeout("t", 2.0),
}
recorders = st.fixed_dictionaries(
    {
        "naps": st.sampled_from([0, 0, 0, 1, 2]),
        "nap": st.sampled_from([0.0, 1.0]),
        "refuses": st.sampled_from([False, False, False, True]),
        "breaks": st.sampled_from([False, False, False, True]),
    }
)
sync_recorders = st.builds(lambda settings: {**settings, "nap": 0.0}, recorders)


def rows_of(recorders, names):
    return st.lists(st.one_of(recorders, st.sampled_from(names)), max_size=5)


def stack(layers, log):
    return [
        REAL[layer]() if isinstance(layer, str) else Recorder(log, index, **layer) for index, layer in enumerate(layers)
    ]


def check_log(log):
    for call, lines in log.items():
        inside, waiting, highest = [], None, -1
        for what, index, token in lines:
            if what == "wait":
                assert waiting is None
                waiting = index
            elif what in {"refused", "abandoned"}:
                assert waiting == index
                waiting = None
            elif what == "enter":
                assert waiting in {None, index}
                waiting = None
                assert index > highest, "each guard is entered once, outermost first"
                highest = index
                inside.append((index, token))
            else:
                assert inside.pop() == (index, token), "the last that entered exits first"
        assert not inside, f"call {call} left {inside} entered"
        assert waiting is None, f"call {call} left {waiting} waiting"


def check_rest(guards):
    for guard in guards:
        if isinstance(guard, Bulkhead):
            assert (guard.snapshot().active, guard.snapshot().waiting) == (0, 0)
        elif isinstance(guard, RateLimiter):
            assert guard.snapshot().waiting == 0
        elif isinstance(guard, CircuitBreaker):
            assert guard.snapshot().probes == 0


class OwnError(Exception):
    pass


async def work(outcome, nap):
    try:
        await asyncio.sleep(0)
        await asyncio.sleep(nap)
    finally:
        await asyncio.sleep(0)
    if outcome == "raise":
        raise OwnError
    return "done"


def as_function(policies, outcome, nap):
    async def call():
        return await work(outcome, nap)

    return Pipeline(*policies)(call)


def as_scope(policies, outcome, nap):
    async def call():
        async with Pipeline(*policies).scope():
            return await work(outcome, nap)

    return call


def as_stream(policies, outcome, nap):
    async def stream():
        try:
            yield 1
            await asyncio.sleep(nap)
            yield 2
        finally:
            await asyncio.sleep(0)
        await work(outcome, nap)

    guarded = Pipeline(*policies)(stream)

    async def call():
        async with contextlib.aclosing(guarded()) as items:
            async for item in items:
                await asyncio.sleep(0)
                if outcome == "stop early" and item == 1:
                    break
        return "done"

    return call


SHAPES = {"function": as_function, "scope": as_scope, "stream": as_stream}


async def in_context(number, awaitable):
    call_id.set(number)
    return await awaitable


async def attempt(layers, shape, outcome, nap, step, *, at_once):
    """Three calls at once, the middle one cancelled at `step`. Whether it got that far."""
    log = defaultdict(list)
    guards = stack(layers, log)
    call = SHAPES[shape](guards, outcome, nap)
    victim = CancelAt(call(), step, at_once=at_once)
    tasks = [asyncio.create_task(in_context(number, one)) for number, one in enumerate([call(), victim, call()])]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    check_log(log)
    check_rest(guards)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    allowed = (Rejected, CallTimeoutError, Replaced, OwnError)
    for number, result in enumerate(results):
        assert result == "done" or isinstance(result, allowed) or (number == 1 and victim.reached), result
        if isinstance(result, CallTimeoutError):
            assert tasks[number].cancelling() == (number == 1 and victim.reached)
    if victim.reached and not any(isinstance(layer, dict) and layer["breaks"] for layer in layers):
        assert isinstance(results[1], asyncio.CancelledError), results[1]
    if outcome == "raise" and OwnError in map(type, results):
        assert not any(layer["breaks"] for layer in layers if isinstance(layer, dict))
    return victim.reached


@settings(deadline=None, max_examples=120)
@given(
    layers=rows_of(recorders, sorted(REAL)),
    shape=st.sampled_from(sorted(SHAPES)),
    outcome=st.sampled_from(["return", "raise", "stop early"]),
    nap=st.sampled_from([0.0, 1.0, 3.0]),
    at_once=st.booleans(),
)
def test_a_cancellation_at_every_await_in_turn_leaves_nothing_entered(layers, shape, outcome, nap, at_once):
    async def main():
        for step in itertools.count():
            if not await attempt(layers, shape, outcome, nap, step, at_once=at_once):
                return

    run(main(), start=1000.0)


def plain(policies, outcome):
    @Pipeline(*policies)
    def call():
        if outcome == "raise":
            raise OwnError
        return "done"

    return call()


def block(policies, outcome):
    with Pipeline(*policies).scope():
        if outcome == "raise":
            raise OwnError
    return "done"


def generator(policies, outcome):
    @Pipeline(*policies)
    def numbers():
        yield 1
        if outcome == "raise":
            raise OwnError
        yield 2

    items = numbers()
    assert next(items) == 1
    if outcome == "stop early":
        items.close()
    elif outcome == "throw":
        items.throw(OwnError)
    elif outcome == "drop":
        del items
    else:
        assert list(items) == [2]
    return "done"


def permit(policies, outcome):
    permit = Pipeline(*policies).admit()
    if outcome == "raise":
        permit.failure(OwnError())
    elif outcome == "stop early":
        permit.cancel()
    elif outcome == "drop":
        with pytest.warns(ResourceWarning, match="dropped"):
            del permit
    else:
        permit.success()
    return "done"


@settings(deadline=None, max_examples=300)
@given(
    layers=rows_of(sync_recorders, sorted(set(REAL) - {"timeout", "limiter"})),
    shape=st.sampled_from([plain, block, generator, permit]),
    outcome=st.sampled_from(["return", "raise", "stop early", "throw", "drop"]),
)
def test_a_plain_call_leaves_nothing_entered_however_it_ends(layers, shape, outcome):
    log = defaultdict(list)
    guards = stack(layers, log)
    if outcome == "drop" and any(isinstance(guard, Recorder) and guard.breaks for guard in guards):
        outcome = "stop early"  # nobody is there to hear what a guard raises when a call is dropped
    with use_clock(lambda: 1000.0):
        for number in range(2):
            call_id.set(number)
            with contextlib.suppress(Rejected, Replaced, OwnError):
                assert shape(guards, outcome) == "done"
    call_id.set(0)
    check_log(log)
    check_rest(guards)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_guard_that_raises_in_exit_keeps_no_other_from_its_own_exit(broken):
    log = defaultdict(list)
    guards = [Recorder(log, index, breaks=index == broken) for index in range(3)]
    with pytest.raises(Replaced):
        Pipeline(*guards)(lambda: 1)()
    check_log(log)
    assert len(log[0]) == 6


def test_a_guard_that_raises_in_exit_replaces_also_a_refusal_further_in():
    log = defaultdict(list)
    guards = [Recorder(log, 0), Recorder(log, 1, breaks=True), Recorder(log, 2, refuses=True)]
    with pytest.raises(Replaced) as caught:
        Pipeline(*guards)(lambda: 1)()
    assert isinstance(caught.value.__cause__, Refused)
    check_log(log)


def test_a_wait_that_ends_in_a_refusal_is_not_abandoned_on_top():
    log = defaultdict(list)
    with pytest.raises(Refused):
        Pipeline(Recorder(log, 0), Recorder(log, 1, naps=2, refuses=True))(lambda: 1)()
    assert [what for what, _, _ in log[0]] == ["enter", "wait", "refused", "exit"]


def test_on_a_thread_that_runs_a_loop_a_plain_call_never_waits():
    log = defaultdict(list)

    async def main():
        with pytest.raises(Refused):
            Pipeline(Recorder(log, 0), Recorder(log, 1, naps=1))(lambda: 1)()

    run(main())
    assert [what for what, _, _ in log[0]] == ["enter", "wait", "abandoned", "exit"]


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize(
    "ending", ["return", "raise", "cancel", "cancel while waiting", "refuse", "time out", "replace"]
)
def test_a_call_leaves_no_reference_cycle(shape, ending):
    """Tokens, waits and errors of a call die with it, and the collector finds nothing of ours."""
    seen = []

    class Spy(Recorder):
        def enter(self, now):
            try:
                token = super().enter(now)
            except Wait as wait:
                seen.append(weakref.ref(wait))
                raise
            return token

        def let_in(self):
            token = super().let_in()
            seen.append(weakref.ref(token))
            return token

        def exit(self, token, now, exc):
            if exc is not None:
                seen.append(weakref.ref(exc))
            super().exit(token, now, exc)

    log = defaultdict(list)
    nap = {"time out": 5.0}.get(ending, 0.0)
    guards = [
        Spy(log, 0),
        CircuitBreaker("b", consecutive_failures=1000),
        Spy(log, 1, naps=1, nap=1.0, breaks=ending == "replace"),
        Timeout("t", 2.0),
        Spy(log, 2, refuses=ending == "refuse"),
    ]
    call = SHAPES[shape](guards, "raise" if ending == "raise" else "return", nap)
    cancel_at = {"cancel while waiting": 0, "cancel": 2}.get(ending, -1)

    async def once():
        with contextlib.suppress(OwnError, Rejected, TimeoutError, Replaced):
            await CancelAt(call(), cancel_at, at_once=False)

    async def main():
        loop = asyncio.get_running_loop()
        task = loop.create_task(once())
        with contextlib.suppress(asyncio.CancelledError):
            await task
        del task
        await asyncio.sleep(0)

    async def scene():
        await main()
        gc.collect()
        seen.clear()
        gc.disable()
        try:
            for _ in range(5):
                await main()
            assert seen
            left = [one() for one in seen if one() is not None]
            assert not left
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            ours = [one for one in gc.garbage if type(one).__module__.startswith(("seawall", __name__))]
            assert not ours
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    run(scene(), start=1000.0)


@pytest.mark.parametrize("shape", [plain, block, generator, permit])
@pytest.mark.parametrize("ending", ["return", "raise", "stop early", "refuse", "can't wait"])
def test_a_plain_call_leaves_no_reference_cycle(shape, ending):
    guards = [SLO("s", target=0.9), CircuitBreaker("b"), Bulkhead("k", max_concurrent=2, max_queued=5)]
    log = defaultdict(list)
    if ending == "refuse":
        guards.append(Recorder(log, 3, refuses=True))
    if ending == "can't wait":
        guards.append(Recorder(log, 3, naps=1))

    async def scene():  # on a loop, where waiting is refused
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                with contextlib.suppress(OwnError, Rejected):
                    shape(guards, ending)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            ours = [one for one in gc.garbage if type(one).__module__.startswith(("seawall", __name__))]
            assert not ours
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    run(scene())


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("ending", ["return", "fail first", "always fail", "stop early"])
def test_a_stream_whose_start_arounds_own_gives_everything_back_at_every_cancellation(ending, at_once):
    async def attempt(step):
        inside = Bulkhead("k", max_concurrent=1, max_queued=1, max_wait=5.0)
        budget = RetryBudget("b", window=None)
        opened, closed = [], []

        @Pipeline(
            Fallback("f", value="instead", on=OwnError),
            Retry("r", on=OwnError, attempts=3, timeout=60.0, wait=1.0, budget=budget, until_first_item=True),
            Chaos("c", latency=1.0, rate=1.0, enabled=True),
            inside,
            Timeout("t", 5.0),
        )
        async def stream():
            opened.append(1)
            try:
                await asyncio.sleep(1)
                if ending == "always fail" or (ending == "fail first" and len(opened) == 1):
                    raise OwnError
                yield 1
                await asyncio.sleep(1)
                yield 2
            finally:
                closed.append(1)
                await asyncio.sleep(0)

        async def consume():
            async with contextlib.aclosing(stream()) as items:
                async for _ in items:
                    if ending == "stop early":
                        break

        victim = CancelAt(consume(), step, at_once=at_once)
        (result,) = await asyncio.gather(in_context(0, victim), return_exceptions=True)
        assert (inside.snapshot().active, inside.snapshot().waiting) == (0, 0)
        assert (budget.snapshot().in_flight, budget.snapshot().extra_in_flight) == (0, 0)
        assert len(opened) == len(closed)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert isinstance(result, asyncio.CancelledError) if victim.reached else result is None, result
        return victim.reached

    async def main():
        step = 0
        while await attempt(step):
            step += 1
        return step

    assert run(main()) >= 3
