"""One call of a cached function: from memory, or by a run of its own or of somebody else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import TYPE_CHECKING, TypeVar, cast

from seawall.core.sleeping import on_asyncio, on_trio
from seawall.core.tasks import running_loop

if TYPE_CHECKING:
    from seawall.policies.cache.policy import Cache

T = TypeVar("T")


class Lookup:
    """One call's key: the around that `Cache` chooses for it."""

    __slots__ = ("_cache", "_key")

    def __init__(self, cache: Cache, key: Hashable) -> None:
        self._cache = cache
        self._key = key

    async def around(self, call: Callable[[], Awaitable[T]]) -> T:
        """The value of the key, from memory or by a run in a task of its own."""
        entry, flight, leads = self._cache._find(self._key, running_loop)
        if entry is not None:
            value: T = entry.value
            if flight is not None:
                flight.start(call, keep=True)
            return value
        assert flight is not None
        try:
            if leads:
                flight.start(call)
            joined = flight.join()
            if joined is None:
                return await self._cache._aside(call)
            try:
                await flight.wait()
            finally:
                flight.leave(joined)
            self._cache._count(flight, leads=leads)
            return cast(T, flight.outcome())
        finally:
            del flight  # or an error, its traceback and this frame would be a cycle

    def around_sync(self, call: Callable[[], T]) -> T:
        """The same for plain functions: the first one in runs it, in its own thread."""
        while True:
            entry, flight, leads = self._cache._find(self._key, _no_loop)
            if flight is None:
                assert entry is not None
                return cast(T, entry.value)
            try:
                if not leads and (on_asyncio() or on_trio()):
                    flight, leads = self._cache._alone(self._key), True
                if leads:
                    flight.run(call)
                elif (joined := flight.join()) is None:
                    return self._cache._aside_sync(call)
                else:
                    try:
                        landed = flight.wait_sync()
                    finally:
                        flight.leave(joined)
                    if not landed:
                        continue
                if entry is None:
                    self._cache._count(flight, leads=leads)
                return cast(T, flight.outcome())
            finally:
                del flight


def _no_loop() -> object:
    return None
