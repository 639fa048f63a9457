"""What one opening of an engine makes, and one closing ends."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from seawall.engine.metering import EngineSnapshot
from seawall.engine.rehearsal import checked_model
from seawall.engine.scheduler import Scheduler
from seawall.engine.stepping import Stepper, Together, Turns
from seawall.engine.worker import Worker

if TYPE_CHECKING:
    from seawall.inference.generate.decoder import Decoder


class Opening:
    """Two threads, and the decoder that is loaded for all who wait for it."""

    def __init__(self, name: str, load: Callable[[], Decoder], schedule: Callable[[Decoder], Scheduler]) -> None:
        self.worker = Worker(f"seawall-{name}")  # loads, and reads prompts
        self.decoder: Decoder | None = None
        self.scheduler: Scheduler | None = None  # steps
        self.error: BaseException | None = None
        self.openers = 0
        self.process = os.getpid()
        self.opened = False  # somebody got it, so it stays until the engine is closed
        self._load = load
        self._schedule = schedule

    def load(self) -> None:
        """In the worker thread, once for each opener: the first loads, the others hear what became of that."""
        if self.decoder is None and self.error is None:
            try:
                self.decoder = checked_model("what load returns", self._load())
                self.scheduler = self._schedule(self.decoder)
            except BaseException as error:
                self.error = error
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End the threads, then free the decoder."""
        if self.scheduler is not None:
            self.scheduler.close()
        self.worker.close()
        self.free()

    def free(self) -> None:
        """Let go of the decoder; never blocks."""
        self.error = None  # its traceback holds this object
        if self.scheduler is not None:
            self.scheduler.stop()
        decoder, self.decoder = self.decoder, None
        if decoder is not None:
            decoder.close()


def stepper_for(decoder: Any, rows: int, cache_bytes: int | None, prefix_cache_bytes: int) -> Stepper:
    """What drives the answers of a decoder, or of anything else that starts sequences."""
    from seawall.inference.generate.decoder import Decoder as Rows

    if not isinstance(decoder, Rows):
        return Turns(decoder, rows)
    from seawall.inference.generate.rows.continuous import ContinuousBatch

    return Together(ContinuousBatch(decoder, rows=rows, cache_bytes=cache_bytes, prefix_cache_bytes=prefix_cache_bytes))


def looking_at(scheduler: Scheduler) -> Callable[[], EngineSnapshot]:
    """Its snapshots, without holding it: what is counted outlives it."""
    reference = weakref.ref(scheduler)

    def look() -> EngineSnapshot:
        scheduler = reference()
        return EngineSnapshot() if scheduler is None else scheduler.snapshot()

    return look
