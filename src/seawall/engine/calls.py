"""A call's answers on their way from the scheduler's thread to the task that reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import copy_context

from seawall.core import answering
from seawall.core.sleeping import async_sleeper
from seawall.engine.admission import Ticket
from seawall.engine.answers import Piece
from seawall.engine.stepping import Row, Wanted

READ_AHEAD = 16  # pieces of one sample that wait for their reader before its row idles


class Sample:
    """One answer of a call. The scheduler's thread writes everything but `taken`."""

    __slots__ = ("call", "pushed", "row", "taken", "ticket", "wanted")

    def __init__(self, call: Call, wanted: Wanted, ticket: Ticket) -> None:
        self.call = call
        self.wanted = wanted
        self.ticket = ticket
        self.row: Row | None = None
        self.pushed = 0
        self.taken = 0

    @property
    def full(self) -> bool:
        """Whether its reader is too far behind."""
        return self.pushed - self.taken >= READ_AHEAD


class Call:
    """What one caller waits for: pieces of its samples, in the order they came, or the error that ends it.

    One task reads, the scheduler's thread writes; neither waits for the other, so there is no lock.
    """

    def __init__(self, resume: Callable[[], object], abandon: Callable[[Call], object]) -> None:
        self.samples: list[Sample] = []
        self.context = copy_context() if answering.watch_step is not None else None
        self.abandoned = False  # nobody reads any more
        self.failed = False
        self.unfinished = 0  # samples; the scheduler's thread counts
        self._resume = resume
        self._abandon = abandon
        self._arrived: deque[tuple[Sample, Piece] | BaseException] = deque()
        self._ring: Callable[[], bool] | None = None

    def add(self, wanted: Wanted, ticket: Ticket) -> None:
        """One more sample is wanted; before any is pushed."""
        self.samples.append(Sample(self, wanted, ticket))
        self.unfinished += 1

    def push(self, sample: Sample, piece: Piece) -> None:
        """In the scheduler's thread: one more piece."""
        sample.pushed += 1
        self._arrived.append((sample, piece))
        self._wake()

    def fail(self, error: BaseException) -> None:
        """In any thread: it ends with this, once what came before is read."""
        self.failed = True
        self._arrived.append(error)
        self._wake()

    @property
    def arrived(self) -> bool:
        """Whether something is there to be read."""
        return bool(self._arrived)

    def set_bell(self, ring: Callable[[], bool] | None) -> None:
        """Ring this when something comes."""
        self._ring = ring

    def take(self) -> Piece:
        """The next piece, of those that are there; or raises what ended the call."""
        found = self._arrived.popleft()
        if isinstance(found, BaseException):
            raise found
        sample, piece = found
        sample.taken += 1  # first: a piece that fills the row up meanwhile has seen that, or is seen here
        if sample.pushed - sample.taken >= READ_AHEAD - 1:
            self._resume()
        return piece

    def abandon(self) -> None:
        """Nobody reads any more."""
        if not self.abandoned:
            self.abandoned = True
            self._abandon(self)

    def _wake(self) -> None:
        ring = self._ring
        if ring is not None and not ring():
            self.abandon()  # its event loop is gone


class Reader:
    """The caller's end of a call; the scheduler holds the other one only.

    However it is let go, closed or dropped with an event loop that is gone, that ends the call.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    async def next(self, patience: float, overdue: Callable[[], object]) -> Piece:
        """The next piece; `overdue` is called whenever none has come for `patience` seconds, and may raise."""
        call = self._call
        while not call.arrived:
            sleeper = async_sleeper()
            call.set_bell(sleeper.ring)
            try:
                if not call.arrived:  # meanwhile, and it rang no bell
                    await sleeper.sleep(patience, shared=patience)
            finally:
                call.set_bell(None)
                sleeper.rise()
            if not call.arrived:
                overdue()
        return call.take()

    def close(self) -> None:
        """Nobody reads any more."""
        self._call.abandon()

    def __del__(self) -> None:
        self.close()
