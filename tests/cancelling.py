"""A cancellation at each await in turn."""

from __future__ import annotations

import asyncio
import itertools


class CancelAt:
    """Awaits `coro`, and has the task cancelled at its suspension number `step`.

    With `at_once` before it goes to sleep there, else just after.
    """

    def __init__(self, coro, step, *, at_once=True):
        self.coro, self.step, self.at_once, self.reached = coro, step, at_once, False

    def __await__(self):
        inner = self.coro.__await__()
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        send, value = inner.send, None
        for step in itertools.count():
            try:
                future = send(value)
            except StopIteration as stop:
                return stop.value
            finally:
                value = None  # an error here and its traceback would be a cycle of our own
            if step == self.step:
                self.reached = True
                if self.at_once:
                    task.cancel()
                else:
                    loop.call_soon(task.cancel)
            try:
                value, send = (yield future), inner.send
            except BaseException as exc:
                value, send = exc, inner.throw
