"""What an engine counts, and tells its listeners: for exporters it is a policy among others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from seawall.core import events, gate
from seawall.core.errors import Rejected
from seawall.core.events import CallRejected, Event, Listener
from seawall.core.policy import PolicyBase
from seawall.engine.answers import Usage
from seawall.engine.stepping import Memory

_EMPTY = Memory()
R = TypeVar("R", bound=Rejected)


@dataclass(frozen=True, slots=True)
class StepStuck(Event):
    """A step of an engine took too long and was told to stop."""

    seconds: float


@dataclass(frozen=True, slots=True)
class AnswerShed(Event):
    """Memory ran out, and an answer had to give its row back; fewer run at once for a while."""

    rows: int


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """An engine at one moment. Tokens and answers only grow; bytes are of the key/value cache.

    Attributes:
        running: answers that have a row.
        waiting: answers that wait for one.
        waiting_tokens: of prompt and longest answer together.
        rows: answers at once; fewer than it was made for, for a while, after memory ran out.
        cache_used_bytes: of tokens that are in use; what answers share counts once.
        cache_committed_bytes: of memory that is held, the prefix cache included.
        cache_bytes: there may be.
        prefix_queries: tokens of prompts that were looked up in the prefix cache.
        prefix_hits: those that it had.
        prompt_tokens: of whole answers, as the four after it.
        cached_tokens: see `Usage`.
        completion_tokens: see `Usage`.
        drafted_tokens: see `Usage`.
        accepted_tokens: see `Usage`.
        finished: answers that are whole.
        failed: answers that an error ended.
        cancelled: calls that nobody read to the end.
        rejected: calls that were refused.
        shed: answers that gave their row back since memory ran out.
        stuck: steps that took too long.
    """

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    rows: int = 0
    cache_used_bytes: int = 0
    cache_committed_bytes: int = 0
    cache_bytes: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    rejected: int = 0
    shed: int = 0
    stuck: int = 0


class EngineMeter(PolicyBase):
    """Counts what becomes of an engine's answers, for as long as there is the engine, opened once or again."""

    kind = "engine"

    def __init__(self, name: str, listeners: Iterable[Listener] = ()) -> None:
        super().__init__(name, listeners)
        # The scheduler's snapshots, while there is one, and prefix queries and hits of those before it: changed as one,
        # or who reads meanwhile would see a counter go back.
        self._standing: tuple[Callable[[], EngineSnapshot] | None, int, int] = (None, 0, 0)
        self._usage = [0] * 5
        self._outcomes = {"finished": 0, "failed": 0, "cancelled": 0, "rejected": 0, "shed": 0, "stuck": 0}
        self._register()

    def finished(self, usage: Usage) -> None:
        """An answer is whole."""
        took = (
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.drafted_tokens,
            usage.accepted_tokens,
        )
        with self._lock:
            self._outcomes["finished"] += 1
            self._usage = [one + more for one, more in zip(self._usage, took, strict=True)]

    def failed(self) -> None:
        """An error ended an answer."""
        self._count("failed")

    def cancelled(self) -> None:
        """A call was left before its end."""
        self._count("cancelled")

    def refused(self, error: R) -> R:
        """A call was refused, with an error that the caller raises."""
        self._count("rejected", CallRejected, error)
        return error

    def shed(self, rows: int) -> None:
        """Memory ran out, and so many rows are left."""
        self._count("shed", AnswerShed, rows)

    def stuck(self, seconds: float) -> None:
        """A step took too long."""
        self._count("stuck", StepStuck, seconds)

    def snapshot(self) -> EngineSnapshot:
        """The engine at this moment."""
        look, queries, hits = self._standing
        now = self.as_of() if look is None else look()
        return replace(now, prefix_queries=now.prefix_queries + queries, prefix_hits=now.prefix_hits + hits)

    def as_of(
        self, running: int = 0, waiting: int = 0, waiting_tokens: int = 0, rows: int = 0, memory: Memory = _EMPTY
    ) -> EngineSnapshot:
        """What was counted, beside how things stand with one scheduler."""
        with self._lock:
            return EngineSnapshot(running, waiting, waiting_tokens, rows, *memory, *self._usage, **self._outcomes)

    def open(self, look: Callable[[], EngineSnapshot]) -> None:
        """There is a scheduler, whose snapshots `look` gives."""
        _, queries, hits = self._standing
        self._standing = look, queries, hits

    def close(self) -> None:
        """The scheduler is gone; what it counted stays."""
        last = self.snapshot()
        self._standing = None, last.prefix_queries, last.prefix_hits

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters: answers by outcome, and tokens as metrics of their own."""
        now = self.snapshot()
        tokens = {
            "prompt_tokens.": now.prompt_tokens,
            "cached_tokens.": now.cached_tokens,
            "completion_tokens.": now.completion_tokens,
            "drafted_tokens.": now.drafted_tokens,
            "accepted_tokens.": now.accepted_tokens,
            "prefix_queries.": now.prefix_queries,
            "prefix_hits.": now.prefix_hits,
        }
        with self._lock:
            return {**self._outcomes, **tokens}

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters."""
        now = self.snapshot()
        return {
            "running": now.running,
            "waiting": now.waiting,
            "waiting_tokens": now.waiting_tokens,
            "rows": now.rows,
            "cache_used": now.cache_used_bytes,
            "cache_committed": now.cache_committed_bytes,
            "cache_limit": now.cache_bytes,
        }

    def _count(self, outcome: str, event: Callable[..., Event] | None = None, detail: object = None) -> None:
        with self._lock:
            self._outcomes[outcome] += 1
            if event is not None:
                self._emit(event, gate.clock(), detail)
        events.deliver()
