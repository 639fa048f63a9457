"""Tokens to text as they arrive: whole characters only, and nothing of a stop string. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Any

from seawall.inference.errors import InvalidSettingError

_MOST_STOPS, _LONGEST_STOP = 16, 256  # they are searched for at every token


def checked_stops(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop strings, if they are usable; InvalidSettingError otherwise."""
    given: Any = stop
    if (
        isinstance(given, str)
        or not isinstance(given, Collection)
        or len(stop) > _MOST_STOPS
        or not all(type(text) is str and 0 < len(text) <= _LONGEST_STOP for text in stop)
    ):
        raise InvalidSettingError(
            f"stop must be at most {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters, got {stop!r:.200}"
        )
    return tuple(stop)


class TextStream:
    """Turns the bytes of tokens into text that never ends within a character.

    Text that may turn out to be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """Text that is certain after these bytes; sets `stopped` when a stop string is complete."""
        return self._release(self._decode(piece))

    def flush(self) -> str:
        """The rest, at the end of the answer; an unfinished character becomes U+FFFD."""
        text = self._release(self._decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)]
        kept = max(overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with.

    ```python
    from seawall.inference.generate.text import overlap

    print(overlap("one, tw", "two"), overlap("one", "two"))
    #> 2 0
    ```
    """
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
