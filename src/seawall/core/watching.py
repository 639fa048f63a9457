"""What telemetry sees of calls: how long they took, where somebody reads that, and spans, where somebody records.

Telemetry sets the switches below; core and policies know no exporter. With all of them off a call pays one or two
comparisons.
"""

from __future__ import annotations

import time
import weakref
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

from seawall.core import gate
from seawall.core.errors import Rejected
from seawall.core.events import ask
from seawall.core.locking import lock

T = TypeVar("T")

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)  # seconds; OTel's for HTTP
OTHER = "_other"  # the name of what would be too many names
MOST_NAMES = 200
MOST_ERRORS = 100


class Span(Protocol):
    """A span that somebody records, or only passes on. Begun, it is current."""

    sampled: tuple[str, str] | None  # trace and span id in hex, where it will be kept

    def enter(self) -> None:
        """Make it current in this context."""

    def leave(self) -> None:
        """Let what was current before be so again, if it is still current here."""

    def end(self, exc: BaseException | None) -> None:
        """The call or attempt ended with `exc`, or well."""


class Tracer(Protocol):
    """Begins spans."""

    def call(self, name: str) -> Span:
        """The span of a call."""

    def attempt(self, kind: str, policy: str, number: int) -> Span:
        """The span of an extra attempt, from number 2, that a policy of this kind and name makes."""


Recorder = Callable[[str, str, str, float], object]  # hears a call's name, outcome, error type and seconds

timing = False  # whether durations are counted
hooked = False  # whether calls have spans or a recorder
tracer: Tracer | None = None
_recorders: tuple[Recorder, ...] = ()
_readers = 0


class Exemplar(NamedTuple):
    """A call to look at: its span, how long it took, and when it ended, in seconds since the epoch."""

    trace_id: str
    span_id: str
    value: float
    at: float


class Histogram:
    """How many calls took how long; only grows. `counts` has one number a bound, and one for what is above all."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] | None = None  # by bucket, the latest

    def add(self, value: float) -> None:
        """Count one call; a bound belongs to the bucket below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def split(self, bound: float) -> None:
        """Tell calls below and above `bound` apart from now on; those before count as above."""
        place = bisect_left(self.bounds, bound)
        if place == len(self.bounds) or self.bounds[place] != bound:
            self.bounds = (*self.bounds[:place], bound, *self.bounds[place:])
            self.counts.insert(place, 0)
            self.exemplars = None

    def copy(self) -> Histogram:
        """One that stays as this is now."""
        copy = Histogram(self.bounds)
        copy.counts, copy.total = self.counts[:], self.total
        copy.exemplars = self.exemplars and dict(self.exemplars)
        return copy


class Site(Histogram):
    """The guarded calls of one name: how long the good ones took, and the others by outcome and type of error.

    Changed with the lock held. Frames of one name share it, also those that a pipeline makes for one call.
    """

    __slots__ = ("__weakref__", "_judges", "name", "others")

    def __init__(self, name: str) -> None:
        super().__init__(BOUNDS)
        self.name = name
        self.others: dict[tuple[str, str], Histogram] = {}
        self._judges: weakref.WeakSet[Any] = weakref.WeakSet()

    def judged_by(self, policies: Iterable[object]) -> None:
        """Have the latencies that these policies judge calls by among the bounds."""
        for policy in policies:
            if getattr(policy, "kind", None) == "slo" and policy not in self._judges:
                self._judges.add(policy)
        self.refresh()

    def refresh(self) -> None:
        """Follow the settings of policies, which may have changed."""
        for policy in list(self._judges):
            if (latency := getattr(policy, "latency", None)) is not None:
                with lock:
                    self.split(latency)
                    for other in self.others.values():
                        other.split(latency)

    def of(self, outcome: str, error: str) -> Histogram:
        """The calls that ended so."""
        if outcome == "success":
            return self
        found = self.others.get((outcome, error))
        if found is None:
            found = self.others[outcome, error] = Histogram(self.bounds)
        return found


_sites: dict[str, Site] = {}


def site(name: str, policies: Iterable[object] = ()) -> Site:
    """The calls of that name. Names beyond the first 200 share one."""
    with lock:
        found = _sites.get(name)
        if found is None:
            kept = name if len(_sites) < MOST_NAMES else OTHER
            found = _sites.get(kept)
            if found is None:
                found = _sites[kept] = Site(kept)
    found.judged_by(policies)
    return found


def sites() -> list[Site]:
    """All names so far."""
    with lock:
        return list(_sites.values())


_types: dict[str, str] = {}


def error_type(exc: BaseException) -> str:
    """A name for the kind of `exc`, one of few: its class, without a module if that is ours or Python's.

    Classes beyond the first 100 that were seen are `_OTHER`.

    Examples:
        >>> error_type(ConnectionError("gone")), error_type(Rejected("orders"))
        ('ConnectionError', 'Rejected')
    """
    kind = type(exc)
    module = kind.__module__
    own = module == "builtins" or module.partition(".")[0] == "seawall"
    name = kind.__qualname__ if own else f"{module}.{kind.__qualname__}"
    if name not in _types:
        if len(_types) >= MOST_ERRORS:
            return "_OTHER"
        _types[name] = name
    return name


def outcome_of(exc: BaseException | None) -> str:
    """What became of a call, in one word: success, rejected, failure or cancelled."""
    if exc is None:
        return "success"
    if isinstance(exc, Rejected):
        return "rejected"
    return "failure" if isinstance(exc, Exception) else "cancelled"


class Watch:
    """One call that somebody watches. Begun, its span is current."""

    __slots__ = ("_began", "_site", "_span")

    def __init__(self, site: Site, began: float, span: Span | None) -> None:
        self._site = site
        self._began = began
        self._span = span

    def enter(self) -> None:
        """The call goes on, here."""
        if self._span is not None:
            self._span.enter()

    def leave(self) -> None:
        """The call stands still: its stream waits for its consumer."""
        if self._span is not None:
            self._span.leave()

    def end(self, exc: BaseException | None) -> None:
        """The call ended with `exc`, or well."""
        seconds = gate.clock() - self._began
        outcome = outcome_of(exc)
        error = error_type(exc) if exc is not None and outcome != "cancelled" else ""
        if timing:
            with lock:
                histogram = self._site.of(outcome, error)
                histogram.add(seconds)
                if self._span is not None and self._span.sampled is not None:
                    if histogram.exemplars is None:
                        histogram.exemplars = {}
                    bucket = bisect_left(histogram.bounds, seconds)
                    histogram.exemplars[bucket] = Exemplar(*self._span.sampled, seconds, time.time())
        for record in _recorders:
            ask(record, self._site.name, outcome, error, seconds, otherwise=None)
        if self._span is not None:
            ask(self._span.end, exc, otherwise=None)


def begin(site: Site | None) -> Watch | None:
    """Begin to watch a call, where somebody does; a frame without a site is a part of a call."""
    if site is None or not (hooked or timing):
        return None
    span = None if tracer is None else ask(tracer.call, site.name, otherwise=None)
    return Watch(site, gate.clock(), span)


def late(site: Site | None, began: float | None) -> Watch | None:
    """A watch for a call that ends now, where nobody but readers of durations cares."""
    return Watch(site, gate.clock() if began is None else began, None) if timing and site is not None else None


def end(watch: Watch | None, exc: BaseException | None) -> None:
    """The call ended."""
    if watch is not None:
        watch.end(exc)


async def attempt(kind: str, policy: str, number: int, call: Callable[[], Awaitable[T]]) -> T:
    """`call`, attempt `number` of an around; the extra ones are spans where calls are."""
    span = None if tracer is None else ask(tracer.attempt, kind, policy, number, otherwise=None)
    if span is None:
        return await call()
    try:
        result = await call()
    except BaseException as exc:
        ask(span.end, exc, otherwise=None)
        raise
    ask(span.end, None, otherwise=None)
    return result


def attempt_sync(kind: str, policy: str, number: int, call: Callable[[], T]) -> T:
    """The same for a plain `call`."""
    span = None if tracer is None else ask(tracer.attempt, kind, policy, number, otherwise=None)
    if span is None:
        return call()
    try:
        result = call()
    except BaseException as exc:
        ask(span.end, exc, otherwise=None)
        raise
    ask(span.end, None, otherwise=None)
    return result


def trace_with(new: Tracer) -> Callable[[], None]:
    """Let `new` begin the spans of calls; returns what stops that. RuntimeError if another one does."""
    global tracer
    with lock:
        if tracer is not None:
            raise RuntimeError("spans are exported already; call what install() returned first")
        tracer = new
        _switch()

    def stop() -> None:
        global tracer
        with lock:
            tracer = None
            _switch()

    return stop


def record_with(recorder: Recorder) -> Callable[[], None]:
    """Tell `recorder` of each call; returns what stops that."""
    global _recorders
    with lock:
        _recorders = (*_recorders, recorder)
        _switch()

    def stop() -> None:
        global _recorders
        with lock:
            _recorders = tuple(one for one in _recorders if one is not recorder)
            _switch()

    return stop


def read_durations() -> Callable[[], None]:
    """Count durations from now on; returns what stops that."""
    global _readers
    with lock:
        _readers += 1
        _switch()

    def stop() -> None:
        global _readers
        with lock:
            _readers -= 1
            _switch()

    return stop


def _switch() -> None:
    global timing, hooked
    timing = _readers > 0
    hooked = tracer is not None or bool(_recorders)
