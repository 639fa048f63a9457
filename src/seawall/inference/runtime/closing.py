"""What is closed: by hand, by `with`, or by `async with`."""

from __future__ import annotations

import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

import anyio
import anyio.to_thread


class Closing(ABC):
    """Context managers of both kinds over a `close` that may block."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; closing again does nothing."""

    async def aclose(self) -> None:
        """`close`, without blocking the event loop; one that is cancelled before it began blocks it, and has closed."""
        first = threading.Lock()

        def close() -> None:
            if first.acquire(blocking=False):
                self.close()

        try:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(close)
        finally:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def abandoned(what: str, process: int, *ends: Callable[[], object]) -> None:
    """It was collected, and nobody closed it: end its threads, and say so. In a fork they are the parent's."""
    if os.getpid() != process:
        return
    for end in ends:
        end()
    warnings.warn(f"{what} was dropped without close()", ResourceWarning, stacklevel=2)
