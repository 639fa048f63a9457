"""Events as log records that belong to the span of their call."""

from __future__ import annotations

import asyncio
import json
import logging
import threading

import pytest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor

from seawall import CircuitBreaker, CircuitOpenError, Pipeline, Retry, StateChanged
from seawall.core.events import audience, pending
from seawall.telemetry import JSONFormatter, install


@pytest.fixture
def logger():
    logger = logging.Logger("test.events")  # noqa: LOG001 - of nobody else
    logger.records = []
    handler = logging.Handler()
    handler.emit = logger.records.append
    logger.addHandler(handler)
    return logger


def trip(error=ConnectionError):
    breaker = CircuitBreaker("payments", consecutive_failures=1)

    @Pipeline(breaker, name="pay")
    async def pay():
        raise error

    for expected in (error, CircuitOpenError):
        with pytest.raises(expected):
            asyncio.run(pay())


def test_an_event_is_a_record_with_its_attributes_and_the_trace_of_its_call(logger, provider):
    uninstall = install(logger=logger, tracer_provider=provider)
    trip()
    uninstall()
    opened, refused = logger.records
    failure, refusal = provider.finished()
    assert (opened.levelname, refused.levelname) == ("WARNING", "DEBUG")
    assert opened.getMessage().startswith("state_changed payments ")
    told = vars(opened)
    assert told["event.name"] == "seawall.state_changed"
    assert told["seawall.policy.name"] == "payments"
    assert told["seawall.after"] == "open"
    assert (told["trace_id"], told["span_id"]) == (
        f"{failure.context.trace_id:032x}",
        f"{failure.context.span_id:016x}",
    )
    assert vars(refused)["span_id"] == f"{refusal.context.span_id:016x}"
    assert vars(refused)["error.type"] == "CircuitOpenError"
    trip()
    assert len(logger.records) == 2  # taken back


def test_the_text_of_an_exception_is_not_logged(logger):
    uninstall = install(logger=logger)

    @Retry("r", on=ConnectionError, wait=0, attempts=2)
    def work():
        raise ConnectionError("password=hunter2")

    with pytest.raises(ConnectionError):
        work()
    uninstall()
    assert logger.records
    assert "hunter2" not in "".join(JSONFormatter().format(record) for record in logger.records)


def test_an_event_that_another_thread_delivers_keeps_the_context_of_its_call(logger, provider):
    uninstall = install(logger=logger, tracer_provider=provider)
    heard = []
    tracer = provider.get_tracer("app")
    with tracer.start_as_current_span("its own") as span:
        listeners = audience(())
    event = StateChanged("b", 0.0, "closed", "open")
    thread = threading.Thread(target=lambda: heard.extend(one(event) for one in listeners))
    thread.start()
    thread.join()
    uninstall()
    assert heard == [None]
    assert not pending
    assert vars(logger.records[0])["span_id"] == f"{span.get_span_context().span_id:016x}"


def test_opentelemetry_gets_records_with_a_name_a_severity_and_the_context_of_the_call(provider):
    exporter, loggers = InMemoryLogRecordExporter(), LoggerProvider()
    loggers.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    uninstall = install(logger_provider=loggers, tracer_provider=provider)
    trip()
    uninstall()
    opened, refused = (data.log_record for data in exporter.get_finished_logs())
    failure, refusal = provider.finished()
    assert (opened.event_name, refused.event_name) == ("seawall.state_changed", "seawall.call_rejected")
    assert (opened.severity_text, refused.severity_text) == ("WARN", "DEBUG")
    assert (opened.trace_id, opened.span_id) == (failure.context.trace_id, failure.context.span_id)
    assert refused.span_id == refusal.context.span_id
    assert refused.attributes["error.type"] == "CircuitOpenError"
    loggers.shutdown()


def test_events_of_spans_are_there_for_who_asks(provider):
    uninstall = install(tracer_provider=provider, span_events=True)
    trip()
    uninstall()
    failure, refusal = provider.finished()
    assert [event.name for event in failure.events] == ["seawall.state_changed"]
    assert [event.name for event in refusal.events] == ["seawall.call_rejected"]


def test_json_is_one_line_with_everything_whatever_was_logged():
    record = logging.makeLogRecord(
        {"name": "app", "levelname": "INFO", "msg": "two\nlines %s", "args": ("é",), "rate": float("nan"), "who": {1}}
    )
    line = JSONFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (found["message"], found["rate"], found["who"]) == ("two\nlines é", "nan", "{1}")
    try:
        raise LookupError("lost")
    except LookupError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert json.loads(JSONFormatter().format(record))["exception"].endswith("LookupError: lost\n")


def test_json_names_the_span_that_is_current(provider):
    with provider.get_tracer("app").start_as_current_span("request") as span:
        found = json.loads(JSONFormatter().format(logging.makeLogRecord({"msg": "hello"})))
    assert found["trace_id"] == f"{span.get_span_context().trace_id:032x}"


def test_structlog_takes_the_attributes_as_they_are(logger):
    structlog = pytest.importorskip("structlog")
    uninstall = install(logger=logger)
    trip()
    uninstall()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
    )
    found = json.loads(formatter.format(logger.records[0]))
    assert found["seawall.policy.name"] == "payments"
    assert found["event.name"] == "seawall.state_changed"
