"""What a request says about itself: how long its client waits. Pure, and everything in a header is hostile.

| header | says |
| --- | --- |
| `grpc-timeout` | up to eight digits and a unit: `H`, `M`, `S`, `m`, `u` or `n` |
| `x-envoy-expected-rq-timeout-ms` | milliseconds |
| `x-request-deadline` | Unix time in seconds, with decimals if wanted |

The earliest counts. What is malformed is ignored, as Envoy does: it is no reason to refuse a call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

GRPC = "grpc-timeout"
ENVOY = "x-envoy-expected-rq-timeout-ms"
UNIX = "x-request-deadline"
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_GRPC = re.compile(r"(\d{1,8})([HMSmun])", re.ASCII)
_WHOLE = re.compile(r"-?\d{1,15}", re.ASCII)
_DECIMAL = re.compile(r"-?\d{1,15}(?:\.\d{1,9})?", re.ASCII)


def _grpc(value: str, unix_now: float) -> float | None:
    found = _GRPC.fullmatch(value)
    return int(found[1]) * _UNITS[found[2]] if found else None


def _envoy(value: str, unix_now: float) -> float | None:
    return int(value) / 1000 if _WHOLE.fullmatch(value) else None


def _unix(value: str, unix_now: float) -> float | None:
    return float(value) - unix_now if _DECIMAL.fullmatch(value) else None


READERS: Mapping[str, Callable[[str, float], float | None]] = {GRPC: _grpc, ENVOY: _envoy, UNIX: _unix}


def seconds_left(found: Iterable[tuple[str, str]], unix_now: float) -> float | None:
    """Seconds that the client still waits, by the deadline headers among (lower-case name, value); None without any.

    0 or below says that it does not wait any more.

    Examples:
        >>> seconds_left([("grpc-timeout", "250m"), ("x-envoy-expected-rq-timeout-ms", "100")], 0.0)
        0.1
    """
    least: float | None = None
    for name, value in found:
        read = READERS.get(name)
        seconds = read(value.strip(" \t"), unix_now) if read else None
        if seconds is not None and (least is None or seconds < least):
            least = seconds
    return least


def deadline_headers(seconds: float, unix_now: float) -> dict[str, str]:
    """What tells the callee of a request that its caller waits `seconds` more; nothing where that is for ever.

    Examples:
        >>> deadline_headers(1.5, 1_000_000.0)
        {'grpc-timeout': '1500m', 'x-envoy-expected-rq-timeout-ms': '1500', 'x-request-deadline': '1000001.500'}
    """
    if seconds == math.inf:
        return {}
    left = min(max(0.0, seconds), 86_400.0)  # eight digits of milliseconds hold a day
    milliseconds = int(left * 1000)
    return {GRPC: f"{milliseconds}m", ENVOY: str(milliseconds), UNIX: f"{unix_now + left:.3f}"}
