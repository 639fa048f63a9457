import gc

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from seawall.core import answering, registry, watching
from seawall.telemetry import install
from seawall.telemetry.ledger import Ledger


@pytest.fixture
def provider():
    """A tracer provider whose spans end up in `provider.finished()`."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.finished = exporter.get_finished_spans
    return provider


@pytest.fixture
def spans(provider):
    """The finished spans, while seawall records its own."""
    uninstall = install(tracer_provider=provider)
    yield provider.finished
    uninstall()
    assert watching.tracer is None


@pytest.fixture(autouse=True)
def nobody_elses_policies():
    """Hide policies that other tests and fences left alive: thousands, which every collection would read."""
    kept = dict(registry._entries)
    registry._entries.clear()
    yield
    registry._entries.update({number: entry for number, entry in kept.items() if entry() is not None})


@pytest.fixture(autouse=True)
def nothing_is_left_on():
    yield
    assert (watching.tracer, watching.timing, watching.hooked) == (None, False, False)
    assert (answering.watch, answering.watch_step) == (None, None)


@pytest.fixture(autouse=True)
def fresh(nobody_elses_policies, monkeypatch):
    """No function, policy or error of another test is in the books, whose names are bounded in number."""
    gc.collect()
    monkeypatch.setattr(watching, "_sites", {})
    monkeypatch.setattr(watching, "_types", {})
    from seawall.telemetry import ledger as module

    book = Ledger()
    for name in ("_names", "_last", "_gone", "_inherited"):
        monkeypatch.setattr(module.ledger, name, getattr(book, name))
    return module.ledger
