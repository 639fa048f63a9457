"""Deadlines of the calls in flight on one event loop, for the price of a dict entry a call.

Calls with an equal delay expire in the order they came, so each delay has its own queue (a dict keeps
insertion order) and one loop timer, set for the earliest head, serves them all. It is armed lazily: a queue
of short calls under a long delay touches the loop about once a delay, not once a call.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio import _get_running_loop, current_task
from typing import Protocol

from seawall.core.protocol import Deadline

_EARLY = 1e-6  # the loop rings up to its clock's resolution early; that is no reason to set another timer


class Expiring(Protocol):
    """Waits in a queue until its time is up."""

    def expire(self) -> None:
        """Time is up."""


Queue = dict[Expiring, float]  # when each is due, in the loop's time


class Timers:
    """The deadline queues of one asyncio event loop; used from that loop's thread only."""

    __slots__ = ("_handle", "_queues", "_when", "loop", "time")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.time = loop.time
        self._queues: dict[float, Queue] = {}
        self._handle: asyncio.TimerHandle | None = None
        self._when = float("inf")

    def add(self, one: Expiring, after: float) -> Queue:
        """Expire `one` in `after` seconds unless it is deleted from the returned queue before."""
        when = self.time() + after
        queue = self._queues.get(after)
        if queue is None:
            queue = self._queues[after] = {}
        queue[one] = when
        if when < self._when:
            self._arm(when)
        return queue

    def _arm(self, when: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._when = when
        self._handle = self.loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._handle, self._when = None, float("inf")
        now = self.time() + _EARLY
        for after, queue in list(self._queues.items()):
            due = []  # found first, deleted later: a dict that keeps losing its head is slow to find the next
            for one, when in queue.items():
                if when > now:
                    break
                due.append(one)
            for one in due:
                del queue[one]
                one.expire()
            if not queue:
                del self._queues[after]
        heads = [next(iter(queue.values())) for queue in self._queues.values()]
        if heads:
            self._arm(min(heads))


class _PerThread(threading.local):
    timers: Timers | None = None


_local = _PerThread()


def timers_of(loop: asyncio.AbstractEventLoop) -> Timers:
    """The timers of the loop that runs in this thread."""
    timers = _local.timers
    if timers is None or timers.loop is not loop:
        timers = _local.timers = Timers(loop)
    return timers


def arm(deadline: Deadline) -> bool:
    """Cancel the current task when `deadline` has come, unless disarmed before. False where no asyncio loop runs."""
    loop = _get_running_loop()
    if loop is None:
        return False
    task = current_task(loop)
    if task is None:
        raise RuntimeError("a timeout needs a task to cancel: run the call inside a task, not a loop callback")
    deadline.task = task
    deadline.cancelling = task.cancelling()
    deadline.queue = timers_of(loop).add(deadline, deadline.after)
    return True


def disarm(deadline: Deadline) -> None:
    """The call is over. If its deadline cancelled it, take that cancellation back."""
    task, queue = deadline.task, deadline.queue
    deadline.task = deadline.queue = None
    if not deadline.expired:
        if queue is not None:
            queue.pop(deadline, None)
    elif task is not None and task.uncancel() > deadline.cancelling:
        deadline.expired = False  # somebody else cancelled it too, and that must win
