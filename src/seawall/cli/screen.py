"""Text as it comes: with a live line of progress below it on a terminal, as it is and nothing else in a pipe."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

_REFRESH = 0.1  # seconds
# What a model writes must not steer the terminal: control characters are shown, not sent.
_SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_SHOWN |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


class Screen:
    """Where an answer is written. On a terminal with `rich` a live line says how fast it comes."""

    def __enter__(self) -> Self:
        self._live: Any = None
        self._row = ""
        self._shown_at = 0.0
        self._terminal = sys.stdout.isatty()
        if self._terminal:
            try:
                from rich.console import Console
                from rich.live import Live
            except ImportError:
                return self
            console = Console(highlight=False, markup=False, emoji=False)
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        live, self._live = self._live, None
        if live is None:
            return
        live.stop()
        if self._row:
            live.console.print(self._row, soft_wrap=True)

    def write(self, text: str) -> None:
        """More of the answer."""
        if self._terminal:
            text = text.translate(_SHOWN)
        if self._live is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        *lines, self._row = (self._row + text.expandtabs(4)).split("\n")
        for line in lines:
            self._print(self._wrapped(line))
        self._row = self._wrapped(self._row)

    def status(self, text: str) -> None:
        """What the line below says; nowhere but on a terminal."""
        if self._live is None or time.monotonic() < self._shown_at + _REFRESH:
            return
        from rich.text import Text

        shown = Text(self._row)
        shown.append(f"\n{text}", style="dim")
        self._live.update(shown, refresh=True)
        self._shown_at = time.monotonic()

    def close(self, summary: str) -> None:
        """The end of the answer, with a last line on a terminal."""
        if self._live is not None:
            console = self._live.console
            self.__exit__()
            console.print(summary, style="dim")
        else:
            sys.stdout.write("\n")

    def _print(self, row: str) -> None:
        self._live.update("")  # or it would be drawn once more below the row
        self._shown_at = 0.0
        self._live.console.print(row, soft_wrap=True)

    def _wrapped(self, line: str) -> str:
        """Print the rows that are full; what is left of the line is the live one."""
        from rich.cells import chop_cells

        width = self._live.console.width
        while len(rows := chop_cells(line, width)) > 1:
            cut = rows[0].rfind(" ") if " " in rows[0].strip() and rows[1][:1] != " " else len(rows[0])
            self._print(line[:cut].rstrip(" "))
            line = line[cut:].lstrip(" ")
        return line
