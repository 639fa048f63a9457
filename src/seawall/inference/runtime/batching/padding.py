"""How rows of different lengths come to have one. Pure: settings in, an error or a number out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from seawall.inference.errors import InvalidSettingError

_BUCKETS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Padding:
    """Rows of different lengths in one run: each is padded to its own bucket, never to its neighbours' length.

    So how far a row is padded depends on the row alone, and what the padding does to its output, if anything, is the
    same whoever shares the run. Rows of different buckets do not share one.

    Args:
        values: what each input that varies in length is padded with, by the input's name.
        buckets: the lengths that rows are padded to, ascending; a longer row is refused.
        axis: the axis that varies; 0 is that of the rows.
        mask: the input that tells real positions (1) from padding (0). A request may leave it out: then all of its
            positions are real.
        cut: which axis of which output varies too, by the output's name, to cut the padding off again. None cuts
            where the model names an output's axis like the inputs' one.
    """

    values: Mapping[str, float]
    buckets: tuple[int, ...] = _BUCKETS
    axis: int = 1
    mask: str | None = None
    cut: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "values", MappingProxyType(dict(self.values))
        )  # shared by all calls: kept from changes
        object.__setattr__(self, "buckets", tuple(self.buckets))
        if not self.values:
            raise InvalidSettingError("values must name at least one input that varies in length, got none")
        if type(self.axis) is not int or self.axis < 1:
            raise InvalidSettingError(f"axis must be a whole number of at least 1 (0 is the rows), got {self.axis!r}")
        known = all(type(size) is int and size > 0 for size in self.buckets)
        if not self.buckets or not known or list(self.buckets) != sorted(set(self.buckets)):
            raise InvalidSettingError(f"buckets must be ascending whole numbers of at least 1, got {self.buckets!r}")
        if self.mask in self.values:
            raise InvalidSettingError(f"mask must be an input that values does not name, got {self.mask!r} in both")

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that vary in length, the mask included."""
        return (*self.values, self.mask) if self.mask is not None else tuple(self.values)

    def bucket(self, length: int) -> int | None:
        """The length that a row of `length` is padded to; None where it is too long."""
        index = bisect_left(self.buckets, length)
        return self.buckets[index] if index < len(self.buckets) else None
