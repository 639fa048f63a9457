"""Answers of models by OpenTelemetry's conventions for generative AI: the one module that knows their names.

The conventions are of core version 1.41.1, the last one that held them (they moved to a repository of
their own, where names still change). Texts of prompts and answers are never recorded unless asked for.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from opentelemetry.context import get_current
from opentelemetry.metrics import Meter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from seawall.core import answering, gate
from seawall.core.answering import Answer, Asked
from seawall.core.events import ask
from seawall.core.watching import MOST_NAMES, OTHER, Histogram, error_type
from seawall.telemetry.ledger import Attributes, Histograms

SCOPE = "seawall.gen_ai"
VERSION = "1.41.1"
SCHEMA_URL = f"https://opentelemetry.io/schemas/{VERSION}"
CHAT, COMPLETION, EMBEDDINGS = "chat", "text_completion", "embeddings"
PROVIDER = "onnxruntime"

_LONG = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


class Convention(NamedTuple):
    """A metric as the conventions have it."""

    unit: str
    bounds: tuple[float, ...]
    text: str


REQUEST = "gen_ai.server.request.duration"
FIRST_TOKEN = "gen_ai.server.time_to_first_token"  # noqa: S105 - a token of text
PER_TOKEN = "gen_ai.server.time_per_output_token"  # noqa: S105
USAGE = "gen_ai.client.token.usage"
METRICS = {
    REQUEST: Convention("s", _LONG, "Seconds from the question to the last token, waiting included."),
    FIRST_TOKEN: Convention(
        "s",
        (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
        "Seconds from the question to the first token of a whole answer.",
    ),
    PER_TOKEN: Convention(
        "s",
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
        "Seconds per token after the first, of a whole answer.",
    ),
    USAGE: Convention("{token}", tuple(4.0**power for power in range(14)), "Tokens read and written, by answer."),
}

ATTRIBUTES = {
    "gen_ai.operation.name": "`chat`, `text_completion` without the template for chats, or `embeddings`.",
    "gen_ai.provider.name": "`onnxruntime`.",
    "gen_ai.request.model": "The name of the engine or embedder.",
    "gen_ai.request.max_tokens": "As asked.",
    "gen_ai.request.temperature": "As asked; 0 is greedy.",
    "gen_ai.request.top_p": "As asked.",
    "gen_ai.request.seed": "As asked, if it was.",
    "gen_ai.request.choice.count": "How many answers were asked for, if not one.",
    "gen_ai.embeddings.dimension.count": "Length of a vector, on embeddings.",
    "gen_ai.usage.input_tokens": "Tokens of the prompt, or of all texts that were embedded.",
    "gen_ai.usage.output_tokens": "Tokens of the answer.",
    "gen_ai.response.time_to_first_chunk": "Seconds to the first token.",
    "gen_ai.response.finish_reasons": "`stop` or `length`, for a whole answer.",
    "error.type": "The type of the exception, where it failed.",
    "gen_ai.input.messages": "The prompt as JSON; only with `prompts=True`.",
    "gen_ai.output.messages": "The answer as JSON; only with `prompts=True`.",
}

Record = Callable[[str, float, Attributes], object]


class Answers:
    """Watches answers: counts them for whoever reads `histograms`, and tells spans and records where wanted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._histograms: Histograms = {}
        self._models: set[str] = set()
        self.tracer: Tracer | None = None
        self.records: tuple[Record, ...] = ()
        self.texts = False

    def begin(self, asked: Asked) -> _Answer:
        """An answer begins."""
        return _Answer(self, asked)

    def model(self, name: str) -> str:
        """The model's name, while there are few of them."""
        with self.lock:
            if name not in self._models and len(self._models) >= MOST_NAMES:
                return OTHER
            self._models.add(name)
            return name

    def count(self, metric: str, value: float, attributes: Attributes) -> None:
        """Count one value of a metric."""
        with self.lock:
            rows = self._histograms.setdefault(metric, {})
            if attributes not in rows:
                rows[attributes] = Histogram(METRICS[metric].bounds)
            rows[attributes].add(value)
        for record in self.records:
            ask(record, metric, value, attributes, otherwise=None)

    def histograms(self) -> Histograms:
        """All that was counted."""
        with self.lock:
            return {
                metric: {attributes: one.copy() for attributes, one in rows.items()}
                for metric, rows in self._histograms.items()
            }


class _Answer(Answer):
    """One answer. Its span is never current: it lives across the pieces of a stream."""

    def __init__(self, answers: Answers, asked: Asked) -> None:
        self._answers = answers
        self._asked = asked
        self._model = answers.model(asked.model)
        self._operation = CHAT if asked.chat else COMPLETION
        self._began = self._first = gate.clock()
        self._input = self._output = 0
        self._finish: dict[int, str] = {}  # of each sample
        self._texts: dict[int, list[str]] = {}
        self._span: Span | None = None
        if answers.tracer is not None:
            self._span = answers.tracer.start_span(
                f"{self._operation} {self._model}", get_current(), SpanKind.INTERNAL, self._request()
            )

    def _request(self) -> dict[str, str | int | float | bool]:
        asked = self._asked
        attributes: dict[str, str | int | float | bool] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self._model,
            "gen_ai.request.max_tokens": asked.max_tokens,
            "gen_ai.request.temperature": asked.temperature,
            "gen_ai.request.top_p": asked.top_p,
        }
        if asked.seed is not None:
            attributes["gen_ai.request.seed"] = asked.seed
        if asked.samples != 1:
            attributes["gen_ai.request.choice.count"] = asked.samples
        if self._answers.texts:
            attributes["gen_ai.input.messages"] = json.dumps(_messages(asked.prompt))
        return attributes

    def read(self, tokens: int) -> None:
        """The prompt has so many tokens."""
        self._input = tokens

    def piece(self, text: str, finish: str | None, sample: int = 0) -> None:
        """One more token came."""
        self._output += 1
        if finish is not None:
            self._finish[sample] = finish
        if self._output == 1:
            self._first = gate.clock()
        if self._answers.texts:
            self._texts.setdefault(sample, []).append(text)

    def end(self, exc: BaseException | None) -> None:
        """The answer is whole, or ended with `exc`."""
        now = gate.clock()
        common = _common(self._operation, self._model)
        count = self._answers.count
        count(REQUEST, now - self._began, common + _failed(exc))
        if exc is None and self._output:
            count(FIRST_TOKEN, self._first - self._began, common)
            each = self._output / self._asked.samples  # tokens of a sample; all of them grow at once
            if each > 1:
                count(PER_TOKEN, (now - self._first) / (each - 1), common)
        if self._input:
            count(USAGE, self._input, (*common, ("gen_ai.token.type", "input")))
            count(USAGE, self._output, (*common, ("gen_ai.token.type", "output")))
        if self._span is not None:
            self._end_span(self._span, exc)

    def _end_span(self, span: Span, exc: BaseException | None) -> None:
        if span.is_recording():
            span.set_attribute("gen_ai.usage.input_tokens", self._input)
            span.set_attribute("gen_ai.usage.output_tokens", self._output)
            if self._output:
                span.set_attribute("gen_ai.response.time_to_first_chunk", self._first - self._began)
            if self._finish:
                span.set_attribute("gen_ai.response.finish_reasons", list(self._finish.values()))
            if self._answers.texts:
                told = [
                    {**_message("assistant", "".join(texts)), "finish_reason": self._finish.get(sample, "error")}
                    for sample, texts in self._texts.items()
                ]
                span.set_attribute("gen_ai.output.messages", json.dumps(told))
            _mark(span, exc)
        span.end()


class _Embedding:
    """One call of an embedder."""

    def __init__(self, answers: Answers, model: str, dimension: int) -> None:
        self._answers = answers
        self._common = _common(EMBEDDINGS, answers.model(model))
        self._began = gate.clock()
        self._tokens = 0
        self._span: Span | None = None
        if answers.tracer is not None:
            attributes: dict[str, str | int] = {**dict(self._common), "gen_ai.embeddings.dimension.count": dimension}
            self._span = answers.tracer.start_span(
                f"{EMBEDDINGS} {self._common[-1][1]}", get_current(), SpanKind.INTERNAL, attributes
            )

    def read(self, tokens: int) -> None:
        """The texts have so many tokens."""
        self._tokens = tokens

    def end(self, exc: BaseException | None) -> None:
        """The vectors are there, or it ended with `exc`."""
        self._answers.count(REQUEST, gate.clock() - self._began, self._common + _failed(exc))
        if self._tokens:
            self._answers.count(USAGE, self._tokens, (*self._common, ("gen_ai.token.type", "input")))
        if self._span is not None:
            if self._span.is_recording():
                self._span.set_attribute("gen_ai.usage.input_tokens", self._tokens)
                _mark(self._span, exc)
            self._span.end()


@contextmanager
def embeddings(model: str, dimension: int) -> Iterator[Callable[[int], object]]:
    """Tell of texts that become vectors in this block, where `install` has switched it on; the block says their tokens.

    For `Embedder.load(watch=embeddings)`.
    """
    one = None if answering.watch is None else ask(_Embedding, answers, model, dimension, otherwise=None)
    if one is None:
        yield _nobody
        return
    try:
        yield one.read
    except BaseException as exc:
        ask(one.end, exc, otherwise=None)
        raise
    ask(one.end, None, otherwise=None)


def _nobody(tokens: int) -> None:
    """Whom nobody watches tells it to this."""


def _common(operation: str, model: str) -> Attributes:
    return (
        ("gen_ai.operation.name", operation),
        ("gen_ai.provider.name", PROVIDER),
        ("gen_ai.request.model", model),
    )


def _failed(exc: BaseException | None) -> Attributes:
    return (("error.type", error_type(exc)),) if isinstance(exc, Exception) else ()


def _mark(span: Span, exc: BaseException | None) -> None:
    if isinstance(exc, Exception):
        span.set_attribute("error.type", error_type(exc))
        span.set_status(Status(StatusCode.ERROR))


def _messages(prompt: str | Sequence[Mapping[str, str]] | Sequence[int]) -> list[dict[str, object]]:
    """A prompt as the conventions have it; of one that came as tokens, nobody knows the text."""
    if isinstance(prompt, str):
        return [_message("user", prompt)]
    return [_message(one.get("role"), one.get("content")) for one in prompt if isinstance(one, Mapping)]


def _message(role: str | None, content: str | None) -> dict[str, object]:
    return {"role": role, "parts": [{"type": "text", "content": content}]}


answers = Answers()
_watchers = 0
if hasattr(os, "register_at_fork"):  # another thread may hold it as this one forks
    _lock = answers.lock
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def watch() -> Callable[[], None]:
    """Watch answers from now on; returns what stops that."""
    global _watchers
    _watchers += 1
    answering.watch = answers.begin

    def stop() -> None:
        global _watchers
        _watchers -= 1
        if not _watchers:
            answering.watch = None

    return stop


def trace_with(tracer: Tracer, *, texts: bool) -> Callable[[], None]:
    """Make each answer a span, with the texts of prompt and answer if told; returns what stops that."""
    answers.tracer, answers.texts = tracer, texts

    def stop() -> None:
        answers.tracer, answers.texts = None, False

    return stop


def record_with(meter: Meter) -> Callable[[], None]:
    """Record each answer in histograms; returns what stops that. They are few, and cost microseconds an answer."""
    histograms = {
        metric: meter.create_histogram(
            metric, convention.unit, convention.text, explicit_bucket_boundaries_advisory=convention.bounds
        )
        for metric, convention in METRICS.items()
    }

    def record(metric: str, value: float, attributes: Attributes) -> None:
        histograms[metric].record(value, dict(attributes))

    answers.records = (*answers.records, record)

    def stop() -> None:
        answers.records = tuple(one for one in answers.records if one is not record)

    return stop
