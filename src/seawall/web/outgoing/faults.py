"""What says that a host did not serve a request: errors on the way, and statuses."""

from __future__ import annotations

_faults: set[type[Exception]] = {ConnectionError, TimeoutError}
NOT_NOW = frozenset({429, 502, 503, 504})  # the request was not served, and a later one may be
DRAINED = 65_536  # bytes


def add(*classes: type[Exception]) -> None:
    """A client's own classes of errors, which it names when it is loaded."""
    _faults.update(classes)


def is_fault(error: BaseException) -> bool:
    """Whether a request failed on its way or in its time, and might not the next time, whichever client sent it.

    Examples:
        >>> is_fault(ConnectionResetError()), is_fault(ValueError("no such scheme"))
        (True, False)
    """
    return isinstance(error, tuple(_faults))


def drains(status: int, content_length: str) -> bool:
    """Whether to read an answer at once: it is short, and will likely be retried.

    Then neither its place nor its connection is taken while the retry pauses.
    """
    digits = content_length.isascii() and content_length.isdigit() and len(content_length) < 10
    return status in NOT_NOW and digits and int(content_length) <= DRAINED
