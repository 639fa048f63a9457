"""The cache itself: what it remembers, for how long, and who runs the function when it does not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

from seawall.core import checks, events, gate
from seawall.core.events import Event, Listener, ask
from seawall.core.policy import PolicyBase
from seawall.core.protocol import Around
from seawall.core.tasks import is_closed
from seawall.policies.cache.flight import Flight
from seawall.policies.cache.lookup import Lookup

T = TypeVar("T")
_KEYWORDS = object()  # between positional and keyword arguments in a key


@dataclass(frozen=True, slots=True)
class StaleAnswered(Event):
    """A run failed with `error`, and who waited for it was answered with a value `age` seconds old."""

    error: BaseException
    age: float


@dataclass(frozen=True, slots=True)
class RefreshFailed(Event):
    """A run ahead of time failed with `error`; the value stays good until its time is over."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """A cache at one moment: values it holds, and runs in flight. Counters only grow.

    A call that ended is one of the first four: it was answered from memory, by a run of its own, by another call's
    run, or by an old value because the run failed.
    """

    hits: int
    misses: int
    shared: int
    stale: int
    refreshes: int
    evictions: int
    entries: int
    flights: int


class _Entry:
    __slots__ = ("at", "refreshing", "value")

    def __init__(self, value: Any, at: float) -> None:
        self.value = value
        self.at = at
        self.refreshing = False  # somebody runs the function ahead of time, or tried


class Cache(PolicyBase):
    """Remembers what a function returned for its arguments, and lets calls with the same ones share one run.

    A run belongs to no caller: it goes on when one of those that wait is cancelled, the first included, and is
    cancelled with the last. Its error goes to all who wait, unless there is a value that was good not `stale_ttl` ago:
    that is the answer then. A full cache forgets what was not asked for longest.

    Values are shared, not copied: who changes one changes it for all. The default key is the arguments themselves, as
    in `functools.lru_cache` (`self` included, which it keeps alive; 1 and True are the same). One cache holds the
    results of one function. On an event loop a run has its own task, a copy of the first caller's context and no
    deadline; each loop has runs of its own, and all share the values. A plain function runs in the thread of its first
    caller; on a thread that runs an event loop it waits for nobody, and runs itself.

    Args:
        name: labels events and metrics.
        ttl: seconds that a value is good for; 0 remembers nothing, so that only concurrent calls share.
        key: makes the key from the arguments; they themselves unless told.
        max_entries: values to hold at most.
        stale_ttl: seconds past `ttl` in which a failed run is answered with the old value.
        refresh_ahead: seconds before the end of `ttl` from which on a call is answered at once and starts a run in the
            background; a plain function's caller runs it, and has the old value if that fails.
        on: exceptions that an old value may answer for.
        cache_if: says of a result whether to remember it; all are, unless told.
        listeners: called with its `StaleAnswered` and `RefreshFailed` events.

    Raises:
        TypeError: from a call whose key can't be hashed, and when it decorates a second function.

    Examples:
        >>> prices = Cache("prices", ttl=60, stale_ttl=3600)
        >>> @prices
        ... def price(item: str) -> float:
        ...     print("asking for", item)
        ...     return 9.5
        >>> price("tea"), price("tea")
        asking for tea
        (9.5, 9.5)
    """

    kind = "cache"

    def __init__(
        self,
        name: str,
        *,
        ttl: float | timedelta,
        key: Callable[..., Hashable] | None = None,
        max_entries: int = 1024,
        stale_ttl: float | timedelta = 0.0,
        refresh_ahead: float | timedelta = 0.0,
        on: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        cache_if: Callable[..., bool] | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        self.ttl = checks.seconds("ttl", ttl, zero=True, infinite=True)
        self.key: Callable[..., Hashable] | None = None if key is None else checks.function("key", key)
        self.max_entries = checks.count("max_entries", max_entries)
        self.stale_ttl = checks.seconds("stale_ttl", stale_ttl, zero=True, infinite=True)
        self.refresh_ahead = checks.seconds("refresh_ahead", refresh_ahead, zero=True)
        if self.refresh_ahead > self.ttl:
            raise ValueError(f"refresh_ahead must be at most ttl ({self.ttl:g} s), got {refresh_ahead!r}")
        self.on = checks.exceptions("on", on)
        self.cache_if: Callable[..., bool] | None = None if cache_if is None else checks.function("cache_if", cache_if)
        self._fn: Callable[..., Any] | None = None
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # least recently asked for first
        self._flights: dict[object, dict[Hashable, Flight[Any]]] = {}  # by event loop; None for threads
        self._hits = 0
        self._misses = 0
        self._shared = 0
        self._stale = 0
        self._refreshes = 0
        self._evictions = 0
        self._register()

    def claim(self, fn: Callable[..., Any]) -> None:
        """Hold the results of `fn`, and of no other function.

        Raises:
            TypeError: if it holds those of another.
        """
        with self._lock:
            if self._fn is None:
                self._fn = fn
        if self._fn != fn:
            raise TypeError(
                f"Cache {self.name!r} holds the results of {self._fn!r}, and equal arguments of {fn!r} would get them; "
                "make another one for that"
            )

    def around_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Around:
        """The look-up of the call with these arguments."""
        return Lookup(self, self._key_of(args, kwargs))

    def answer_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
        """True and the value of the call with these arguments, where it is remembered and fresh; else its look-up."""
        key = self._key_of(args, kwargs)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                left = self.ttl - (gate.clock() - entry.at)
                if left > self.refresh_ahead or (left > 0 and entry.refreshing):
                    self._entries.move_to_end(key)
                    self._hits += 1
                    return True, entry.value
        return False, Lookup(self, key)

    def _key_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
        key: Hashable
        if self.key is not None:
            key = self.key(*args, **kwargs)
        elif kwargs:
            key = (*args, _KEYWORDS, *sorted(kwargs.items()))
        else:
            key = args
        try:
            hash(key)
        except TypeError as error:
            cure = "its `key` must return" if self.key else "give it a `key`, a function of the arguments that returns"
            raise TypeError(f"Cache {self.name!r} can't use {error}; {cure} something to hash") from error
        return key

    def _find(self, key: Hashable, loop: Callable[[], object]) -> tuple[_Entry | None, Flight[Any] | None, bool]:
        """The entry that answers a call, if one does; the run to wait for, or to start, in which case it `leads`."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                left = self.ttl - (gate.clock() - entry.at)
                if left > 0:
                    self._entries.move_to_end(key)
                    self._hits += 1
                    if left > self.refresh_ahead or entry.refreshing:
                        return entry, None, False
                    entry.refreshing = True
                    self._refreshes += 1
                    return entry, self._take_off(key, loop()), True
            where = loop()
            flight = self._flights.get(where, {}).get(key)
            if flight is None or flight.given_up:
                return None, self._take_off(key, where), True
            return None, flight, False

    def _take_off(self, key: Hashable, where: object) -> Flight[Any]:
        flights = self._flights.get(where)
        if flights is None:
            for other in [other for other in self._flights if is_closed(other)]:
                del self._flights[other]
            flights = self._flights[where] = {}
        flight: Flight[Any] = Flight(lambda *outcome: self._landed(key, where, *outcome))
        flights[key] = flight
        return flight

    def _alone(self, key: Hashable) -> Flight[Any]:
        """A run that nobody else shares."""
        return Flight(lambda *outcome: self._landed(key, None, *outcome))

    def _landed(
        self, key: Hashable, where: object, flight: Flight[Any], result: Any, exc: BaseException | None
    ) -> None:
        """A run has ended: remember its result, or see whether an old one can stand in for it."""
        cache_if = self.cache_if
        good = exc is None and (cache_if is None or ask(lambda: bool(cache_if(result)), otherwise=False))
        gone: list[object] = []  # let go of without the lock: it may be the last reference
        event: tuple[Any, ...] | None = None
        with self._lock:
            flights = self._flights.get(where, {})
            forgotten = flights.get(key) is not flight  # invalidated meanwhile, so what it found out may be old
            if not forgotten:
                del flights[key]
                if not flights:
                    del self._flights[where]
            if flight.given_up:  # what it returned, being cancelled, may be half of it
                pass
            elif good and not forgotten and self.ttl + self.stale_ttl > 0:
                self._remember(key, result, gone)
            elif exc is not None:
                event = self._stand_in(key, flight, exc, gone)
        if event is not None:
            self._tell(*event)
        del gone

    def _remember(self, key: Hashable, value: object, gone: list[object]) -> None:
        gone.append(self._entries.pop(key, None))
        self._entries[key] = _Entry(value, gate.clock())
        while len(self._entries) > self.max_entries:
            gone.append(self._entries.popitem(last=False))
            self._evictions += 1

    def _stand_in(
        self, key: Hashable, flight: Flight[Any], exc: BaseException, gone: list[object]
    ) -> tuple[Any, ...] | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        age = gate.clock() - entry.at
        if age < self.ttl and isinstance(exc, Exception):
            flight.answer(entry.value, stale=False)
            return RefreshFailed, exc
        if age < self.ttl + self.stale_ttl and isinstance(exc, self.on):
            self._entries.move_to_end(key)
            flight.answer(entry.value, stale=True)
            return StaleAnswered, exc, age
        if age >= self.ttl + self.stale_ttl:
            gone.append(self._entries.pop(key))
        return None

    def _count(self, flight: Flight[Any], *, leads: bool) -> None:
        with self._lock:
            if flight.stale:
                self._stale += 1
            elif leads:
                self._misses += 1
            else:
                self._shared += 1

    async def _aside(self, call: Callable[[], Awaitable[T]]) -> T:
        with self._lock:
            self._misses += 1
        return await call()

    def _aside_sync(self, call: Callable[[], T]) -> T:
        with self._lock:
            self._misses += 1
        return call()

    def invalidate(self, *args: object, **kwargs: object) -> bool:
        """Forget the value for these arguments; whether there was one. A run in flight is not remembered either."""
        key = self._key_of(args, kwargs)
        with self._lock:
            for flights in self._flights.values():
                flights.pop(key, None)
            entry = self._entries.pop(key, None)
        return entry is not None

    def clear(self) -> None:
        """Forget all values. Runs in flight are not remembered either."""
        with self._lock:
            self._flights.clear()
            entries, self._entries = self._entries, OrderedDict()
        del entries  # without the lock: values may have finalisers

    def _adopt(self, fresh: Self, now: float) -> None:
        if fresh.key is not self.key:
            self._entries.clear()
            self._flights.clear()
        self.ttl, self.stale_ttl, self.refresh_ahead = fresh.ttl, fresh.stale_ttl, fresh.refresh_ahead
        self.key, self.max_entries, self.on, self.cache_if = fresh.key, fresh.max_entries, fresh.on, fresh.cache_if
        while len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)
            self._evictions += 1

    def snapshot(self) -> CacheSnapshot:
        """What it holds and has counted, at one moment."""
        with self._lock:
            return CacheSnapshot(
                hits=self._hits,
                misses=self._misses,
                shared=self._shared,
                stale=self._stale,
                refreshes=self._refreshes,
                evictions=self._evictions,
                entries=len(self._entries),
                flights=sum(map(len, self._flights.values())),
            )

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters."""
        snapshot = self.snapshot()
        return {
            "hits": snapshot.hits,
            "misses": snapshot.misses,
            "shared": snapshot.shared,
            "stale": snapshot.stale,
            "refreshes": snapshot.refreshes,
            "evictions": snapshot.evictions,
        }

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        snapshot = self.snapshot()
        return {"entries": snapshot.entries, "flights": snapshot.flights}

    def _tell(self, event: Callable[..., Event], *details: object) -> None:
        if events.audience(self._listeners):
            with self._lock:
                self._emit(event, gate.clock(), *details)
            events.deliver()
