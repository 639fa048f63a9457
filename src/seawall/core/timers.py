"""Deadlines of the calls in flight on one event loop, for the price of a dict entry a call.

Calls with an equal delay expire in the order they came, so each delay has its own queue (a dict keeps
insertion order) and one loop timer, set for the earliest head, serves them all. It is armed lazily: a queue
of short calls under a long delay touches the loop about once a delay, not once a call.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import weakref
from asyncio import _get_running_loop
from collections.abc import Callable
from threading import get_ident
from typing import Any, Protocol, cast

from seawall.core import ambient
from seawall.core.protocol import Expiry, SharedExpiry, Token

current_task: Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None]
if sys.version_info < (3, 12):  # there it is written in Python and takes 250 ns
    current_task = asyncio.tasks._current_tasks.get  # type: ignore[attr-defined]
else:
    current_task = asyncio.current_task

_EARLY = 1e-6  # the loop rings up to its clock's resolution early; that is no reason to set another timer
_MANY = 32  # queues; more of them are searched for empty ones, left by delays that no call has any longer


class Expiring(Protocol):
    """Waits in a queue until its time is up."""

    def expire(self) -> None:
        """Time is up."""


Queue = dict[Expiring, float]  # when each is due, in the loop's time


class _Queues(dict[float, Queue]):
    """By delay. Held by the loop's timer that serves them alone: a loop that is closed lets go of the calls in them."""

    __slots__ = ("__weakref__",)


def _no_queues() -> _Queues | None:
    return None


class Timers:
    """The deadline queues of one asyncio event loop; used from that loop's thread only."""

    __slots__ = ("_many", "_queues", "_when", "base", "loop", "time")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.base: Any = loop if isinstance(loop, asyncio.BaseEventLoop) else _Unknown  # has the thread it runs in
        plain = getattr(type(loop), "time", None) is asyncio.BaseEventLoop.time
        self.time = time.monotonic if plain else loop.time  # the same, without a Python call
        self._queues: Callable[[], _Queues | None] = _no_queues  # a weak reference, while a timer is set
        self._many = _MANY
        self._when = float("inf")

    def add(self, one: Expiring, after: float, now: float) -> Queue:
        """Expire `one` in `after` seconds from `now` unless it is deleted from the returned queue before."""
        when = now + after
        queues = self._queues()
        if queues is None:
            queues = _Queues()
            self._queues = weakref.ref(queues)
            self._when = float("inf")
        queue = queues.get(after)
        if queue is None:
            queue = self._new_queue(queues, after)
        queue[one] = when
        if when < self._when:
            self._arm(when, queues)
        return queue

    def _new_queue(self, queues: _Queues, after: float) -> Queue:
        if len(queues) >= self._many:
            for delay in [delay for delay, queue in queues.items() if not queue]:
                del queues[delay]
            self._many = max(_MANY, 2 * len(queues))
        queue = queues[after] = {}
        return queue

    def _arm(self, when: float, queues: _Queues) -> None:
        self._when = when
        self.loop.call_at(when, self._ring, when, queues)

    def _ring(self, when: float, queues: _Queues) -> None:
        if when != self._when:
            return  # set before an earlier one came, which has seen to it
        self._when = float("inf")
        now = self.time() + _EARLY
        for after, queue in list(queues.items()):
            due = []  # found first, deleted later: a dict that keeps losing its head is slow to find the next
            for one, due_at in queue.items():
                if due_at > now:
                    break
                due.append(one)
            for one in due:
                del queue[one]
                one.expire()
            if not queue:
                del queues[after]
        heads = [next(iter(queue.values())) for queue in queues.values() if queue]
        if heads:
            self._arm(min(heads), queues)


class _Unknown:
    _thread_id = None


class _PerThread(threading.local):
    timers: Timers | None = None


_local = _PerThread()


def running_timers() -> Timers | None:
    """The timers of the loop that runs in this thread; None where no asyncio loop does."""
    timers = _local.timers
    if timers is not None and timers.base._thread_id == get_ident():
        return timers
    loop = _get_running_loop()  # on 3.11 a system call
    if loop is None:
        return None
    if timers is None or timers.loop is not loop:
        timers = _local.timers = Timers(loop)
    return timers


def arm(expiry: Expiry, now: float, clock: Callable[[], float]) -> bool:
    """Cancel the current task when `expiry` has come, unless disarmed before. False where no asyncio loop runs.

    `now` is the gate's time by `clock`, which nearly always is the loop's own.
    """
    timers = _local.timers
    if timers is None or timers.base._thread_id != get_ident():
        timers = running_timers()
        if timers is None:
            return False
    task = current_task(timers.loop)
    if task is None:
        raise RuntimeError("a timeout needs a task to cancel: run the call inside a task, not a loop callback")
    after = expiry.after
    if expiry.until is not None:
        left = expiry.left(now)
        if not -_EARLY < left - after < _EARLY:  # (now + after) - now is rarely `after`, and each delay has a queue
            after = left
        show(expiry)
    expiry.task = task
    expiry.cancelling = task.cancelling()
    # One that is over already is added too: cancelling a task that runs may hit it after its call has returned.
    expiry.queue = timers.add(expiry, after, now if clock is timers.time else timers.time())
    return True


def show(expiry: Token) -> None:
    """Let everything the call does see its deadline, where it is one to share."""
    if isinstance(expiry, SharedExpiry) and expiry.until < ambient.deadline.get():
        expiry.limit = ambient.deadline.set(expiry.until)


def disarm(token: Token) -> None:
    """The call is over. If its deadline cancelled it, take that cancellation back."""
    expiry = cast(Expiry, token)
    task = expiry.task
    if task is not None:
        expiry.task = None
        if not expiry.expired:
            expiry.queue.pop(expiry, None)
        elif task.uncancel() > expiry.cancelling:
            expiry.expired = False  # somebody else cancelled it too, and that must win
    if expiry.until is not None:
        hide(expiry)


def hide(expiry: Token) -> None:
    """The deadline that held before holds again."""
    if isinstance(expiry, SharedExpiry) and expiry.limit is not None:
        ambient.deadline.reset(expiry.limit)
        expiry.limit = None
