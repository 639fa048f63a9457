"""The thread that drives an engine's steps, and how callers in any other thread get theirs from it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from contextvars import Context
from typing import TYPE_CHECKING

from seawall.core import answering, events, gate
from seawall.core.ambient import current_priority, deadline
from seawall.engine.admission import Admission, Ticket
from seawall.engine.answers import Piece, Usage
from seawall.engine.calls import Call, Reader, Sample
from seawall.engine.errors import EngineClosedError, EngineDrainingError, StepStuckError
from seawall.engine.generations import Signal
from seawall.engine.stepping import Advance, Row, Stepper, Wanted
from seawall.engine.watched_steps import WatchedSteps
from seawall.inference.errors import (
    GenerationCancelledError,
    InvalidSettingError,
    NoRoomError,
    RuntimeExhaustedError,
)

if TYPE_CHECKING:
    from seawall.engine.metering import EngineMeter, EngineSnapshot
    from seawall.engine.settings import AnswerSettings
    from seawall.inference.generate.sequence import Step

_REGROWS = 5.0  # seconds after which a row more is tried, where memory ran out
_LAST = 1.0  # seconds that closing grants a thread that was given up
_LOOKS = 0.1  # seconds between looks at the memory
_GLANCE = 0.05  # seconds between looks at a queue whose head does not fit, for those whose time is up


class Scheduler:
    """Takes calls from any thread, decides who gets a row, steps all rows, hands out what comes of it.

    Its thread ends with `close`. Rows are touched by that thread alone. The queue is shared under a lock that is held
    for microseconds.

    Args:
        name: of the engine.
        stepper: advances the answers.
        admission: decides who is next; its clock is the gate's.
        meter: counts, and tells listeners.
        step_timeout: seconds that a step may take.
    """

    def __init__(
        self, name: str, stepper: Stepper, admission: Admission, meter: EngineMeter, *, step_timeout: float
    ) -> None:
        self.name = name
        self.stepper = stepper
        self.step_timeout = step_timeout
        self.patience = step_timeout / 8  # seconds between a waiting caller's looks, so how late a step is stopped
        self._given_up: tuple[str, BaseException | None] | None = None  # why, if it was
        self._admission = admission
        self._most_rows = admission.rows
        self._grows_at = 0.0
        self._meter = meter
        self._lock = threading.RLock()  # re-entrant, for a finaliser may ask for a snapshot at any allocation
        self._inbox: queue.SimpleQueue[Call | None] = queue.SimpleQueue()  # put into by finalisers too: takes no lock
        self._calls: set[Call] = set()
        self._tickets: dict[Ticket, Sample] = {}  # those that wait
        self._rows: dict[Row, Sample] = {}
        self._memory = stepper.memory()
        self._looks_at = 0.0
        self._steps = WatchedSteps(stepper, step_timeout, meter)
        self._stopping = False
        self._draining = False
        self._idle = Signal()  # draining, and no call is left
        self._thread = threading.Thread(target=self._run, name=f"seawall-{name}-steps", daemon=True)
        self._thread.start()  # here, where no lock is held: a finaliser in it may ask for a snapshot

    # Callers, in any thread

    def submit(self, prompt: list[int], settings: AnswerSettings, room: int) -> Reader:
        """Queue the samples of a call that may write `room` tokens each, all or none.

        Raises:
            Rejected: there is no room in the queue, no time left, or the engine drains.
            InvalidSettingError: they could never fit.
            EngineClosedError, StepStuckError: nobody would serve them.
        """
        self._check(prompt, settings)
        now, most, level = gate.now(), min(settings.max_tokens, room), int(current_priority.get())
        call = Call(self.wake, self.abandon)
        for index in range(settings.n):
            ticket = Ticket(len(prompt), most, level, settings.tenant, deadline.get())
            call.add(Wanted(prompt, settings, index), ticket)
        with self._lock:
            if self._stopping:
                raise self._end_of_all()
            if self._draining:
                raise EngineDrainingError(self.name)
            victims = self._admission.offer([sample.ticket for sample in call.samples], now)
            self._calls.add(call)
            self._tickets.update((sample.ticket, sample) for sample in call.samples)
            displaced = [self._tickets.pop(victim) for victim in victims]
            refusals = [self._admission.full() for _ in displaced]
        for sample, error in zip(displaced, refusals, strict=True):
            sample.call.fail(error)
            self._inbox.put(sample.call)
        self.wake()
        return Reader(call)

    def abandon(self, call: Call) -> None:
        """Nobody reads a call's answers any more: its rows are free within a step. Never blocks."""
        self._inbox.put(call)
        self.stepper.interrupt([sample.row for sample in call.samples if sample.row is not None])

    def wake(self) -> None:
        """Let the thread look whether there is something to do."""
        self._inbox.put(None)

    def watch(self) -> None:
        """Stop the step that runs if it has taken too long; if that was no use, give the engine up.

        Whoever waits for a piece calls this now and then, so it needs no thread of its own.

        Raises:
            StepStuckError: the engine was given up.
        """
        if self._given_up is None and (took := self._steps.watch()) is not None:
            self._give_up(f"a step did not end in {took:.3g} s, and could not be stopped")
        if self._given_up is not None:
            raise self._end_of_all()

    def snapshot(self) -> EngineSnapshot:
        """How things stand."""
        with self._lock:  # not around the meter's, which exporters may hold as they come here
            one = self._admission
            standing = len(one.running), one.waiting, one.waiting_tokens, one.rows, self._memory
        return self._meter.as_of(*standing)

    def drain(self) -> Signal:
        """Take no more calls; what is set once none is left, or none will ever end."""
        with self._lock:
            self._draining = True
            idle = not self._calls or self._given_up is not None
        if idle:
            self._idle.set()
        return self._idle

    def stop(self) -> None:
        """End all calls with EngineClosedError, and then the thread; never blocks."""
        self._stopping = True
        self.stepper.interrupt()
        self.wake()

    def close(self) -> None:
        """Stop, and block until the thread has ended, unless it hangs."""
        self.stop()
        if self._thread is not threading.current_thread():
            while self._thread.is_alive() and self._given_up is None:
                self._thread.join(min(self.step_timeout, threading.TIMEOUT_MAX))
                if self._steps.age >= 2 * self.step_timeout:
                    self._give_up("a step could not be stopped")
            self._thread.join(_LAST)  # given up, it may still be on its way out

    def _check(self, prompt: list[int], settings: AnswerSettings) -> None:
        if self._given_up is not None:
            raise self._end_of_all()
        if settings.n > self._most_rows + self._admission.max_queued:
            raise InvalidSettingError(
                f"n must be {self._most_rows + self._admission.max_queued} or less (rows and max_queued together), "
                f"got {settings.n}"
            )
        if not self.stepper.could_fit(Wanted(prompt, settings)):
            raise InvalidSettingError(
                f"{len(prompt)} tokens of prompt and max_tokens={settings.max_tokens} could never fit into the cache: "
                "ask for less, or give the engine more cache_bytes"
            )

    # The thread

    def _run(self) -> None:
        try:
            while not self._stopping and self._given_up is None:
                self._hear()
                self._expire()
                self._admit()
                if any(not row.paused for row in self._rows):
                    self._advance()
        except BaseException as error:  # those who wait hear of it, as the cause
            self._give_up(f"its thread died of {type(error).__name__}", error)
        finally:
            self._end()

    def _hear(self) -> None:
        """Let go of what was abandoned; with nothing to do, wait for something."""
        for row, sample in self._rows.items():
            row.paused = sample.full
        busy = any(not row.paused for row in self._rows)
        if not busy or gate.now() >= self._looks_at:  # counting takes as long as a tenth of a step
            self._memory = self.stepper.memory()
            self._looks_at = gate.now() + _LOOKS
        found: list[Call | None] = []
        if not busy and not self._stopping:
            with contextlib.suppress(queue.Empty):
                found.append(self._inbox.get(timeout=_GLANCE if self._tickets else None))
        while not self._inbox.empty():
            found.append(self._inbox.get())
        for call in found:
            if call is not None:
                self._drop(call)
        for row, sample in self._rows.items():
            row.paused = sample.full

    def _expire(self) -> None:
        with self._lock:
            found = [(self._tickets.pop(ticket), error) for ticket, error in self._admission.overdue(gate.now())]
        for sample, error in found:
            self._drop(sample.call, error)

    def _admit(self) -> None:
        """Give free rows to those whose turn it is."""
        while True:
            with self._lock:
                now = gate.now()
                if self._admission.rows < self._most_rows and now >= self._grows_at:
                    self._admission.rows += 1
                    self._grows_at = now + _REGROWS
                ticket = self._admission.next(now)
                if ticket is None:
                    return
                sample = self._tickets[ticket]
                try:
                    if not self.stepper.fits(sample.wanted):
                        return  # none overtakes it, or it might never have room
                except Exception as error:  # the decoder was closed, or memory is short
                    sample.call.fail(error)
                    self._inbox.put(sample.call)
                    return
                del self._tickets[ticket]
                self._admission.admit(ticket, now)
            try:
                sample.row = self.stepper.join(sample.wanted)
            except (NoRoomError, MemoryError, RuntimeExhaustedError):
                self._put_back(sample)
                return
            except Exception as error:
                self._fail(sample, error)
                continue
            self._rows[sample.row] = sample

    def _advance(self) -> None:
        """One step of all rows; if it fails or hangs, of each row alone, so that only those end that it was about."""
        error = self._attempt()
        if error is None:
            return
        if isinstance(error, RuntimeExhaustedError):
            self._shed(error)
            return
        active = [row for row in self._rows if not row.paused]
        if len(active) == 1:
            self._fail(self._rows[active[0]], error)
            return
        stuck = 0
        for row in active:
            if self._stopping or row not in self._rows:
                continue
            for other in self._rows:
                other.paused = other is not row
            # where two hang alone, it is not about a row
            error = self._attempt() if stuck < 2 else self._steps.stuck()
            if error is not None:
                stuck += isinstance(error, StepStuckError)
                self._fail(self._rows[row], error)

    def _attempt(self) -> Exception | None:
        """One step, and what came of it handed out; the error that it raised, if it did."""
        try:
            advances, seconds = self._steps.take(self._contexts())
        except GenerationCancelledError:  # left by everybody, or the engine is closing
            return None
        except Exception as error:
            return error
        self._hand_out(advances, seconds)
        return None

    def _contexts(self) -> list[Context]:
        """Of the calls that the next step is for, where somebody watches steps."""
        if answering.watch_step is None:
            return []
        calls = {sample.call: None for row, sample in self._rows.items() if not row.paused}
        return [call.context for call in calls if call.context is not None]

    def _hand_out(self, advances: Iterable[Advance], seconds: float) -> None:
        read = written = rows = 0
        for row, steps, error in advances:
            sample = self._rows.get(row)
            if sample is None:
                continue
            for step in steps:
                read += step.read
                written += step.token is not None and not step.read
                self._push(sample, row, step)
            rows += any(step.token is not None and not step.read for step in steps)
            if error is not None:
                self._fail(sample, error)
        with self._lock:
            self._admission.pace.stepped(seconds, read=read, written=written, rows=rows)

    def _push(self, sample: Sample, row: Row, step: Step) -> None:
        ticket = sample.ticket
        if step.token is not None:
            ticket.written += 1
        if step.token is None and step.finish is None:
            return
        usage = None
        if step.finish is not None:
            usage = Usage(ticket.prompt, row.cached_tokens, ticket.written, row.drafted_tokens, row.accepted_tokens)
            self._meter.finished(usage)
            self._free(sample, whole=True)  # first, so that who has read the last piece finds all given back
        piece = Piece(step.text, step.token, step.finish, sample.wanted.sample, step.logprobs, usage)
        sample.call.push(sample, piece)

    def _shed(self, error: Exception) -> None:
        """Memory ran out: the least important row goes, of those one that nobody saw anything of, the newest."""
        newest_first = reversed(self._rows.values())
        sample = min(newest_first, key=lambda one: (one.ticket.priority, bool(one.pushed)))
        with self._lock:
            self._admission.rows = max(1, len(self._rows) - 1)
            self._grows_at = gate.now() + _REGROWS
        self._meter.shed(len(self._rows) - 1)
        if sample.pushed or len(self._rows) == 1:
            self._fail(sample, error)
        else:
            self._put_back(sample)

    def _put_back(self, sample: Sample) -> None:
        """It waits again: nobody has seen anything of it."""
        row, sample.row = sample.row, None
        if row is not None:
            self._let_go(row)
        with self._lock:
            self._admission.put_back(sample.ticket)
            self._tickets[sample.ticket] = sample

    def _fail(self, sample: Sample, error: Exception) -> None:
        """An answer ends with an error, and its call with it."""
        self._meter.failed()
        self._drop(sample.call, error)

    def _drop(self, call: Call, error: Exception | None = None) -> None:
        """Free all that a call has here; then, so that its caller finds it done, tell of the error that ends it."""
        if call not in self._calls:
            return  # it is whole, or was dropped before
        for sample in call.samples:
            with self._lock:
                self._admission.withdraw(sample.ticket)
                self._tickets.pop(sample.ticket, None)
            self._free(sample, whole=False)
        if error is not None:
            call.fail(error)
        elif not call.failed:
            self._meter.cancelled()
        self._done(call)

    def _free(self, sample: Sample, *, whole: bool) -> None:
        row, sample.row = sample.row, None
        if row is not None:
            self._let_go(row)
        with self._lock:
            self._admission.finish(sample.ticket, whole=whole)
        if whole:
            sample.call.unfinished -= 1
            if not sample.call.unfinished:
                self._done(sample.call)

    def _let_go(self, row: Row) -> None:
        self._rows.pop(row, None)
        with _logged("letting a row go"):  # a drafter of the user's may raise as it closes, and nobody waits for it
            self.stepper.leave(row)

    def _done(self, call: Call) -> None:
        with self._lock:
            self._calls.discard(call)
            idle = self._draining and not self._calls
        if idle:
            self._idle.set()

    def _give_up(self, why: str, cause: BaseException | None = None) -> None:
        """Nothing will come of this engine any more; whoever waits hears it, for the thread may hang for ever."""
        with self._lock:
            self._given_up = self._given_up or (why, cause)
            calls = list(self._calls)
        for call in calls:
            call.fail(self._end_of_all())
        self._idle.set()

    def _end_of_all(self) -> Exception:
        """What ends each call that is left; a new one for each, for an error collects where it was raised."""
        if self._given_up is None:
            return EngineClosedError(f"engine {self.name!r} was closed during this answer")
        why, cause = self._given_up
        error = StepStuckError("running the model", f"engine {self.name!r} is given up: {why}")
        error.__cause__ = cause
        return error

    def _end(self) -> None:
        """The thread's last act: nothing of any call is left behind."""
        with self._lock:
            self._stopping = True
            calls = list(self._calls)
        for call in calls:
            self._drop(call, self._end_of_all())
        with _logged("closing the rows"):
            self.stepper.close()


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        events.logger.exception("%s failed; the engine goes on", what)
