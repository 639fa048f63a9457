"""Whatever entered exits exactly once, in reverse: over random rows, endings, and a cancellation at every await."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seawall import SLO, Bulkhead, CircuitBreaker, Pipeline, RateLimiter, Rejected, Timeout, Wait


class Recorder:
    """A guard that writes down what happens to it, and misbehaves as told."""

    def __init__(self, log, number, behaviour):
        self.log, self.number, self.behaviour = log, number, behaviour

    def enter(self, now):
        if self.behaviour == "reject":
            raise Rejected("recorder")
        if self.behaviour == "crash on entry":
            raise ZeroDivisionError
        if self.behaviour == "wait":
            raise OneTurn(self)
        return self._entered()

    def _entered(self):
        self.log.append(("enter", self.number))
        return self.number

    def exit(self, token, now, exc):
        assert token == self.number
        self.log.append(("exit", self.number))
        if self.behaviour == "raise on exit":
            raise LookupError(self.number)


class OneTurn(Wait):
    """Sleeps for one turn of the loop, then lets the call in."""

    def __init__(self, guard):
        super().__init__(until=0.0)
        self.guard = guard

    def resume(self, now):
        return self.guard._entered()

    def abandon(self, now):
        self.guard.log.append(("abandon", self.guard.number))


BEHAVIOURS = st.lists(
    st.sampled_from(["pass", "pass", "wait", "reject", "raise on exit", "crash on entry"]), min_size=1, max_size=5
)
ENDINGS = st.sampled_from(["return", "raise", "early close"])
KINDS = st.sampled_from(["call", "stream", "scope"])


def check(log):
    """Each number that entered leaves once, and in the reverse order."""
    stack = []
    for what, number in log:
        if what == "enter":
            stack.append(number)
        elif what == "exit":
            assert stack.pop() == number
    assert stack == []


async def use(row, kind, ending):
    async def body():
        await asyncio.sleep(0)
        if ending == "raise":
            raise ConnectionError
        await asyncio.sleep(0)

    if kind == "call":
        await row(body)()
    elif kind == "scope":
        async with row.scope():
            await body()
    else:

        @row
        async def stream():
            yield 1
            await body()
            yield 2

        items = stream()
        async for _ in items:
            if ending == "early close":
                break
        await items.aclose()


async def run_cancelled_at(row, kind, ending, turn):
    """Run the call in a task that is cancelled before its turn number `turn`; True if it got that far."""
    task = asyncio.ensure_future(use(row, kind, ending))
    for _ in range(turn):
        await asyncio.sleep(0)
    reached = not task.done()
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
    return reached


@settings(deadline=None, max_examples=150)
@given(behaviours=BEHAVIOURS, ending=ENDINGS, kind=KINDS)
def test_whatever_entered_exits_once_in_reverse_wherever_the_call_is_cancelled(behaviours, ending, kind):
    async def main():
        turn, reached = 0, True
        while reached:
            log = []
            row = Pipeline(*(Recorder(log, number, what) for number, what in enumerate(behaviours)))
            reached = await run_cancelled_at(row, kind, ending, turn)
            check(log)
            turn += 1
            assert turn < 60
        return turn

    asyncio.run(main())


@settings(deadline=None, max_examples=60)
@given(order=st.permutations(range(5)), ending=ENDINGS, kind=KINDS, busy=st.booleans())
def test_the_five_guards_hold_nothing_after_a_call_cancelled_at_any_await(order, ending, kind, busy):
    async def main():
        turn, reached = 0, True
        while reached:
            bulkhead = Bulkhead("k", max_concurrent=1, max_queued=4, max_wait=60)
            limiter = RateLimiter("r", rate=1e5, burst=1, max_wait=60)
            breaker, timeout = CircuitBreaker("b", minimum_calls=1000), Timeout("t", 60)
            five = [SLO("s", target=0.9), breaker, bulkhead, limiter, timeout]
            held = bulkhead.admit() if busy else None
            if held:
                asyncio.get_running_loop().call_soon(held.success)
            reached = await run_cancelled_at(Pipeline(*(five[index] for index in order)), kind, ending, turn)
            assert (bulkhead.snapshot().active, bulkhead.snapshot().waiting, limiter.snapshot().waiting) == (0, 0, 0)
            assert breaker.snapshot().probes == 0
            assert len(asyncio.all_tasks()) == 1
            turn += 1
            if turn > 40:  # the limiter's turn comes by the clock, not by the loop
                break

    asyncio.run(main())


@settings(deadline=None)
@given(behaviours=st.lists(st.sampled_from(["pass", "reject", "raise on exit", "crash on entry"]), max_size=5))
@pytest.mark.parametrize("kind", ["plain", "generator", "with", "permit"])
def test_plain_code_leaves_what_it_entered_too(kind, behaviours):
    log = []
    row = Pipeline(*(Recorder(log, number, what) for number, what in enumerate(behaviours)))
    try:
        if kind == "plain":
            row(lambda: None)()
        elif kind == "generator":

            def items():
                yield 1
                yield 2

            half_way = row(items)()
            next(half_way)
            half_way.close()
        elif kind == "with":
            with row.scope():
                pass
        else:
            row.call_sync(len, "")
    except (Rejected, ZeroDivisionError, LookupError):
        pass
    check(log)


def test_an_exit_that_raises_replaces_the_outcome_and_the_others_still_leave():
    log = []
    row = Pipeline(Recorder(log, 0, "pass"), Recorder(log, 1, "raise on exit"), Recorder(log, 2, "pass"))

    @row
    def call():
        raise ConnectionError

    with pytest.raises(LookupError) as caught:
        call()
    assert isinstance(caught.value.__cause__, ConnectionError)
    check(log)


def test_a_dropped_permit_counts_as_abandoned_and_says_so():
    bulkhead = Bulkhead("k", max_concurrent=1)
    with pytest.warns(ResourceWarning, match="permit"):
        bulkhead.admit()
    assert bulkhead.snapshot().active == 0


def test_a_permit_ends_once():
    permit = Bulkhead("k", max_concurrent=1).admit()
    permit.cancel()
    with pytest.raises(RuntimeError, match="once"):
        permit.success()
