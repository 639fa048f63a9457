"""The deadlines of one event loop: in order, from one loop timer, and forgotten when they are over."""

from __future__ import annotations

import asyncio

from seawall import Deadline
from seawall.core.gate import use_clock
from seawall.core.timers import running_timers
from seawall.testing import run


class Call:
    def __init__(self, heard, name=""):
        self.heard, self.name = heard, name

    def expire(self):
        self.heard.append((self.name, asyncio.get_running_loop().time()))


def test_deadlines_come_when_they_are_due_whatever_the_order_they_were_set_in():
    heard = []

    async def main():
        timers = running_timers()
        start = timers.time()
        for name, after in (("a", 3.0), ("b", 1.0), ("c", 3.0), ("d", 2.0)):
            timers.add(Call(heard, name), after, start)
        queue = timers.add(called_off := Call(heard, "off"), 1.5, start)
        del queue[called_off]
        await asyncio.sleep(10)
        return start

    start = run(main())
    assert [(name, round(at - start, 6)) for name, at in heard] == [("b", 1.0), ("d", 2.0), ("a", 3.0), ("c", 3.0)]


def test_equal_deadlines_in_a_row_share_one_loop_timer(monkeypatch):
    heard, asked = [], []

    async def main():
        loop, timers = asyncio.get_running_loop(), running_timers()
        call_at = loop.call_at
        monkeypatch.setattr(
            loop, "call_at", lambda when, *rest, **more: asked.append(when) or call_at(when, *rest, **more)
        )
        start = timers.time()
        for _ in range(1000):
            timers.add(Call(heard), 5.0, start)
        assert asked == [start + 5.0]
        await asyncio.sleep(6)

    run(main())
    assert len(heard) == 1000


def test_a_delay_that_no_call_has_any_longer_leaves_no_queue_behind():
    async def main():
        timers = running_timers()
        timers.add(Call([]), 1.0, timers.time())
        await asyncio.sleep(2)
        assert not timers._queues()
        for number in range(1000):  # a delay each, called off at once
            call = Call([])
            timers.add(call, 10.0 + number, timers.time()).pop(call)
            assert len(timers._queues()) <= 32
        held = [Call([]) for _ in range(100)]
        for number, call in enumerate(held):
            timers.add(call, 5000.0 + number, timers.time())
        assert sum(map(len, timers._queues().values())) == 100

    run(main())


def test_calls_under_one_deadline_share_a_queue_though_sums_of_floats_round():
    clock = Scripted([1.2**number for number in range(50)])  # from 1 s to 2 h
    assert len({(now + 0.1) - now for now in clock.moments}) > 1
    page = Deadline("page", 0.1)
    delays = set()

    @page
    async def look():
        delays.update(running_timers()._queues())

    async def main():
        for _ in range(50):
            await look()

    with use_clock(clock):
        asyncio.run(main())
    assert delays == {0.1}


class Scripted:
    """Tells each moment twice: as a call begins, and as it ends."""

    def __init__(self, moments):
        self.moments = moments
        self._told = iter([moment for moment in moments for _ in range(2)])

    def __call__(self):
        return next(self._told)
