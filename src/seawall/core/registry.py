"""The live policies of this process, held weakly: dropping a policy is enough to make it disappear."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

_entries: dict[int, weakref.ref[object]] = {}
_numbers = itertools.count()


class _PerThread(threading.local):
    unlisted = 0


_local = _PerThread()


@contextmanager
def unlisted() -> Iterator[None]:
    """Keep the policies that this thread makes in the block out of `live`: their owner speaks for them."""
    _local.unlisted += 1
    try:
        yield
    finally:
        _local.unlisted -= 1


def register(policy: object) -> None:
    """Make `policy` findable for as long as somebody else holds it."""
    if _local.unlisted:
        return
    number = next(_numbers)
    # Runs whenever the policy dies, in any thread: a single dict operation, so it needs no lock.
    _entries[number] = weakref.ref(policy, lambda _: _entries.pop(number, None))


def numbered() -> Iterator[tuple[int, object]]:
    """Every live policy with a number of its own, which no other gets after it."""
    for number in list(
        _entries
    ):  # not `items()`: that makes tuples, which may set off the collector, which pops entries
        reference = _entries.get(number)
        policy = reference() if reference is not None else None
        if policy is not None:
            yield number, policy


def live() -> Iterator[object]:
    """Every live policy, oldest first.

    Examples:
        >>> from seawall import Bulkhead
        >>> payments = Bulkhead("payments", max_concurrent=8)
        >>> payments in set(live())
        True
    """
    return (policy for _, policy in numbered())
