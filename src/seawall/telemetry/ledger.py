"""What all exporters read: counters that never go back, gauges and durations, under a bounded number of names."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from seawall.core import registry, watching
from seawall.core.locking import lock
from seawall.core.policy import PolicyBase
from seawall.core.watching import MOST_NAMES, OTHER, Histogram
from seawall.telemetry.readings import Reading, counters_of, gauges_of, merge_of

Attributes = tuple[tuple[str, str], ...]
Numbers = dict[str, dict[Attributes, float]]
Histograms = dict[str, dict[Attributes, Histogram]]

PIPELINE_DURATION = "seawall.pipeline.duration"


@dataclass(slots=True)
class Snapshot:
    """All numbers at one moment, by metric and attributes."""

    counters: Numbers = field(default_factory=dict)
    gauges: Numbers = field(default_factory=dict)
    histograms: Histograms = field(default_factory=dict)


class Ledger:
    """Reads the policies of this process.

    Policies come and go, and some share a name; a counter that went back would look like a restart and its past like
    a burst of calls. So what a policy counted stays in the books when it is gone, as far as it was read. The first 200
    names of a kind of policy keep their own label, all later ones share one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[str, set[str]] = defaultdict(set)
        self._last: dict[int, tuple[str, list[Reading]]] = {}  # by a policy's number: its kind, and what it told last
        self._gone: Numbers = {}  # of policies that are no more
        self._inherited: Snapshot = Snapshot()  # what a forked process had from its parent, which tells it itself
        self._sources: list[Callable[[], Histograms]] = [_pipelines]

    def add_source(self, histograms: Callable[[], Histograms]) -> None:
        """Read these as well."""
        if histograms not in self._sources:
            self._sources.append(histograms)

    def counters(self, kind: str | None = None) -> Numbers:
        """What only grows, of one kind of policy or of all."""
        with self._lock:
            alive = set()
            for number, policy in _policies(kind):
                alive.add(number)
                self._last[number] = policy.kind, [self._labelled(policy.kind, one) for one in counters_of(policy)]
            for number, (its, readings) in list(self._last.items()):
                if number not in alive and kind in (None, its):
                    _add(self._gone, readings)
                    del self._last[number]
            total = {metric: rows.copy() for metric, rows in self._gone.items()}
            for number in alive:
                _add(total, self._last[number][1])
            for metric, rows in self._inherited.counters.items():
                for attributes, value in rows.items() if metric in total else ():
                    total[metric][attributes] -= value
            return total

    def gauges(self, kind: str | None = None) -> Numbers:
        """What goes up and down. Where policies share a name, amounts add up, and of the rest the worst is told."""
        with self._lock:
            table: Numbers = {}
            for _, policy in _policies(kind):
                _add(table, (self._labelled(policy.kind, one) for one in gauges_of(policy)), merging=True)
            return table

    def histograms(self) -> Histograms:
        """Durations, and whatever else was added as a source."""
        found: Histograms = {}
        for source in self._sources:
            found |= source()
        for metric, rows in self._inherited.histograms.items():
            for attributes, before in rows.items():
                _subtract(found[metric][attributes], before)
        return found

    def snapshot(self) -> Snapshot:
        """All of it."""
        return Snapshot(self.counters(), self.gauges(), self.histograms())

    def disinherit(self) -> None:
        """In a forked child: what was counted until now is the parent's."""
        self._inherited = Snapshot()
        self._inherited = Snapshot(self.counters(), {}, self.histograms())

    def _labelled(self, kind: str, reading: Reading) -> Reading:
        (key, name), *rest = reading.attributes
        names = self._names[kind]
        if name not in names:
            if len(names) >= MOST_NAMES:
                return reading._replace(attributes=((key, OTHER), *rest))
            names.add(name)
        return reading


def _policies(kind: str | None) -> Iterator[tuple[int, PolicyBase]]:
    for number, policy in registry.numbered():
        if isinstance(policy, PolicyBase) and kind in (None, policy.kind):
            yield number, policy


def _pipelines() -> Histograms:
    """The durations of guarded calls."""
    rows: dict[Attributes, Histogram] = {}
    for site in watching.sites():
        site.refresh()
        with lock:
            for (outcome, error), histogram in [(("success", ""), site), *site.others.items()]:
                if any(histogram.counts):
                    attributes = (("pipeline.name", site.name), ("outcome", outcome), ("error.type", error))
                    rows[attributes] = histogram.copy()
    return {PIPELINE_DURATION: rows} if rows else {}


def _add(table: Numbers, readings: Iterable[Reading], *, merging: bool = False) -> None:
    for metric, attributes, value in readings:
        rows = table.setdefault(metric, {})
        if attributes in rows:
            rows[attributes] = merge_of(metric)(rows[attributes], value) if merging else rows[attributes] + value
        else:
            rows[attributes] = value


def _subtract(histogram: Histogram, before: Histogram) -> None:
    for bound, count in zip((*before.bounds, float("inf")), before.counts, strict=True):
        histogram.counts[bisect_left(histogram.bounds, bound)] -= count
    histogram.total -= before.total


def merged(snapshots: Iterable[tuple[Snapshot, bool]]) -> Snapshot:
    """The numbers of several processes as those of one. Of those that are not alive, only what only grows counts."""
    whole = Snapshot()
    for snapshot, alive in snapshots:
        for metric, rows in snapshot.counters.items():
            _add(whole.counters, (Reading(metric, *row) for row in rows.items()))
        if alive:
            for metric, rows in snapshot.gauges.items():
                _add(whole.gauges, (Reading(metric, *row) for row in rows.items()), merging=True)
        for metric, distributions in snapshot.histograms.items():
            known = whole.histograms.setdefault(metric, {})
            for attributes, histogram in distributions.items():
                known[attributes] = _joined(known.get(attributes), histogram)
    return whole


def _joined(one: Histogram | None, other: Histogram) -> Histogram:
    """Both, in the buckets that both have: of others nobody knows how to split them."""
    if one is None:
        return other.copy()
    joined = Histogram(one.bounds if one.bounds == other.bounds else tuple(sorted({*one.bounds} & {*other.bounds})))
    joined.total = one.total + other.total
    joined.exemplars = other.exemplars or one.exemplars if joined.bounds == one.bounds == other.bounds else None
    for part in (one, other):
        for bound, count in zip((*part.bounds, float("inf")), part.counts, strict=True):
            joined.counts[bisect_left(joined.bounds, bound)] += count
    return joined


ledger = Ledger()

if hasattr(os, "register_at_fork"):  # another thread may read as this one forks; the child would wait for ever
    _lock = ledger._lock
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
