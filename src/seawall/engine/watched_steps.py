"""One step at a time, watched: stopped when it takes too long, and known to hang when that was of no use."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seawall.core import answering, gate
from seawall.engine.errors import StepStuckError
from seawall.inference.errors import GenerationCancelledError, RuntimeExhaustedError

if TYPE_CHECKING:
    from seawall.engine.metering import EngineMeter
    from seawall.engine.stepping import Advance, Stepper


@dataclass(slots=True)
class _Step:
    """The step that runs."""

    began: float
    overdue: bool = False  # it was told to stop


class WatchedSteps:
    """Takes steps in one thread, while any other watches them; so it needs no thread of its own.

    Args:
        stepper: whose steps they are.
        timeout: seconds that a step may take.
        meter: hears of those that take longer.
    """

    def __init__(self, stepper: Stepper, timeout: float, meter: EngineMeter) -> None:
        self._stepper = stepper
        self._timeout = timeout
        self._meter = meter
        self._running: _Step | None = None

    def take(self, contexts: Sequence[Context]) -> tuple[list[Advance], float]:
        """One step, for calls of these contexts: what came of it, and the seconds that it took.

        Raises:
            RuntimeExhaustedError: memory ran out, Python's own too.
            StepStuckError: it took too long, and was stopped.
            GenerationCancelledError: it was stopped for another reason: everybody left, or the engine is closing.
        """
        began = gate.now()
        self._running = step = _Step(began)
        try:
            with answering.step_watched(contexts):
                advances = list(self._stepper.step())
        except GenerationCancelledError as error:
            if step.overdue:
                raise self.stuck() from error
            raise
        except MemoryError as error:
            raise RuntimeExhaustedError("taking a step", error) from error
        finally:
            self._running = None
        return advances, gate.now() - began

    def stuck(self) -> StepStuckError:
        """What ends an answer whose step was stopped."""
        return StepStuckError("taking a step", f"it did not end in {self._timeout:g} s and was stopped")

    def watch(self) -> float | None:
        """In any thread: stop the step that runs if it has taken too long.

        If it was told to, and did not in as much time again, the seconds that it has taken: it is past help.
        """
        step, took = self._running, self.age
        if step is None or took < self._timeout:
            return None
        if step.overdue:
            return took if took >= 2 * self._timeout else None
        step.overdue = True
        self._meter.stuck(took)
        self._stepper.interrupt()
        return None

    @property
    def age(self) -> float:
        """Seconds since the step began that runs; 0 while none does."""
        step = self._running
        return 0.0 if step is None else gate.now() - step.began
