"""Two models behind one name: what concerns both of them."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Generic, TypeVar

import anyio.to_thread

from seawall.engine.generations import patience
from seawall.engine.standing_in import Closes, StandIn

M = TypeVar("M", bound=Closes)


class Pair(StandIn[M], Generic[M]):
    """Stands in for two models, which it takes over, and closes."""

    @property
    @abstractmethod
    def both(self) -> tuple[M, M]:
        """The two."""

    @property
    def closed(self) -> bool:
        """Whether both take no more calls."""
        return all(getattr(model, "closed", False) for model in self.both)

    async def warm_up(self) -> None:
        """Warm both models up, each by its own `warm_up()`; call it before the first request."""
        for model in self.both:
            if (own := getattr(model, "warm_up", None)) is not None:
                await _finished(own)

    async def drain(self, timeout: float | timedelta | None = None) -> bool:  # noqa: ASYNC109 - ends no call
        """Drain both models; False if `timeout` seconds were too few."""
        until = self._now() + patience(timeout)
        ended = True
        for model in self.both:
            if (own := getattr(model, "drain", None)) is not None:
                left = None if until == math.inf else max(0.0, until - self._now())
                ended &= bool(await _finished(own, left))
        return ended

    def close(self) -> None:
        """Close both models; blocks as theirs does."""
        with ExitStack() as models:
            for model in self.both:
                models.callback(model.close)


async def _finished(own: Callable[..., object], *given: object) -> Any:
    """What a model's own method comes to: an `async` one runs here, a plain one in a thread, for it may block."""
    if inspect.iscoroutinefunction(own):
        return await own(*given)
    done = await anyio.to_thread.run_sync(own, *given)
    return await done if inspect.isawaitable(done) else done
