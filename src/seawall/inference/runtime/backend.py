"""Any ONNX model in this process, hardened: it serves what was asked for, ends when told to, and says why not."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from seawall.inference.errors import (
    BackendClosedError,
    ForkedBackendError,
    GenerationCancelledError,
    InvalidSettingError,
    ModelError,
    RunDeadlineError,
    RuntimeExhaustedError,
)
from seawall.inference.quality import manifest

from . import loading, memory, ort
from .calls import Call, Cancellation, Watchdog, drain_seconds, seconds_of
from .closing import Closing, abandoned
from .inputs import Array, InputRules, Port
from .outputs import check_finite, narrow_types, wanted
from .providers import CPU, Provider
from .report import Report, build_report
from .threads import available_threads
from .worker import Job, Workers

if TYPE_CHECKING:
    from .batching.exactness import Exactness


class Backend(Closing):
    """An ONNX model in this process, for any number of tasks, event loops and threads at once.

    ```python
    import numpy as np
    import onnx
    from onnx.parser import parse_model

    from seawall.inference import Backend

    text = '<ir_version: 10, opset_import: ["" : 21]> double (float[n] x) => (float[n] y) { y = Add(x, x) }'
    with Backend.load(parse_model(text).SerializeToString()) as backend:
        print(backend.run_sync({"x": np.array([1, 2, 3], dtype=np.float32)}))
    #> {'y': array([2., 4., 6.], dtype=float32)}
    ```

    Made by `load`. Close it, or use it in a `with` or `async with`: one that is dropped gives its threads back
    all the same, with a ResourceWarning.

    Attributes:
        path: the model's file, or None for bytes.
        name: file name of the model, or "model" for bytes.
        inputs: what the model takes.
        outputs: what its runs give.
        threads: threads that a run uses, the calling one included.
        memory_limit: most bytes that weights and runs may hold at once on the CPU, or None.
        room: what the weights leave of them for runs, or None.
        operators: the operators of the model's nodes, as they were handed to their providers.
        finite: whether NaN or infinity in an output is an error.
        exactness: what a `MicroBatcher` found that rows of one run do to each other; None before one was made.
    """

    exactness: Exactness | None = None

    def __init__(
        self,
        opened: ort.Opened,
        *,
        model: str | bytes | ort.InMemory,
        requested: Sequence[tuple[str, Mapping[str, str]]],
        threads: int,
        memory_limit: int | None,
        workers: int,
        digest: str,
        loaded_at: int,
        outputs: Sequence[str] | None = None,
        finite: bool = False,
    ) -> None:
        file = model.path if isinstance(model, ort.InMemory) else model
        self.path = None if isinstance(file, bytes) else Path(file)
        self.name = "model" if isinstance(file, bytes) else Path(file).name
        session = opened.session
        self.inputs = tuple(Port.of(port) for port in session.get_inputs())
        self.outputs = wanted(outputs, tuple(Port.of(port) for port in session.get_outputs()))
        self.threads = threads
        self.memory_limit = memory_limit
        self.room = opened.room
        self.operators = frozenset(node.op_type for node in ort.assigned_nodes(session))
        self.finite = finite
        self._model = model
        self._requested = requested
        self._digest = digest
        self._loaded_at = loaded_at
        self._report: Report | None = None
        self._rules = InputRules(self.inputs, map(Port.of, session.get_overridable_initializers()))
        self._output_names = [port.name for port in self.outputs]
        self._narrow = narrow_types(self.outputs)
        self._session: ort.Session | None = session
        self._process = os.getpid()
        self._closing = False
        self._calls: set[Call] = set()
        self._lock = threading.RLock()  # reentrant: a finaliser or a signal handler may close meanwhile
        self._idle = threading.Condition(self._lock)
        self._workers = Workers(f"seawall {self.name}", workers)
        self._watchdog = Watchdog(f"seawall {self.name} deadlines")
        self._dropped = weakref.finalize(
            self, abandoned, f"backend {self.name!r}", self._process, self._workers.stop, self._watchdog.stop
        )
        self._dropped.atexit = False
        _open.add(self)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | bytes,
        *,
        providers: Sequence[Provider] = (CPU,),
        threads: int | None = None,
        memory_limit: int | None = None,
        workers: int = 1,
        strict: bool = True,
        outputs: Sequence[str] | None = None,
        finite: bool = False,
        check_quality: bool = True,
    ) -> Self:
        """Load an ONNX model; blocks while it reads, so call it in a worker thread where an event loop runs.

        Args:
            model: path of an .onnx file, its external data beside it, or of a folder that holds model.onnx, or the
                bytes of a model. Where the folder's manifest says that weights are stored as 8-bit floats, they are
                expanded once, for the CPU; see `quantize.expand_fp8`. Files must be those that a manifest lists.
            providers: ONNX Runtime's execution providers in order of preference, each a name or (name, options).
            threads: threads of a run, the calling one included. None for as many as affinity and CPU quota allow.
            memory_limit: most bytes that the weights and all runs may hold at once on the CPU. A run that needs
                more raises RuntimeExhaustedError, and the next one is served.
            workers: how many runs of coroutines may be at work at once; `run_sync` runs in its caller.
            strict: refuse to serve other than asked: a provider that is missing, does not start, takes none of
                the nodes, or leaves some to one that is not listed. False warns, and serves with what there is.
            outputs: names of those that runs give; the others cost no copy. None for all.
            finite: refuse to answer with NaN or infinity: NotFiniteOutputError. Costs a pass over the float outputs.
            check_quality: refuse a folder whose recorded scores are out of their gate's bounds; see `quality.record`.

        Raises:
            QualityGateError: the model was measured, and found worse than its gate allows.
            ModelError: CorruptModelError, ProviderError, InvalidSettingError, or RuntimeFailure.
        """
        source, name = loading.source_of(model)
        loaded_at = time.time_ns()
        if not isinstance(source, bytes):
            manifest.check_folder(Path(source).parent, quality=check_quality)
        asked = loading.checked_settings(providers, threads, memory_limit, workers)
        size = ort.shared_threads() or (available_threads() if threads is None else threads)
        ready = loading.readied(source, asked)
        opened = loading.open_model(ready, name, asked, strict=strict, threads=size, memory_limit=memory_limit)
        if opened.room == 0:
            raise InvalidSettingError(f"memory_limit is {memory_limit} bytes, which the weights of {name} fill alone")
        return cls(
            opened,
            model=ready,
            requested=asked,
            threads=size,
            memory_limit=memory_limit,
            workers=workers,
            digest=loading.digest_of(source),
            loaded_at=loaded_at,
            outputs=outputs,
            finite=finite,
        )

    def run_sync(
        self,
        inputs: Mapping[str, Array],
        *,
        deadline: float | timedelta | None = None,
        cancellation: Cancellation | None = None,
    ) -> dict[str, Array]:
        """Run the model in this thread; the GIL is released meanwhile.

        Args:
            inputs: an array for each input.
            deadline: seconds after which the run is ended, within one node. None never ends it.
            cancellation: lets another thread end the run, within one node.

        Returns:
            The outputs by name; bfloat16 and 8-bit floats are of ml_dtypes' types. NaN and infinity in them are the
            model's answer, and pass unless `finite` is set.

        Raises:
            InvalidInputError: the model does not take these inputs; ONNX Runtime has not seen them.
            RunDeadlineError: the deadline passed first.
            GenerationCancelledError: the cancellation came first.
            NotFiniteOutputError: NaN or infinity in an output, where `finite` forbids them.
            ModelError: RuntimeFailure, BackendClosedError or ForkedBackendError.
        """
        feed = self._rules.check(inputs)
        call, session = self._enter(deadline)
        try:
            if cancellation is not None:
                cancellation.bind(call)
            return self._execute(session, call, feed)
        finally:
            if cancellation is not None:
                cancellation.bind(None)
            self._leave(call)

    async def run(self, inputs: Mapping[str, Array], *, deadline: float | timedelta | None = None) -> dict[str, Array]:
        """Run the model in a worker thread; on asyncio and on trio. Arguments and errors are those of `run_sync`.

        The deadline includes the wait for a worker. A caller that is cancelled ends its run within one node, and
        the cancellation leaves once the worker is free again.
        """
        feed = self._rules.check(inputs)
        call, session = self._enter(deadline)
        try:
            job = Job(call, partial(self._execute, session, call, feed), self._leave)
            outcome: dict[str, Array] = await self._workers.run(job)
        except BaseException:
            if not call.queued:  # no worker will ever see it
                self._leave(call)
            raise
        if outcome is None:  # it was ended while it waited for a worker
            raise self._ended(call)
        return outcome

    def warm_up(self, inputs: Mapping[str, Array] | None = None) -> float:
        """Run the model once and give the seconds it took; memory is touched and kernels are prepared by then.

        Without `inputs` it gets the smallest that it takes: zeros, and 1 for every free dimension. Where a
        model does not work on those, give it some of its own.
        """
        start = time.perf_counter()
        self.run_sync(self._rules.sample() if inputs is None else inputs)
        return time.perf_counter() - start

    def shrink(self) -> None:
        """Give memory that no run uses now back to the system. Costs a few ms; the next runs allocate anew."""
        call, session = self._enter(None)
        try:
            ort.shrink(session, self._rules.sample())
            memory.give_back()
        finally:
            self._leave(call)

    def report(self) -> Report:
        """What really serves: provider and kernel of every node. The first one builds the graph a second time."""
        call, session = self._enter(None)
        try:
            known = self._report
            if known is None:
                known = self._report = build_report(
                    self, session, self._model, self._requested, self._digest, self._loaded_at, self._workers.size
                )
            return replace(known, exactness=self.exactness)
        finally:
            self._leave(call)

    @property
    def calls(self) -> int:
        """Runs that are at work, or wait for a worker."""
        return len(self._calls)

    @property
    def closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._closing

    def drain(self, timeout: float | timedelta | None = None) -> bool:
        """Take no more calls, and wait until those in flight have ended; False if `timeout` seconds were too few.

        Blocks, so on an event loop await it in a thread.
        """
        seconds = drain_seconds(timeout)
        self._refuse_fork()
        with self._idle:
            self._closing = True
            return self._idle.wait_for(self._no_others, seconds)

    def close(self) -> None:
        """Let the model go. Runs in flight end within one node with BackendClosedError; `drain` first spares them.

        Blocks until they have ended and the worker threads are gone. Closing again does nothing.
        """
        self._dropped.detach()
        if os.getpid() != self._process:
            return  # the threads to end are in the parent
        with self._idle:
            self._closing = True
            for call in list(self._calls):
                call.end("closed")
        self._workers.stop()
        self._watchdog.stop()
        with self._idle:
            self._idle.wait_for(self._no_others)
        self._workers.join()
        self._watchdog.join()
        self._session = None
        _open.discard(self)
        memory.give_back()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"backend {self.name!r} belongs to this process: load it in each worker, instead of sending it")

    def __repr__(self) -> str:
        return f"<Backend {self.name!r}, {'closed' if self._closing else f'{len(self._calls)} calls'}>"

    def _enter(self, deadline: float | timedelta | None) -> tuple[Call, ort.Session]:
        self._refuse_fork()
        seconds = None if deadline is None else seconds_of(deadline)
        call = Call(ort.run_options(), seconds)
        with self._lock:
            if self._closing:
                raise BackendClosedError(f"backend {self.name!r} is closed: load a new one")
            self._calls.add(call)
            session = self._session
        if seconds is not None:
            if seconds > 0:
                self._watchdog.watch(call, seconds)
            else:
                call.end("deadline")
        return call, session

    def _leave(self, call: Call) -> None:
        call.finish()
        with self._lock:
            self._calls.discard(call)
            if self._closing:
                self._idle.notify_all()

    def _execute(self, session: ort.Session, call: Call, feed: dict[str, Any]) -> dict[str, Array]:
        """One run; a second one where memory ran out, since under a limit free memory may lie in pieces."""
        for last in (self.memory_limit is None, True):
            try:
                if self._narrow:
                    answer = ort.run_narrow(session, self._output_names, self._narrow, feed, call.options)
                else:
                    answer = session.run(self._output_names, feed, call.options)
            except ort.EXCEPTIONS as error:
                failure = ort.typed(f"running {self.name}", error)
                if isinstance(failure, GenerationCancelledError):
                    raise self._ended(call) from None
                if last or not isinstance(failure, RuntimeExhaustedError):
                    raise failure from error
            else:
                outputs = dict(zip(self._output_names, answer, strict=True))
                if self.finite:
                    check_finite(self.name, outputs, self._narrow)
                return outputs
            ort.shrink(session, feed)
            memory.give_back()
        raise AssertionError("unreachable")

    def _ended(self, call: Call) -> ModelError:
        if call.why == "deadline" and call.deadline is not None:
            return RunDeadlineError(call.deadline)
        if call.why == "closed":
            return BackendClosedError(f"backend {self.name!r} was closed during the run")
        return GenerationCancelledError(f"the run of {self.name!r} was cancelled")

    def _no_others(self) -> bool:
        """Whether no call is in flight but those that this very thread, a signal handler perhaps, interrupts."""
        here = threading.get_ident()
        return all(call.thread == here for call in self._calls)

    def _refuse_fork(self) -> None:
        if os.getpid() != self._process:
            raise ForkedBackendError(self.name, self._process, os.getpid())


_open: weakref.WeakSet[Backend] = weakref.WeakSet()


@atexit.register
def _close_open() -> None:
    """End the runs of daemon threads before the interpreter goes; ONNX Runtime aborts the process otherwise."""
    for backend in list(_open):
        backend.close()


def _keep_inherited() -> None:
    """In a forked child: never destroy an inherited session, for that waits for threads which are not here."""
    import ctypes

    for backend in list(_open):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend._session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)
