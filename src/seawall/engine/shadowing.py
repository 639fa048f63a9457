"""Asking a new model what the old one was asked, before anybody gets its answers."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

from seawall.core import checks, events, gate
from seawall.core.locking import lock
from seawall.engine.generations import Signal
from seawall.engine.rehearsal import UnfitModelError, finished
from seawall.engine.worker import Worker

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Shadow:
    """How answers of a new model are compared with those that callers got from the old one.

    Of the next calls some are asked of the new model as well, one after another, after their callers were answered;
    streams are left out. Arrays that a call was given must not be written to after it, until the shadow is over.

    Args:
        agree: given the old and the new answer; whether the new one would have done as well.
        calls: how many are compared.
        least: share of them that must agree; an error of the new model does not.
        timeout: seconds in which so many calls have to come.
    """

    agree: Callable[[Any, Any], bool]
    calls: int = 20
    least: float = 0.95
    timeout: float | timedelta = 30.0

    def __post_init__(self) -> None:
        checks.function("agree", self.agree, of="two answers")
        checks.count("calls", self.calls)
        checks.fraction("least", self.least)
        object.__setattr__(self, "timeout", checks.seconds("timeout", self.timeout))


class Mirror(Generic[M]):
    """Calls of the old model that wait to be asked of the new one; a few at most, the rest is not looked at."""

    def __init__(self, settings: Shadow) -> None:
        self.settings = settings
        self._waiting: deque[tuple[Callable[[M], object], object]] = deque()
        self._came = Signal()

    def offer(self, ask: Callable[[M], object], answer: object) -> None:
        """A caller got this answer; from any thread, and it costs that one a copy."""
        if len(self._waiting) < 2:  # one to compare next, and one more
            self._waiting.append((ask, events.ask(copy.deepcopy, answer, otherwise=answer)))
            self._came.set()

    async def take(self, until: float) -> tuple[Callable[[M], object], object] | None:
        """The next one, or None where none came in time."""
        while not self._waiting:
            left = until - gate.clock()
            if left <= 0 or not await self._came.wait(left):
                return None
            with lock:
                self._came = Signal()
        return self._waiting.popleft()


async def shadowed(mirror: Mirror[M], name: str, model: M, worker: Worker) -> None:
    """Compare until enough is known; UnfitModelError where too little agrees, or comes."""
    settings = mirror.settings
    seconds = checks.seconds("timeout", settings.timeout)
    until = gate.clock() + seconds
    spare = int(settings.calls * (1 - settings.least) + 1e-9)
    compared = differing = 0
    while compared < settings.calls:
        pair = await mirror.take(until)
        if pair is None:
            raise UnfitModelError(name, "shadow", f"{compared} of {settings.calls} calls came within {seconds:g} s")
        ask, expected = pair
        compared += 1
        problem = await _compared(settings, ask, expected, model, worker)
        if problem is not None:
            differing += 1
            if differing > spare:
                why = f"{differing} of {compared} answers differ from the old model's: {problem}"
                raise UnfitModelError(name, "shadow", why)


async def _compared(
    settings: Shadow, ask: Callable[[M], object], expected: object, model: M, worker: Worker
) -> str | None:
    """What is wrong with the new answer; None where it will do."""
    try:
        if inspect.iscoroutinefunction(ask):
            found = await ask(model)
        else:
            found = await finished(worker, lambda: ask(model))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if settings.agree(expected, found) else "they do not agree"
