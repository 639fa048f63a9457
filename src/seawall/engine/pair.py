"""Two models behind one name: what concerns both of them."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from contextlib import ExitStack
from typing import Generic, TypeVar

import anyio.to_thread

from seawall.engine.rehearsal import warm_up
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
            done = await anyio.to_thread.run_sync(warm_up, model)
            if inspect.isawaitable(done):
                await done

    async def drain(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - ends no call
        """Drain both models; False if `timeout` seconds were too few."""
        until = None if timeout is None else self._now() + timeout
        ended = True
        for model in self.both:
            drain = getattr(model, "drain", None)
            if drain is not None:
                left = None if until is None else max(0.0, until - self._now())
                done = await anyio.to_thread.run_sync(drain, left)
                ended &= bool(await done if inspect.isawaitable(done) else done)
        return ended

    def close(self) -> None:
        """Close both models; blocks as theirs does."""
        with ExitStack() as models:
            for model in self.both:
                models.callback(model.close)
