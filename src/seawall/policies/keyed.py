"""A policy per key: each tenant or host has a breaker or a bulkhead of its own, and there are never too many."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, ParamSpec, Self, TypeVar, cast

from seawall.core import checks, gate, registry
from seawall.core.decorate import decorate
from seawall.core.gate import Row
from seawall.core.policy import PolicyBase
from seawall.core.protocol import Around, AroundPerCall, Guard, GuardPerCall, Judge, Token
from seawall.core.scope import Permit, Scope

P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V")
K = TypeVar("K", bound=Hashable)
_LOOKS = 32  # entries looked at to make room for one: what a call may cost the others while it has the lock


@dataclass(frozen=True, slots=True)
class KeyedSnapshot:
    """A keyed policy at one moment. Counters only grow."""

    keys: int
    created: int
    evicted: int


class _Entry:
    """One key's policy. `holders` are the calls in flight, and whoever else holds a view of it."""

    __slots__ = ("holders", "key", "policy", "used")

    def __init__(self, key: Hashable, policy: object) -> None:
        self.key = key
        self.policy = policy
        self.holders = 0
        self.used = -math.inf


class _View:
    """Holds one key's policy, so that it is not evicted, for as long as this object lives."""

    __slots__ = ("_entry", "_keyed", "policy")

    def __init__(self, keyed: _KeyedPolicy[Any], entry: _Entry) -> None:
        self._keyed = keyed
        self._entry = entry  # held already: `_hold` counted it
        self.policy = entry.policy

    def __del__(self) -> None:
        self._keyed._let_go(self._entry)

    @property
    def key(self) -> Hashable:
        """Whose policy it is."""
        return self._entry.key

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """`fn` behind the policy of this key."""
        return decorate(fn, (self,))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<{self._keyed!r} at {self.key!r}>"


class GuardAtKey(_View):
    """The guard of one key: for one call, for a block (`hosts["a"].scope()`), or to look at (`.policy`)."""

    __slots__ = ("_guard", "judges")

    def __init__(self, keyed: Keyed, entry: _Entry, guard: Guard) -> None:
        super().__init__(keyed, entry)
        self._guard = guard
        self.judges = bool(getattr(guard, "judges", False))

    def enter(self, now: float) -> Token:
        """Let the call in; see `Guard.enter`."""
        return self._guard.enter(now)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """The call ended; see `Guard.exit`."""
        self._guard.exit(token, now, exc)

    def judge(self, token: Token, result: object, exc: BaseException | None) -> None:
        """Look at the outcome; see `Judge.judge`."""
        cast(Judge, self._guard).judge(token, result, exc)

    def scope(self) -> Scope:
        """Guard one block: `async with hosts["a"].scope():`."""
        return Scope(Row((self,)))

    def admit(self) -> Permit:
        """Let one call in by hand, without waiting, and say later how it ended."""
        return Permit(Row((self,)))


class AroundAtKey(_View):
    """The around of one key: for one call, to decorate with, or to look at (`.policy`)."""

    __slots__ = ("_around",)

    def __init__(self, keyed: KeyedAround, entry: _Entry, around: Around) -> None:
        super().__init__(keyed, entry)
        self._around = around

    async def around(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run `call`; see `Around.around`."""
        return await self._around.around(call)

    def around_sync(self, call: Callable[[], T]) -> T:
        """Run `call`; see `Around.around_sync`."""
        return self._around.around_sync(call)


class _KeyedPolicy(PolicyBase, Generic[V]):
    """What keyed guards and arounds share: the policies by key, least recently used first."""

    kind = "keyed"

    def __init__(
        self,
        name: str,
        factory: Callable[[K], object],
        *,
        key: Callable[..., K],
        max_keys: int = 1024,
        idle: float | timedelta = 3600.0,
    ) -> None:
        super().__init__(name)
        self.factory: Callable[[Any], object] = checks.function("factory", factory, of="a key")
        self.key: Callable[..., Hashable] = checks.function("key", key, of="a call's arguments")
        self.max_keys = checks.count("max_keys", max_keys)
        self.idle = checks.seconds("idle", idle, infinite=True)
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._retired: Counter[str] = Counter()  # what the evicted ones counted
        self._created = 0
        self._evicted = 0
        self._evicting = False
        self._register()

    def _view(self, entry: _Entry, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> V:
        raise NotImplementedError

    def _check(self, policy: object) -> None:
        raise NotImplementedError

    def _for_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> V:
        entry = self._hold(self.key(*args, **kwargs))
        try:
            return self._view(entry, args, kwargs)
        except BaseException:
            self._let_go(entry)
            raise

    def __getitem__(self, key: Hashable) -> V:
        """A view of one key's policy, which is made if need be. It is not evicted while you hold the view."""
        entry = self._hold(key)
        try:
            return self._view(entry, (), {})
        except BaseException:
            self._let_go(entry)
            raise

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Hashable]:
        """The keys there are now, least recently used first."""
        with self._lock:
            return iter(list(self._entries))

    def _hold(self, key: Hashable) -> _Entry:
        try:
            hash(key)
        except TypeError as error:
            rule = "must be hashable (a string, number or tuple)"
            raise TypeError(f"a key of {self.name!r} {rule}, got {key!r}") from error
        made: _Entry | None = None
        while True:
            with self._lock:
                entry = self._entries.get(key)
                if entry is None and made is not None:
                    entry = self._entries[key] = made
                    self._created += 1
                if entry is not None:  # of two calls that made one, the slower takes the other's
                    entry.holders += 1
                    self._touch(entry)
                    return entry
            made = _Entry(key, self._make(key))  # the user's code, so without the lock

    def _make(self, key: Hashable) -> object:
        with registry.unlisted():  # exporters read its numbers from here
            policy = self.factory(key)
        self._check(policy)
        if getattr(policy, "needs_event_loop", False) or getattr(policy, "issues_deadlines", False):
            raise TypeError(f"{type(policy).__name__} remembers nothing, so one serves every key: put it beside")
        return policy

    def _let_go(self, entry: _Entry) -> None:
        with self._lock:
            entry.holders -= 1
            self._touch(entry)

    def _touch(self, entry: _Entry) -> None:
        """Just used. With the lock held."""
        now = entry.used = gate.clock()
        if self._entries.get(entry.key) is entry:
            self._entries.move_to_end(entry.key)
        oldest = next(iter(self._entries.values()), entry)
        due = len(self._entries) > self.max_keys or now - oldest.used >= self.idle
        if due and not self._evicting:  # else a finaliser dropped a view under the one who does
            self._evicting = True
            try:
                self._evict(now)
            finally:
                self._evicting = False

    def _evict(self, now: float) -> None:
        """Drop what is idle, and the least recently used of what is too many."""
        spare: _Entry | None = None
        for _ in range(min(_LOOKS, len(self._entries))):
            entry = next(iter(self._entries.values()))
            crowded = len(self._entries) > self.max_keys
            if not crowded and now - entry.used < self.idle:
                break
            if not entry.holders and _at_rest(entry.policy, now):
                self._drop(entry)
                continue
            if not entry.holders and spare is None:
                spare = entry  # it has something to remember, but memory has an end
            entry.used = now  # look at others first
            self._entries.move_to_end(entry.key)
        if spare is not None and len(self._entries) > self.max_keys:
            self._drop(spare)

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._retired.update(_counted(entry.policy))
        self._evicted += 1

    def _adopt(self, fresh: Self, now: float) -> None:
        self.factory, self.key = fresh.factory, fresh.key
        self.max_keys, self.idle = fresh.max_keys, fresh.idle

    def snapshot(self) -> KeyedSnapshot:
        """How many keys there are and were."""
        with self._lock:
            return KeyedSnapshot(keys=len(self._entries), created=self._created, evicted=self._evicted)

    def counters(self) -> dict[str, int]:
        """The counters of the policies of all keys, added up; those that are gone included."""
        with self._lock:
            total, entries = self._retired.copy(), list(self._entries.values())
        for entry in entries:
            total.update(_counted(entry.policy))
        return dict(total)

    def gauges(self) -> dict[str, float]:
        """How many keys there are."""
        return {"keys": len(self._entries)}


class Keyed(_KeyedPolicy[GuardAtKey]):
    """A guard per key: a breaker per host, a bulkhead per tenant.

    The key comes from the call's arguments, the policy from `factory(key)` when the key is new. The least recently used
    go when there are more than `max_keys`, and those that were idle for long; never one with calls in flight. One
    that has something to remember, as an open breaker has, is the last to go: policies say so in `at_rest(now)`.
    For limiters, `KeyedRateLimiter` does the same in a tenth of the memory.

    Args:
        name: labels metrics and logs. There is no metric per key: counters are added up over all keys.
        factory: makes the guard of a key.
        key: takes the call's arguments and returns its key: a string, number or tuple of them.
        max_keys: the most policies it keeps beside those in use.
        idle: seconds without a call after which a policy is dropped; `math.inf` for never.

    Examples:
        >>> from seawall import CircuitBreaker
        >>> hosts = Keyed("hosts", CircuitBreaker, key=lambda host, path: host)
        >>> @hosts
        ... def fetch(host: str, path: str) -> str: ...
        >>> fetch("example.org", "/")
        >>> hosts["example.org"].policy
        <CircuitBreaker 'example.org'>
    """

    judges = True  # some key's policy may; each view says whether its own does

    def guard_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GuardAtKey:
        """The guard of the key of a call with these arguments. What `key` and `factory` raise, the caller gets."""
        return self._for_call(args, kwargs)

    def _check(self, policy: object) -> None:
        if not isinstance(policy, (Guard, GuardPerCall)):
            hint = "; KeyedAround takes those that run the call" if isinstance(policy, (Around, AroundPerCall)) else ""
            raise TypeError(f"the factory of {self.name!r} must make guards, got {policy!r}{hint}")

    def _view(self, entry: _Entry, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GuardAtKey:
        policy = entry.policy
        guard = policy.guard_for(args, kwargs) if isinstance(policy, GuardPerCall) else cast(Guard, policy)
        return GuardAtKey(self, entry, guard)


class KeyedAround(_KeyedPolicy[AroundAtKey]):
    """An around per key: a retry per host, a cache per tenant. In all else like `Keyed`.

    Examples:
        >>> from seawall.policies.retry import Retry
        >>> hosts = KeyedAround("hosts", lambda host: Retry(host, on=ConnectionError), key=lambda host, path: host)
    """

    def around_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AroundAtKey:
        """The around of the key of a call with these arguments. What `key` and `factory` raise, the caller gets."""
        return self._for_call(args, kwargs)

    def _check(self, policy: object) -> None:
        if not isinstance(policy, (Around, AroundPerCall)):
            hint = "; Keyed takes guards" if isinstance(policy, (Guard, GuardPerCall)) else ""
            raise TypeError(f"the factory of {self.name!r} must make arounds, got {policy!r}{hint}")

    def _view(self, entry: _Entry, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AroundAtKey:
        policy = entry.policy
        around = policy.around_for(args, kwargs) if isinstance(policy, AroundPerCall) else cast(Around, policy)
        return AroundAtKey(self, entry, around)


def _at_rest(policy: object, now: float) -> bool:
    """Whether a new policy would do as well: the policy says so in `at_rest`, and one that can't say is."""
    ask = getattr(_inner(policy), "at_rest", None)
    return ask is None or bool(ask(now))


def _counted(policy: object) -> dict[str, int]:
    policy = _inner(policy)
    return policy.counters() if isinstance(policy, PolicyBase) else {}


def _inner(policy: object) -> object:
    """What a view such as `limiter.costing(5)` looks at, or the policy itself."""
    return getattr(policy, "policy", policy)
