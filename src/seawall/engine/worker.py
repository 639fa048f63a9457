"""The thread that runs a model's steps, so that the event loop never does."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import anyio

from seawall.core.sleeping import async_sleeper

T = TypeVar("T")


class WorkerClosedError(RuntimeError):
    """The worker was closed and takes no more jobs."""


class _Job(Generic[T]):
    """One step, asked for by one task."""

    def __init__(self, work: Callable[[], T], ring: Callable[[], bool]) -> None:
        self._work = work
        self._context = contextvars.copy_context()  # spans and deadlines of the caller reach the thread
        self.ring = ring
        self.done = False
        self._result: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result.append(self._context.run(self._work))
        except BaseException as error:
            self._error = error
        self.done = True  # before the ring: a caller that changes its ring looks here afterwards
        self.ring()

    def result(self) -> T:
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error
        return self._result[0]


_Jobs = queue.SimpleQueue[_Job[object] | None]


class Worker:
    """Runs jobs one after another in one thread, in the order they were asked for, from any number of loops.

    The thread starts with the first job and ends with `stop` or `close`. It holds the jobs alone, so that whoever
    holds the worker may be collected, and stop it then.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: _Jobs = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()  # not the other, which a finaliser in the new thread may want
        self._changing = threading.RLock()  # re-entrant, for a finaliser may stop us at any allocation
        self._stopped = False

    async def run(self, work: Callable[[], T], cancel: Callable[[], object] | None = None) -> T:
        """The result of `work`, or its error; `WorkerClosedError` if it can't run any more.

        When the caller is cancelled, `cancel` is called (it should cut `work` short) and the cancellation is raised
        only once `work` has ended, so nothing runs behind the caller's back.
        """
        sleeper = async_sleeper()
        job = _Job(work, sleeper.ring)
        self._submit(job)
        try:
            await sleeper.sleep(float("inf"))
        except GeneratorExit:  # the event loop is gone; nobody can wait for the work
            if cancel is not None:
                cancel()
            raise
        except BaseException:
            if cancel is not None:
                cancel()
            await _settled(job)
            raise
        return job.result()

    def _submit(self, job: _Job[T]) -> None:
        with self._starting:
            if self._thread is None and not self._stopped:
                thread = threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True)
                thread.start()
                self._thread = thread
        with self._changing:
            if self._stopped:
                raise WorkerClosedError(f"worker {self._name!r} is closed")
            self._jobs.put(job)  # type: ignore[arg-type]

    def stop(self) -> None:
        """Take no more jobs; the thread ends after those it has. Never blocks, so a finaliser may call it."""
        with self._changing:
            if not self._stopped:
                self._stopped = True
                self._jobs.put(None)

    def close(self) -> None:
        """Stop, and block until the thread has ended. In the thread itself, where that can't be, only stop."""
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # a waiting thread must not keep the last caller's objects


async def _settled(job: _Job[T]) -> None:
    """Return once `job` has ended, whoever cancels us meanwhile."""
    with anyio.CancelScope(shield=True):
        while not _ended(job):
            sleeper = async_sleeper()
            job.ring = sleeper.ring
            if _ended(job):  # meanwhile, and it rang the bell we hung up before
                return
            try:
                await sleeper.sleep(float("inf"))
            except GeneratorExit:
                raise
            except BaseException:  # noqa: S112 - cancelled again; the first cancellation is on its way
                continue


def _ended(job: _Job[T]) -> bool:
    return job.done
