"""The window of the last so many calls. That of the last so many seconds is `core.counts.RollingWindow`."""

from __future__ import annotations

import math
from collections.abc import Sequence


class CallWindow:
    """Looks back over the last `calls` calls, exactly: a ring with one byte for each.

    Used like a `RollingWindow`: `turn` begins a call, here every one, as a success that was quick; `mark` says of
    the call begun last that it was not.

    Examples:
        >>> window = CallWindow(2)
        >>> for failed in (True, False, False):
        ...     window.turn(0.0, ())
        ...     window.mark(failed=failed, slow=False)
        ...     print(window.since(0.0, ()))
        [0, 1, 0]
        [1, 1, 0]
        [2, 0, 0]
    """

    __slots__ = ("_at", "_calls", "_failures", "_ring", "_slow")
    turns_at = -math.inf  # always due

    def __init__(self, calls: int) -> None:
        self._ring = bytearray(calls)  # bit 0: failed, bit 1: slow
        self._at = -1
        self._calls = self._failures = self._slow = 0

    def turn(self, now: float, counters: Sequence[int]) -> None:
        """A call ended: the oldest one leaves the window if it is full."""
        self._at = (self._at + 1) % len(self._ring)
        if self._calls < len(self._ring):
            self._calls += 1
        elif oldest := self._ring[self._at]:
            self._failures -= oldest & 1
            self._slow -= oldest >> 1
            self._ring[self._at] = 0

    def mark(self, *, failed: bool, slow: bool) -> None:
        """What that call was."""
        self._ring[self._at] = failed | slow << 1
        self._failures += failed
        self._slow += slow

    def since(self, now: float, counters: Sequence[int]) -> list[int]:
        """Successes, failures and slow calls in the window."""
        return [self._calls - self._failures, self._failures, self._slow]
