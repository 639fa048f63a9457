"""OpenTelemetry spans: one for each guarded call, and one for each extra attempt of a retry or hedge."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from opentelemetry.context import Context, attach, get_current
from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    format_span_id,
    format_trace_id,
    get_current_span,
)
from opentelemetry.trace.propagation import set_span_in_context

from seawall.core import answering
from seawall.core.errors import Rejected
from seawall.core.watching import error_type, outcome_of

ATTRIBUTES = {
    "seawall.outcome": "What became of it: success, failure, rejected or cancelled.",
    "error.type": "The type of the exception, on failures and refusals alone.",
    "seawall.rejected_by": "The policy that refused the call.",
    "seawall.policy.name": "On an extra attempt: the policy that made it.",
    "seawall.attempt.type": "On an extra attempt: retry or hedge, as the span's name.",
    "seawall.attempt.number": "On an extra attempt: 2 for the first of them.",
    "seawall.batch.size": "On the span of a batch: how many requests it served, each of them a link.",
}


class CallSpan:
    """One span, current wherever its call is at work.

    What was current before is attached again by hand: OpenTelemetry's `detach` logs an error where a stream or a
    forgotten coroutine is closed in another context, and there nothing of ours is current anyway.
    """

    __slots__ = ("_before", "_own", "_recording", "_span", "sampled")

    def __init__(self, span: Span, before: Context) -> None:
        self._span = span
        self._before = before
        self._own = set_span_in_context(span, before)
        attach(self._own)
        self._recording = span.is_recording()
        self.sampled: tuple[str, str] | None = None
        if self._recording:
            context = span.get_span_context()
            if context.trace_flags.sampled:
                self.sampled = format_trace_id(context.trace_id), format_span_id(context.span_id)

    def enter(self) -> None:
        """Make it current here."""
        current = get_current()
        if current is self._own:
            return
        if current is not self._before:  # another task asks for the next item
            self._before, self._own = current, set_span_in_context(self._span, current)
        attach(self._own)

    def leave(self) -> None:
        """Let what was current before be so again."""
        if get_current() is self._own:
            attach(self._before)

    def end(self, exc: BaseException | None) -> None:
        """End it as what became of the call: failures and refusals are errors, cancellations are not."""
        self.leave()
        if self._recording:
            self._span.set_attribute("seawall.outcome", outcome_of(exc))
            if isinstance(exc, Exception):
                self._span.set_attribute("error.type", error_type(exc))
                self._span.set_status(Status(StatusCode.ERROR))
                if isinstance(exc, Rejected):
                    self._span.set_attribute("seawall.rejected_by", exc.policy)
        self._span.end()


_batches: list[Tracer] = []


@contextmanager
def batch_span(requests: Sequence[contextvars.Context]) -> Iterator[None]:
    """A span, where somebody records, that links to the span of each request a batch serves.

    For `MicroBatcher(backend, watch=batch_span)`; the requests wait in traces of their own, so it is a child of none.
    """
    if not _batches:
        yield
        return
    spans = [context.run(get_current_span).get_span_context() for context in requests]
    links = [Link(span) for span in {span.span_id: span for span in spans if span.is_valid}.values()]
    span = _batches[-1].start_span("batch", Context(), SpanKind.INTERNAL, {"seawall.batch.size": len(requests)}, links)
    call = CallSpan(span, get_current())
    try:
        yield
    except BaseException as exc:
        call.end(exc)
        raise
    call.end(None)


def watch_steps() -> Callable[[], None]:
    """Make each step of an engine such a batch; returns what stops that."""
    answering.watch_step = batch_span

    def stop() -> None:
        answering.watch_step = None

    return stop


class Spans:
    """Begins spans as children of whatever is current."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def watch_batches(self) -> Callable[[], None]:
        """Let `batch_span` record with this tracer; returns what stops that."""
        _batches.append(self._tracer)
        return lambda: _batches.remove(self._tracer)

    def call(self, name: str) -> CallSpan:
        """The span of a call."""
        before = get_current()
        return CallSpan(self._tracer.start_span(name, before, SpanKind.INTERNAL), before)

    def attempt(self, kind: str, policy: str, number: int) -> CallSpan:
        """The span of attempt `number` of a call."""
        before = get_current()
        attributes: dict[str, str | int] = {
            "seawall.attempt.number": number,
            "seawall.attempt.type": kind,
            "seawall.policy.name": policy,
        }
        return CallSpan(self._tracer.start_span(kind, before, SpanKind.INTERNAL, attributes), before)
