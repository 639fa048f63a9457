"""Time that passes only when everybody waits: a minute of back-off is tested in no time, and exactly.

The loop below never sleeps. When no task can run, it jumps its clock to the next timer; while it runs the gate is
told the same clock, so what a policy decides and when a task wakes agree to the last digit.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from seawall.core.gate import use_clock

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Where the real one would sleep until the next timer, moves the loop's clock there."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready now. With no timer to jump to it really waits: only another thread can go on."""
        ready = super().select(None if timeout is None else 0)
        if timeout is not None and timeout > 0 and not ready:
            self.loop.moment += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop on virtual time, in `moment`, which every policy is told too while it runs.

    Files, sockets and threads take none of it. Any runner that takes a `loop_factory` can use it.

    Examples:
        >>> loop = VirtualTimeLoop()
        >>> loop.run_until_complete(asyncio.sleep(3600))
        >>> loop.time()
        3600.0
        >>> loop.close()
    """

    def __init__(self, start: float = 0.0) -> None:
        self.moment = start
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """The virtual time, in seconds."""
        return self.moment

    def run_forever(self) -> None:
        """Run until stopped, on virtual time."""
        with use_clock(self.time):
            super().run_forever()


def run(main: Coroutine[Any, Any, T], *, start: float = 0.0) -> T:
    """`asyncio.run(main)` on virtual time, which every policy is told too (the clock is the process's).

    Examples:
        >>> from seawall import Timeout
        >>> async def main() -> str:
        ...     try:
        ...         async with Timeout("search", 30.0):
        ...             await asyncio.sleep(3600)
        ...     except TimeoutError:
        ...         return f"after {asyncio.get_running_loop().time():g} s"
        >>> run(main())
        'after 30 s'
    """
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(start)) as runner:
        return runner.run(main)
