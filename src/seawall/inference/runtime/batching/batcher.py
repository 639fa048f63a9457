"""Micro-batching: requests that come within a few milliseconds share one run."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from seawall.inference.errors import (
    BackendClosedError,
    BatchQueueFullError,
    DependentRowsError,
    ForkedBackendError,
    InvalidInputError,
    InvalidSettingError,
)

from ..bells import ThreadBell, task_bell
from ..calls import Watchdog, drain_seconds, seconds_of
from ..closing import Closing, abandoned
from ..inputs import Array
from .exactness import Exactness, probe
from .forming import Waiting
from .joining import Layout
from .padding import Padding
from .serving import BatchCounts, Bell, Line, Request, Watch, work

if TYPE_CHECKING:
    from ..backend import Backend

_CURE = (
    "Rows of several users must not share a run of it. Quantize it so that rows stay apart (weights alone, or "
    "static scales), or give isolate=True, which runs each row by itself"
)


class MicroBatcher(Closing):
    """Joins requests that come close together into one run of a stateless model, and takes the outputs apart again.

    For any number of tasks, event loops and threads at once. A request is one row or a few, along axis 0 of every
    input. One that comes while nothing else is there runs at once. Others run once their batch is full, or its oldest
    request has waited `max_delay` seconds; rows of different shapes, or of different buckets of `padding`, do not share
    one.

    What one user sends must not change what another one gets. So at construction the model is tried out: rows alone,
    among others and among outliers. One whose rows depend on their neighbours, as `quantize_dynamic` makes them, is
    refused. A wrong input is refused before it joins; a run that fails is repeated in halves until only the guilty
    request is left to fail; each gets copies of its own rows.

    ```python
    import asyncio

    import numpy as np
    from onnx.parser import parse_model

    from seawall.inference import Backend, MicroBatcher

    text = '<ir_version: 10, opset_import: ["" : 21]> double (float[n, 2] x) => (float[n, 2] y) { y = Add(x, x) }'

    async def main():
        async with Backend.load(parse_model(text).SerializeToString()) as backend:
            async with MicroBatcher(backend, max_size=3, max_delay=10, eager=False) as batcher:
                rows = [np.full((1, 2), number, np.float32) for number in range(3)]
                answers = await asyncio.gather(*(batcher.run({"x": row}) for row in rows))
                print([answer["y"].tolist() for answer in answers], batcher.counts().batches, batcher.exactness.kind)

    asyncio.run(main())
    #> [[[0.0, 0.0]], [[2.0, 2.0]], [[4.0, 4.0]]] 1 bitwise
    ```

    Args:
        backend: the model. It stays the caller's, unless `owns` is given.
        max_size: most rows of one run.
        max_delay: seconds that a request waits for others, at most; 0 joins only what came while a run was at work.
        eager: run a request at once that comes while no other is waiting or running: when traffic is sparse, waiting
            gains nothing. False makes each wait for company.
        max_tokens: most positions of one run, rows times padded length; None for no bound of its own.
        max_queued: most rows that wait at once; one more is refused with BatchQueueFullError.
        padding: how rows of different lengths come to have one; None runs rows of equal shapes together alone.
        workers: runs at once; each may use all of the backend's threads.
        samples: requests like those to come, to try the model out on. Rows are made up without them, which is weaker:
            whole numbers are 0 or 1, and lengths at most the first bucket.
        tolerance: largest difference from the row alone, by the largest magnitude of its output, that is still
            rounding: 1e-4 suits float32, 1e-2 float16.
        isolate: run each row by itself, whatever the trial says; slower, and safe for any model.
        owns: close the backend with this.
        watch: gives a context manager for each run, from the contexts of its requests; it must not raise.
            `seawall.telemetry.batch_span` makes it a span that links to those of its requests.

    Raises:
        DependentRowsError: rows that share a run influence each other.
        InvalidSettingError: a setting outside its range, a model without a free first axis, samples that are needed.

    Attributes:
        exactness: what the trial found; `backend.report()` tells it too.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_size: int = 32,
        max_delay: float | timedelta = 0.002,
        eager: bool = True,
        max_tokens: int | None = None,
        max_queued: int = 1024,
        padding: Padding | None = None,
        workers: int = 1,
        samples: Sequence[Mapping[str, Any]] = (),
        tolerance: float = 1e-4,
        isolate: bool = False,
        owns: bool = False,
        watch: Watch | None = None,
    ) -> None:
        for setting, value in (("max_size", max_size), ("max_queued", max_queued), ("workers", workers)):
            if type(value) is not int or not 1 <= value <= 1_000_000:
                raise InvalidSettingError(f"{setting} must be a whole number from 1 to 1000000, got {value!r}")
        _check_kinds(backend, padding, watch, tolerance)
        layout = Layout(backend.inputs, backend.outputs, padding)
        _check_tokens(max_tokens, padding)
        delay = seconds_of(max_delay, "max_delay")
        if delay < 0:
            raise InvalidSettingError(f"max_delay must be seconds, at least 0, got {max_delay!r}")
        waiting: Waiting[Request] = Waiting(max_size=max_size, max_delay=delay, max_tokens=max_tokens)
        self.name = backend.name
        self.backend = backend
        self.exactness = _tried(backend, layout, samples, waiting, tolerance, isolate=isolate)
        self._layout = layout
        self._waiting = waiting
        self._workers = workers
        self._owns = owns
        self._process = os.getpid()
        self._line = Line(
            self.name,
            backend.run_sync,
            layout,
            waiting,
            max_queued=max_queued,
            isolate=isolate,
            eager=eager,
            watch=watch,
        )
        self._threads: list[threading.Thread] = []
        self._watchdog = Watchdog(f"seawall {self.name} deadlines")
        ends = partial(self._line.close, at_once=True), self._watchdog.stop
        self._dropped = weakref.finalize(self, abandoned, f"the batcher of {self.name!r}", self._process, *ends)
        self._dropped.atexit = False

    async def run(self, inputs: Mapping[str, Array], *, deadline: float | timedelta | None = None) -> dict[str, Array]:
        """The outputs for these rows, out of a run that others may share; on asyncio and on trio.

        The deadline includes the wait for others. A caller that is cancelled leaves its batch at once; when it was the
        last one there, the run ends within one node.

        Raises:
            InvalidInputError: the model does not take these inputs, or they are more than fits in one batch.
            BatchQueueFullError: too many rows wait already.
            RunDeadlineError: the deadline passed first.
            ModelError: the run failed, and would have failed without the others too; or BackendClosedError.
        """
        bell = task_bell()
        request = self._submit(inputs, bell, deadline)
        try:
            await bell.wait()
        except BaseException:
            request.end("cancelled")
            raise
        return request.result()

    def run_sync(self, inputs: Mapping[str, Array], *, deadline: float | timedelta | None = None) -> dict[str, Array]:
        """The same for a plain thread, which blocks; never call it where an event loop runs."""
        bell = ThreadBell()
        request = self._submit(inputs, bell, deadline)
        try:
            bell.wait()
        except BaseException:
            request.end("cancelled")
            raise
        return request.result()

    def counts(self) -> BatchCounts:
        """What it has done so far."""
        return self._line.snapshot()

    @property
    def calls(self) -> int:
        """Requests that are not answered yet."""
        return self._line.in_flight

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._line.closing

    def warm_up(self, inputs: Mapping[str, Array] | None = None) -> float:
        """Warm the backend up, and give the seconds that took."""
        return self.backend.warm_up(inputs)

    def drain(self, timeout: float | timedelta | None = None) -> bool:
        """Take no more requests, run those that wait at once, and wait for them; False if `timeout` was too short.

        Blocks, so on an event loop await it in a thread.
        """
        seconds = drain_seconds(timeout)
        self._refuse_fork()
        self._line.close(at_once=False)
        with self._line.changed:
            return self._line.changed.wait_for(lambda: not self._line.in_flight, seconds)

    def close(self) -> None:
        """End everything within one node, requests with BackendClosedError; `drain` first spares them.

        Blocks until the threads are gone. Closing again does nothing.
        """
        self._dropped.detach()
        if os.getpid() != self._process:
            return
        self._line.close(at_once=True)
        self._watchdog.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._watchdog.join()
        if self._owns:
            self.backend.close()

    def __repr__(self) -> str:
        return f"<MicroBatcher {self.name!r}, {'closed' if self.closed else f'{self.calls} calls'}>"

    def _submit(self, inputs: Mapping[str, Array], bell: Bell, deadline: float | timedelta | None) -> Request:
        self._refuse_fork()
        seconds = None if deadline is None else seconds_of(deadline)
        feed, shape = self._layout.check(inputs)
        most = self._waiting.most_rows(shape.padded)
        if shape.rows > most:
            rule = (
                f"at most {most} rows of {shape.padded} positions" if self._layout.padding else f"at most {most} rows"
            )
            raise InvalidInputError(next(iter(feed)), f"{shape.rows} rows", rule)
        request = Request(self._line, feed, shape, bell, seconds)
        line = self._line
        with line.lock:
            if line.closing:
                raise BackendClosedError(f"the batcher of {self.name!r} is closed: make a new one")
            if line.full(shape.rows):
                line.counts["refused"] += 1
                raise BatchQueueFullError(self.name, line.queued, line.max_queued, line.retry_after())
            self._start_thread()  # first: where the system has no thread to give, nobody would serve the request
            line.add(request)
        if seconds is not None:
            if seconds > 0:
                self._watchdog.watch(request, seconds)
            else:
                request.end("deadline")
        return request

    def _start_thread(self) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) < self._workers:
            thread = threading.Thread(target=work, args=(self._line,), name=f"seawall {self.name} batches", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:
            raise ForkedBackendError(self.name, self._process, os.getpid())


def _check_kinds(backend: object, padding: object, watch: object, tolerance: object) -> None:
    if not hasattr(backend, "run_sync") or not hasattr(backend, "inputs"):
        raise InvalidSettingError(f"backend must be a Backend, got {backend!r}")
    if padding is not None and not isinstance(padding, Padding):
        raise InvalidSettingError(f"padding must be a Padding, or None, got {padding!r}")
    if watch is not None and not callable(watch):
        raise InvalidSettingError(f"watch must be a function of the contexts of requests, or None, got {watch!r}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise InvalidSettingError(f"tolerance must be a share in [0, 1), got {tolerance!r}")


def _check_tokens(max_tokens: int | None, padding: Padding | None) -> None:
    if max_tokens is None:
        return
    if padding is None:
        raise InvalidSettingError(f"max_tokens counts padded positions: give padding too, got {max_tokens!r}")
    if type(max_tokens) is not int or max_tokens < padding.buckets[-1]:
        raise InvalidSettingError(
            f"max_tokens must be a whole number that one row of the last bucket, {padding.buckets[-1]}, fits in, "
            f"got {max_tokens!r}"
        )


def _tried(
    backend: Backend,
    layout: Layout,
    samples: Sequence[Mapping[str, Any]],
    waiting: Waiting[Request],
    tolerance: float,
    *,
    isolate: bool,
) -> Exactness:
    """What the rows of one run do to each other, or DependentRowsError where it is too much."""
    padding = layout.padding
    most = waiting.most_rows(padding.buckets[0] if padding else 1)
    found = probe(backend, layout, samples=samples, most=1 if isolate else most, tolerance=tolerance)
    if isolate and found.kind == "dependent" and not found.runs:
        found = Exactness("bitwise", f"each row runs by itself, for {found.why}")
    if found.kind == "dependent":
        raise DependentRowsError(backend.name, found.why, _CURE)
    backend.exactness = found
    return found
