"""Progress of what takes seconds: a bar on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
from typing import Any, Self


class Progress:
    """A bar where there is a terminal and `rich`, else silent."""

    def __enter__(self) -> Self:
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        return self

    def __call__(self, stage: str, fraction: float) -> None:
        """Show what is being done and the fraction of it that is."""
        if self._bar is not None:
            self._bar.update(self._task, description=stage, completed=fraction)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
