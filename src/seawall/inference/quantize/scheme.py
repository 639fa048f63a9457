"""What a scheme is: the type of the codes, where zero lies, and which values share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from seawall.inference.errors import InvalidSettingError


class Codes(NamedTuple):
    """The codes of a type: bits each, and the largest one. Of integers, the lowest is `-highest - 1`."""

    bits: int
    highest: int


INTEGERS = {"int8": Codes(8, 127), "int4": Codes(4, 7), "int2": Codes(2, 1)}
FLOATS = {"float8_e4m3fn": Codes(8, 448), "float8_e5m2": Codes(8, 57344)}
DTYPES = INTEGERS | FLOATS


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How an array is quantized; `str` of it is its label.

    int2 keeps three or four levels and wrecks most weights: nothing chooses it for you, and its label says so.

    Attributes:
        dtype: int8, int4, int2, float8_e4m3fn or float8_e5m2, as ONNX and ml_dtypes call them.
        symmetric: zero is code 0, and the lowest integer is not used; else each scale has a zero point.
        axis: one scale per index of this axis; negative ones count from the end.
        block_size: one scale per this many neighbours on the last axis, whose last block may be shorter.
    """

    dtype: str = "int8"
    symmetric: bool = True
    axis: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidSettingError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.dtype in FLOATS and not self.symmetric:
            raise InvalidSettingError(f"{self.dtype} has a sign and no zero point: symmetric must be True")
        if self.axis is not None and self.block_size is not None:
            raise InvalidSettingError(
                f"give axis or block_size, not both, got axis={self.axis!r} and block_size={self.block_size!r}"
            )
        if self.axis is not None and not _is_integer(self.axis):
            raise InvalidSettingError(f"axis must be an integer, got {self.axis!r}")
        if self.block_size is not None and not (_is_integer(self.block_size) and self.block_size >= 1):
            raise InvalidSettingError(f"block_size must be an integer of at least 1, got {self.block_size!r}")

    def __str__(self) -> str:
        label = self.dtype + (" (opt-in: three or four levels)" if self.dtype == "int2" else "")
        sharing = "per tensor"
        if self.axis is not None:
            sharing = f"per channel of axis {self.axis}"
        if self.block_size is not None:
            sharing = f"per block of {self.block_size}"
        return f"{label}, {'symmetric' if self.symmetric else 'asymmetric'}, {sharing}"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return DTYPES[self.dtype].bits

    @property
    def highest(self) -> int:
        """The largest value that a code stands for, at scale 1."""
        return DTYPES[self.dtype].highest

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of an array of this shape."""
        if self.block_size is not None:
            if not shape:
                raise InvalidSettingError(f"block_size={self.block_size} needs an axis, and a scalar has none")
            return (*shape[:-1], -(-shape[-1] // self.block_size))
        if self.axis is None:
            return ()
        if not -len(shape) <= self.axis < len(shape):
            raise InvalidSettingError(f"axis must be one of the {len(shape)} axes of shape {shape}, got {self.axis}")
        return (shape[self.axis],)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
