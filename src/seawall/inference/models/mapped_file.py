"""A model file in memory, read only as far as it is looked at."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import TracebackType
from typing import Self

from seawall.inference.errors import CorruptModelError


class MappedFile:
    """A file's bytes, for the readers of its formats; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:  # an empty file cannot be mapped
                raise CorruptModelError(path, "it is empty") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()
