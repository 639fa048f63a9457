"""Events as log records: of the standard library, of OpenTelemetry, or as events of the span they happened in."""

from __future__ import annotations

import datetime as dt
import inspect
import json
import logging
import math
import traceback
from collections.abc import Callable

from opentelemetry import _logs as otel_logs
from opentelemetry.context import get_current
from opentelemetry.trace import get_current_span

from seawall.core.events import Event, listen_in_context
from seawall.telemetry.happenings import attributes_of, current_trace, level_of, name_of

_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SEVERITIES = {
    logging.DEBUG: (otel_logs.SeverityNumber.DEBUG, "DEBUG"),
    logging.INFO: (otel_logs.SeverityNumber.INFO, "INFO"),
    logging.WARNING: (otel_logs.SeverityNumber.WARN, "WARN"),
}


def log_to(logger: logging.Logger) -> Callable[[], None]:
    """Log each event to `logger`, with its attributes and trace ids as `extra`; returns what stops that."""

    def write(event: Event) -> None:
        level = level_of(type(event))
        if logger.isEnabledFor(level):
            name, attributes = name_of(type(event)), attributes_of(event)
            told = {key: value for key, value in attributes.items() if key != "seawall.policy.name"}
            shown = "".join(f" {key.removeprefix('seawall.')}={value}" for key, value in told.items())
            extra = {"event.name": name, **attributes, **current_trace()}
            logger.log(level, "%s %s%s", name.removeprefix("seawall."), event.policy, shown, extra=extra)

    return listen_in_context(write)


def reaches_opentelemetry(logger: logging.Logger) -> bool:
    """Whether a handler of OpenTelemetry's, as its auto-instrumentation sets one, gets the records of `logger`."""
    above: logging.Logger | None = logger
    while above is not None:
        if any(type(handler).__module__.startswith("opentelemetry.") for handler in above.handlers):
            return True
        above = above.parent if above.propagate else None
    return False


def emit_to(logger: otel_logs.Logger) -> Callable[[], None]:
    """Emit each event as a log record of OpenTelemetry, in the context of its call; returns what stops that."""
    if "event_name" not in inspect.signature(otel_logs.LogRecord.__init__).parameters:  # pragma: no cover
        raise RuntimeError("logger_provider needs opentelemetry-api 1.35 or later, whose log records have event names")

    def write(event: Event) -> None:
        number, text = _SEVERITIES[level_of(type(event))]
        logger.emit(
            otel_logs.LogRecord(
                context=get_current(),
                severity_number=number,
                severity_text=text,
                attributes=attributes_of(event),
                event_name=name_of(type(event)),
            )
        )

    return listen_in_context(write)


def add_to_spans() -> Callable[[], None]:
    """Add each event to the span that is current where it happens; returns what stops that.

    For backends without logs: OpenTelemetry is giving up events of spans.
    """

    def write(event: Event) -> None:
        span = get_current_span()
        if span.is_recording():
            span.add_event(name_of(type(event)), attributes_of(event))

    return listen_in_context(write)


class JSONFormatter(logging.Formatter):
    """One JSON object a record and line: time, level, logger, message, trace ids, and whatever was given as `extra`.

    For any record, ours or not. Whoever uses structlog needs none: its `ExtraAdder` takes the same `extra`.

    Examples:
        >>> handler = logging.StreamHandler()
        >>> handler.setFormatter(JSONFormatter())
        >>> given = {"name": "shop", "levelname": "INFO", "msg": "sold", "items": 3, "created": 0}
        >>> JSONFormatter().format(logging.makeLogRecord(given))
        '{"timestamp": "1970-01-01T00:00:00.000000Z", "level": "INFO", "logger": "shop", "message": "sold", "items": 3}'
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line of JSON."""
        moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
        fields: dict[str, object] = {
            "timestamp": moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **current_trace(),
        }
        fields |= {key: value for key, value in vars(record).items() if key not in _USUAL}
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps({key: _finite(value) for key, value in fields.items()}, default=str)


def _finite(value: object) -> object:
    """JSON has no infinity and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
