"""What this machine's processor wants of 8-bit products."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import NamedTuple

_VNNI = frozenset({"avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8"})


class Integers(NamedTuple):
    """How weights and inputs are to be rounded.

    Attributes:
        narrow: weights in 7 bits: without VNNI, x86 adds two products in 16 bits, and saturates.
        signed: inputs in int8 instead of uint8, as ARM prefers.
    """

    narrow: bool
    signed: bool


@functools.cache
def preferred() -> Integers:
    """What serves this processor; where it does not tell, what no processor gets wrong."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return Integers(narrow=False, signed=True)
    return Integers(narrow=not _VNNI & _flags(), signed=False)


def _flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
