"""aiobreaker's breakers, listeners, storages and error handlers, in a seawall. Needs the extra `aiobreaker`."""

from __future__ import annotations

try:
    import aiobreaker as _aiobreaker  # noqa: F401
except ImportError as error:
    raise ImportError(
        "seawall.aiobreakers needs the package 'aiobreaker': pip install 'seawall[aiobreaker]'", name="aiobreaker"
    ) from error

from seawall.aiobreakers.errors import CircuitBreakerError
from seawall.aiobreakers.replacing import BridgedBreaker, to_seawall
from seawall.aiobreakers.theirs import AiobreakerPolicy, AiobreakerSnapshot, from_aiobreaker

__all__ = [
    "AiobreakerPolicy",
    "AiobreakerSnapshot",
    "BridgedBreaker",
    "CircuitBreakerError",
    "from_aiobreaker",
    "to_seawall",
]
