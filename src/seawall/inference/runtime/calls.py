"""One run of a model, and the two things that may end it early: its caller and its deadline."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

from seawall.inference.errors import InvalidSettingError

_LONGEST = 86_400.0 * 365


class Call:
    """One run: who ends it early, and why. Its run options are its own, since their terminate flag is sticky.

    A call that waits for a worker belongs to whoever claims it first: the worker, to run it, or the one who
    ends it, so that it need not wait for the worker.
    """

    __slots__ = ("_settle", "_unclaimed", "deadline", "done", "options", "queued", "thread", "why")

    def __init__(self, options: Any, deadline: float | None) -> None:
        self.options = options
        self.deadline = deadline
        self.why: str | None = None
        self.done = False
        self.queued = False
        self.thread: int | None = threading.get_ident()  # the one that runs it
        self._unclaimed: list[None] = []
        self._settle: Callable[[], None] | None = None

    def queue(self, settle: Callable[[], None]) -> None:
        """Wait for a worker from now on; `settle` is called by whoever ends the call before it ran."""
        self.thread = None
        self._unclaimed.append(None)
        self._settle = settle
        self.queued = True
        if self.why is not None:  # ended a moment ago, by one who found nothing to settle
            self.end(self.why)

    def finish(self) -> None:
        """It has ended; nothing that it needed is kept alive by those who still watch it."""
        self.done = True
        self._settle = None

    def claim(self) -> bool:
        """True for exactly one of those who ask."""
        try:
            self._unclaimed.pop()  # atomic
        except IndexError:
            return False
        self.thread = threading.get_ident()
        return True

    def end(self, why: str) -> None:
        """End it within one node, or at once if it waits; the first reason counts. Any thread may call this."""
        if self.why is None:
            self.why = why
        self.options.terminate = True
        settle = self._settle
        if settle is not None and self.claim():
            settle()


class Cancellation:
    """Ends a run from another thread: give it to `run_sync`, then call `cancel`.

    Once cancelled it stays so: a run that is given it later ends before its first node.
    """

    __slots__ = ("_call", "_cancelled")

    def __init__(self) -> None:
        self._call: Call | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """End the run within one node; it raises GenerationCancelledError. Any thread may call this, at any time."""
        self._cancelled = True
        call = self._call
        if call is not None:
            call.end("cancelled")

    def bind(self, call: Call | None) -> None:
        """It is for this call from now on; for none with None."""
        self._call = call
        if call is not None and self._cancelled:  # meanwhile, by one who found no call
            call.end("cancelled")


class Expiring(Protocol):
    """What a watchdog ends when its time has come."""

    @property
    def done(self) -> bool: ...  # noqa: D102
    def end(self, why: str) -> None: ...  # noqa: D102


class Watchdog:
    """Ends calls at their deadlines, from a thread that starts with the first deadline and ends with `stop`.

    The event loop's own timers would not do: a loop that is blocked, or a plain thread, has deadlines as well.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Expiring]] = []
        self._order = itertools.count()
        self._roomy = 64
        self._thread: threading.Thread | None = None
        self._stopped = False

    def watch(self, call: Expiring, seconds: float) -> None:
        """End `call` in `seconds`, unless it is done by then."""
        entry = (time.monotonic() + seconds, next(self._order), call)
        with self._changed:
            if len(self._heap) > self._roomy:  # mostly calls that were done long before their deadline
                self._heap = [kept for kept in self._heap if not kept[2].done]
                heapq.heapify(self._heap)
                self._roomy = max(64, 2 * len(self._heap))
            heapq.heappush(self._heap, entry)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            elif self._heap[0] is entry:
                self._changed.notify()

    def stop(self) -> None:
        """Watch nothing any more; the thread ends by itself. Never blocks for long."""
        with self._changed:
            self._stopped = True
            self._heap.clear()
            self._changed.notify()

    def join(self) -> None:
        """Wait for the thread's end."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        while (call := self._next()) is not None:
            call.end("deadline")
            del call

    def _next(self) -> Expiring | None:
        with self._changed:
            while not self._stopped:
                while self._heap and self._heap[0][2].done:
                    heapq.heappop(self._heap)
                wait = self._heap[0][0] - time.monotonic() if self._heap else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._heap)[2]
                self._changed.wait(None if wait is None else min(wait, threading.TIMEOUT_MAX))
        return None


def seconds_of(deadline: float | timedelta, setting: str = "deadline") -> float:
    """A deadline in seconds, at most a year; InvalidSettingError for what is none."""
    seconds: object = deadline.total_seconds() if isinstance(deadline, timedelta) else deadline
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or math.isnan(seconds):
        raise InvalidSettingError(f"{setting} must be a number of seconds, got {deadline!r}")
    return min(float(seconds), _LONGEST)


def drain_seconds(timeout: float | timedelta | None) -> float | None:
    """Seconds to wait for calls in flight, at most a year; None is for ever. InvalidSettingError for anything else."""
    if timeout is None:
        return None
    if (seconds := seconds_of(timeout, "timeout")) < 0:
        raise InvalidSettingError(f"timeout must be 0 seconds or more, got {timeout!r}")
    return seconds
