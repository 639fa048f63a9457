"""The thread that serves batches, and what it shares with those who ask and those who give up."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from seawall.inference.errors import (
    BackendClosedError,
    ForkedBackendError,
    GenerationCancelledError,
    ModelError,
    RunDeadlineError,
    RuntimeDeviceError,
    RuntimeExhaustedError,
    RuntimeInterruptedError,
)

from ..calls import Cancellation
from .forming import Waiting
from .joining import Feed, Layout, Shape

_NOBODYS_FAULT = (RuntimeDeviceError, RuntimeInterruptedError, BackendClosedError, ForkedBackendError)

Watch = Callable[[Sequence[Context]], AbstractContextManager[object]]  # a run, by the contexts of its requests


class Bell(Protocol):
    """Wakes whoever waits for a request."""

    def ring(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """What a batcher has done; all but `queued` and `running` only grow.

    Attributes:
        requests: requests that were taken.
        refused: requests that were not, since the queue was full.
        left: requests that were given up, by cancellation or deadline, before they were answered.
        failed: requests that ended with an error of the model.
        batches: runs of the model.
        rows: rows that were run.
        repeated: runs that were made again in halves, to find the request that made a batch fail.
        positions: rows times padded length, of all runs.
        padding: those of them that were padding.
        waited: seconds that requests spent in the queue, in all.
        ran: seconds that runs took, in all.
        queued: rows that wait now.
        running: requests whose batch runs now.
    """

    requests: int = 0
    refused: int = 0
    left: int = 0
    failed: int = 0
    batches: int = 0
    rows: int = 0
    repeated: int = 0
    positions: int = 0
    padding: int = 0
    waited: float = 0.0
    ran: float = 0.0
    queued: int = 0
    running: int = 0


class Run:
    """A run of the model for some requests; it ends when the last of them has left."""

    __slots__ = ("cancellation", "members")

    def __init__(self, members: Sequence[Request]) -> None:
        self.cancellation = Cancellation()
        self.members = set(members)


class Request:
    """One request, from its arrival until it is answered or given up. Changed with the line's lock held."""

    __slots__ = (
        "_line",
        "arrived",
        "bell",
        "context",
        "deadline",
        "done",
        "error",
        "feed",
        "outputs",
        "patience",
        "run",
        "shape",
        "waiting",
    )

    def __init__(self, line: Line, feed: Feed, shape: Shape, bell: Bell, deadline: float | None) -> None:
        self._line = line
        self.feed: Feed | None = feed
        self.shape = shape
        self.bell = bell
        self.deadline = deadline
        self.arrived = time.monotonic()
        self.patience = math.inf
        self.waiting = False
        self.run: Run | None = None
        self.done = False
        self.outputs: Feed = {}
        self.error: BaseException | None = None
        self.context = copy_context() if line.watch is not None else None

    def end(self, why: str) -> None:
        """Give it up; from any thread. `why` is "deadline", "cancelled" or "closed"."""
        self._line.leave(self, why)

    def result(self) -> Feed:
        """The answer, or the error, once it is done."""
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error
        return self.outputs


class Line:
    """The requests of one batcher, and the lock over them. Threads hold no more, so the batcher can be dropped."""

    def __init__(
        self,
        name: str,
        run: Callable[..., Feed],
        layout: Layout,
        waiting: Waiting[Request],
        *,
        max_queued: int,
        isolate: bool,
        eager: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.name = name
        self.layout = layout
        self.isolate = isolate
        self.eager = eager
        self.watch = watch
        self.max_queued = max_queued
        self.lock = threading.RLock()  # reentrant: a signal handler may close meanwhile
        self.changed = threading.Condition(self.lock)
        self.counts = dict.fromkeys(
            ("requests", "refused", "left", "failed", "batches", "rows", "repeated", "positions", "padding"), 0
        )
        self.waited = self.ran = 0.0
        self.closing = False  # no new requests, and those that wait are due at once
        self.stopped = False
        self._run = run
        self._waiting = waiting
        self._running: set[Request] = set()
        self._recent: float | None = None  # seconds of a run, lately

    @property
    def queued(self) -> int:
        """Rows that wait."""
        return self._waiting.rows

    @property
    def in_flight(self) -> int:
        """Requests that are not done."""
        return self._waiting.requests + len(self._running)

    def full(self, rows: int) -> bool:
        """Whether so many more rows are too many; an idle line takes any request that fits in one batch."""
        return self._waiting.rows > 0 and self._waiting.rows + rows > self.max_queued

    def retry_after(self) -> float | None:
        """Seconds until those that wait now have run, as far as one knows."""
        if self._recent is None:
            return None
        return self._recent * math.ceil(self._waiting.rows / self._waiting.max_size)

    def add(self, request: Request) -> None:
        """Take a request in; with the lock held."""
        request.waiting = True
        if self.eager and not self.in_flight:
            request.patience = 0.0
        self.counts["requests"] += 1
        if self._waiting.add(request):
            self.changed.notify()

    def leave(self, request: Request, why: str) -> None:
        """A request is given up. When it was the last of its run, the run ends within one node."""
        with self.lock:
            if request.done:
                return
            self.counts["left"] += 1
            error: ModelError
            if why == "deadline":
                error = RunDeadlineError(request.deadline or 0.0)
            elif why == "closed":
                error = BackendClosedError(f"the batcher of {self.name!r} was closed before the answer")
            else:
                error = GenerationCancelledError(f"the request to {self.name!r} was cancelled")
            run = request.run
            self._settle(request, error=error)
            if run is not None and not run.members:
                run.cancellation.cancel()

    def close(self, *, at_once: bool) -> None:
        """Take nothing new; `at_once` gives up what is there as well, and ends the threads."""
        with self.lock:
            self.closing = True
            self._waiting.max_delay = 0.0
            if at_once:
                self.stopped = True
                for request in [*self._waiting.all(), *self._running]:
                    self.leave(request, "closed")
            self.changed.notify_all()

    def next(self) -> list[Request] | None:
        """The next batch, once it is due; None when it is time to end."""
        with self.changed:
            while not self.stopped:
                now = time.monotonic()
                taken = self._waiting.take(now)
                if taken:
                    for request in taken:
                        request.waiting = False
                        self.waited += now - request.arrived
                        self._running.add(request)
                    return taken
                seconds = self._waiting.due() - now
                self.changed.wait(None if seconds == math.inf else min(max(0.0, seconds), threading.TIMEOUT_MAX))
        return None

    def serve(self, requests: Sequence[Request]) -> None:
        """Run a batch and answer its requests. Where it fails, its halves run again: the guilty fail alone."""
        with self.lock:
            live = [request for request in requests if not request.done]
            if not live:
                return
            run = Run(live)
            for request in live:
                request.run = run
            feeds = [request.feed for request in live if request.feed is not None]
        shapes = [request.shape for request in live]
        start = time.monotonic()
        try:
            with self._watched(live):
                answers = self._answers(feeds, shapes, run.cancellation)
        except (ModelError, MemoryError) as error:
            del feeds
            self._failed(
                live, RuntimeExhaustedError("joining a batch", error) if isinstance(error, MemoryError) else error
            )
            return
        self._count(shapes, time.monotonic() - start)
        with self.lock:
            for request, answer in zip(live, answers, strict=True):
                self._settle(request, outputs=answer)

    def _watched(self, live: Sequence[Request]) -> AbstractContextManager[object]:
        if self.watch is None:
            return nullcontext()
        return self.watch([request.context for request in live if request.context is not None])

    def interrupted(self, requests: Sequence[Request], error: BaseException) -> None:
        """The thread was told to end in the middle of a batch."""
        failure = RuntimeInterruptedError("running a batch", error)
        failure.__cause__ = error
        self._fail(requests, failure)

    def _answers(self, feeds: Sequence[Feed], shapes: Sequence[Shape], cancellation: Cancellation) -> list[Feed]:
        if not self.isolate:
            joined = self.layout.join(feeds, shapes[0].padded)
            return self.layout.split(self._run(joined, cancellation=cancellation), shapes)
        found = []
        for feed, shape in zip(feeds, shapes, strict=True):
            one = shape._replace(rows=1)
            parts = []
            for row in range(shape.rows):
                joined = self.layout.join([{name: array[row : row + 1] for name, array in feed.items()}], shape.padded)
                parts += self.layout.split(self._run(joined, cancellation=cancellation), [one])
            found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        return found

    def _failed(self, live: Sequence[Request], error: ModelError) -> None:
        if len(live) == 1 or isinstance(error, (*_NOBODYS_FAULT, GenerationCancelledError)):
            self._fail(live, error)
            return
        with self.lock:
            self.counts["repeated"] += 1
            for request in live:
                request.run = None  # who leaves now leaves no run
        half = len(live) // 2
        del error  # its traceback holds this frame
        self.serve(live[:half])
        self.serve(live[half:])

    def _fail(self, requests: Sequence[Request], error: ModelError) -> None:
        with self.lock:
            first = True
            for request in requests:
                if not request.done:
                    self.counts["failed"] += 1
                    self._settle(request, error=error if first else _another(error))
                    first = False

    def _settle(self, request: Request, *, outputs: Feed | None = None, error: BaseException | None = None) -> None:
        """The one place that ends a request; with the lock held."""
        if request.done:
            return
        request.done = True
        request.outputs = outputs or {}
        request.error = error
        request.feed = request.context = None
        if request.waiting:
            request.waiting = False
            self._waiting.discard(request)
        self._running.discard(request)
        if request.run is not None:
            request.run.members.discard(request)
            request.run = None
        if self.closing:
            self.changed.notify_all()
        request.bell.ring()

    def _count(self, shapes: Sequence[Shape], seconds: float) -> None:
        with self.lock:
            self.ran += seconds
            self._recent = seconds if self._recent is None else 0.8 * self._recent + 0.2 * seconds
            self.counts["batches"] += 1
            for shape in shapes:
                self.counts["rows"] += shape.rows
                self.counts["positions"] += shape.rows * shape.padded
                self.counts["padding"] += shape.rows * (shape.padded - shape.length)

    def snapshot(self) -> BatchCounts:
        """The counts at one moment."""
        with self.lock:
            return BatchCounts(
                **self.counts, waited=self.waited, ran=self.ran, queued=self.queued, running=len(self._running)
            )


def work(line: Line) -> None:
    """A thread's life. What is thrown into it ends a batch, not the thread."""
    while True:
        requests: list[Request] | None = []
        try:
            requests = line.next()
            if requests is None:
                return
            line.serve(requests)
        except BaseException as error:
            line.interrupted(requests or (), error)


def _another(error: ModelError) -> ModelError:
    """The same error again: raised in several tasks at once, one object would collect the tracebacks of all."""
    copy = type(error).__new__(type(error))
    copy.args = error.args
    vars(copy).update(vars(error))
    copy.__cause__ = error.__cause__
    return copy
