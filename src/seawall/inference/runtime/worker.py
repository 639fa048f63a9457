"""The threads that run a model for coroutines, so that no event loop ever does."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any

import anyio

from seawall.inference.errors import BackendClosedError, RuntimeInterruptedError

from .bells import task_bell
from .calls import Call

Outcome = Any


class Job:
    """A call of a coroutine, on its way through a worker."""

    __slots__ = ("_context", "_error", "_finished", "_outcome", "_work", "bell", "call", "done")

    def __init__(self, call: Call, work: Callable[[], Outcome], finished: Callable[[Call], None]) -> None:
        self.call = call
        self.bell = task_bell()
        self.done = False
        self._finished = finished
        self._work: Callable[[], Outcome] | None = work
        self._context: contextvars.Context | None = contextvars.copy_context()  # spans of the caller reach the thread
        self._outcome: Outcome = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """In a worker. Whatever is thrown into the thread ends the job, not the worker."""
        try:
            if self._context is not None and self._work is not None:
                self._outcome = self._context.run(self._work)
        except Exception as error:
            self._error = error
        except BaseException as error:
            self.interrupted(error)
            return
        self.settle()

    def interrupted(self, error: BaseException) -> None:
        """The job's thread was told to end."""
        self._error = RuntimeInterruptedError("running the model", error)
        self._error.__cause__ = error
        self.settle()

    def settle(self) -> None:
        """The job has ended, or never starts. Sets `done` before it rings: who hangs up a bell looks there.

        It holds nobody's backend when it rings: a worker would drop the last reference, some time later.
        """
        finished, self._finished = self._finished, _nothing
        self._work = self._context = None
        self.done = True
        finished(self.call)
        del finished
        self.bell.ring()

    def ended(self) -> bool:
        """Whether it is done, asked anew: another thread may have done it."""
        return self.done

    def result(self) -> Outcome:
        """What the work returned, or raised."""
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error
        return self._outcome


def _nothing(call: Call) -> None: ...


_Jobs = queue.SimpleQueue[Job | None]


class Workers:
    """Run jobs in the order they came, at most `size` at once, from any number of loops.

    Threads start as they are needed and end with `stop`. They hold the queue alone, so that whoever holds
    this may be collected, and stop it then.
    """

    def __init__(self, name: str, size: int) -> None:
        self.size = size
        self._name = name
        self._jobs: _Jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._changing = threading.RLock()  # reentrant: a finaliser may stop it at any moment
        self._stopped = False

    async def run(self, job: Job) -> Outcome:
        """The result of the job.

        When the caller is cancelled, the call is ended, and the cancellation leaves here only once it did:
        nothing runs behind the caller's back.
        """
        self._submit(job)
        try:
            await job.bell.wait()
        except GeneratorExit:  # the event loop is gone; nobody can wait
            job.call.end("cancelled")
            raise
        except BaseException:
            job.call.end("cancelled")
            await _settled(job)
            raise
        return job.result()

    def _submit(self, job: Job) -> None:
        with self._changing:
            if self._stopped:
                raise BackendClosedError(f"{self._name} is closed")
            job.call.queue(job.settle)
            self._jobs.put(job)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if len(self._threads) < self.size:
                thread = threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def stop(self) -> None:
        """Take no more jobs; the threads end after those they have. Never blocks, so a finaliser may call it."""
        with self._changing:
            if not self._stopped:
                self._stopped = True
                for _ in self._threads:
                    self._jobs.put(None)

    def join(self) -> None:
        """Wait for the threads' end; for all but the caller's own."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()


def _work(jobs: _Jobs) -> None:
    while True:
        job: Job | None = None  # and a waiting thread keeps no caller's objects
        try:
            job = jobs.get()
            if job is None:
                return
            if job.call.claim():
                job.run()
        except BaseException as error:  # thrown in from outside, around a job: it ends, the worker goes on
            if job is not None and not job.done:
                job.interrupted(error)


async def _settled(job: Job) -> None:
    """Return once the job has ended, whoever cancels us meanwhile."""
    with anyio.CancelScope(shield=True):
        while not job.done:
            bell = job.bell = task_bell()
            if job.ended():  # meanwhile, and it rang the bell we hung up before
                return
            try:
                await bell.wait()
            except GeneratorExit:
                raise
            except BaseException:  # noqa: S112 - cancelled again; the first cancellation is on its way
                continue
