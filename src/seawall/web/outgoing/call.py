"""One request to a host, with all its attempts."""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping

from seawall.policies.deadline import time_left
from seawall.web.intake import deadline_headers

SAFE = frozenset({"GET", "HEAD", "OPTIONS", "QUERY", "TRACE"})  # RFC 9110, 9.2.1
IDEMPOTENT = SAFE | {"DELETE", "PUT"}


class OutgoingCall:
    """What the policies of a host see of a request, whichever client sends it.

    Attributes:
        host: scheme, name and port: "https://example.org:443".
        method: in capitals.
        safe: whether it changes nothing, so that it may even be made twice at once.
        repeatable: whether it may be made again: it has an idempotent method or an `Idempotency-Key`, and its body is
            still there.
    """

    __slots__ = ("host", "method", "repeatable", "safe")

    def __init__(self, host: str, method: str, headers: Mapping[str, str], *, replayable: bool) -> None:
        self.host = host
        self.method = method.upper()
        self.safe = replayable and self.method in SAFE
        self.repeatable = replayable and (self.method in IDEMPOTENT or "idempotency-key" in headers)


def by_host(call: OutgoingCall) -> str:
    """The key of a policy per host, for `Keyed` and `KeyedAround`."""
    return call.host


def hand_on(headers: MutableMapping[str, str]) -> None:
    """Tell the host how long its caller waits, in the headers that the application has not set itself."""
    for name, value in deadline_headers(time_left(), time.time()).items():
        headers.setdefault(name, value)
