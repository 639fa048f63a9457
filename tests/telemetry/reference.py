"""Writes docs/telemetry-reference.md from the code: `python tests/telemetry/reference.py`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import logging
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import seawall
from seawall import (
    SLO,
    AdaptiveBulkhead,
    Bulkhead,
    Cache,
    Chaos,
    CircuitBreaker,
    Deadline,
    Fallback,
    Hedge,
    Keyed,
    LoadShedder,
    RateLimiter,
    Retry,
    RetryBudget,
    Timeout,
)
from seawall.core.events import Event
from seawall.core.policy import PolicyBase
from seawall.core.watching import BOUNDS, MOST_ERRORS, MOST_NAMES, error_type
from seawall.engine import Deployment, Replicas, Supervised
from seawall.engine.metering import EngineMeter
from seawall.slo.brownout import BrownOut, Refuse
from seawall.telemetry import gen_ai, spans
from seawall.telemetry.happenings import level_of, name_of
from seawall.telemetry.ledger import PIPELINE_DURATION
from seawall.telemetry.names import prometheus_name
from seawall.telemetry.otel import PIPELINE_CALLS
from seawall.telemetry.readings import DESCRIPTIONS, counters_of, gauges_of, is_counter, unit_of

PAGE = Path(__file__).parent.parent.parent / "docs" / "telemetry-reference.md"
HEAD = f"""# Telemetry reference

<!-- Written by tests/telemetry/reference.py from the code; change that, and run it. -->

All that [telemetry](telemetry.md) exports. Of the names of one kind of policy, of functions, of models, the first
{MOST_NAMES} are told apart, and of error types the first {MOST_ERRORS}; all later ones share `_other` (`_OTHER`).
"""
SHARED_NAMES = """In Prometheus the dots of attributes are underscores too. Where policies of one kind share a name,
amounts are added up, and of shares and states the worst one is told.
"""
ANSWERS = f"""Scope `{gen_ai.SCOPE}`, conventions {gen_ai.VERSION}; histograms with `gen_ai.operation.name`,
`gen_ai.provider.name`, `gen_ai.request.model`, and `error.type` or `gen_ai.token.type`.
"""
NAMES = """A guarded call has the name of its pipeline, or of the function; an extra attempt is `retry` or `hedge`;
a batch is `batch`; an answer is its operation and the name of the engine or embedder. All are of kind INTERNAL.
"""


def policies() -> list[PolicyBase]:
    """One of each kind."""
    hosts = Keyed("n", CircuitBreaker, key=str)
    hosts(len)("host")
    return [
        SLO("n", target=0.9, latency=0.3, percentiles=True),
        BrownOut("n", [Refuse()]),
        CircuitBreaker("n"),
        Bulkhead("n", max_concurrent=1),
        AdaptiveBulkhead("n"),
        RateLimiter("n", rate=1.0),
        Timeout("n", 1.0),
        Deadline("n", 1.0),
        Retry("n", on=KeyError),
        RetryBudget("n"),
        Hedge("n", delay=1.0),
        Fallback("n", value=0),
        Cache("n", ttl=1.0),
        LoadShedder("n"),
        Chaos("n", exception=KeyError),
        EngineMeter("n"),
        hosts,
        Deployment("n", io.StringIO()),  # anything that closes
        Supervised("n", io.StringIO),
        Replicas("n", {"a": io.StringIO()}),
    ]


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def attributes() -> dict[str, dict[str, list[str]]]:
    """The attributes of each metric of policies, with the values they may have where these are few."""
    found: dict[str, dict[str, list[str]]] = {}
    for policy in policies():
        for reading in (*counters_of(policy), *gauges_of(policy)):
            known = found.setdefault(reading.metric, {})
            for key, value in reading.attributes:
                values = known.setdefault(key, [])
                if key != "policy.name" and value not in values:
                    values.append(value)
    return found


def told(given: dict[str, list[str]]) -> str:
    """Attributes as a cell."""
    return "; ".join(f"`{key}`" + (f" = {', '.join(values)}" if values else "") for key, values in given.items())


def metrics() -> Iterator[list[str]]:
    """The metrics of policies."""
    known = attributes()
    for metric, text in DESCRIPTIONS.items():
        if metric != PIPELINE_DURATION:
            counter = is_counter(metric)
            name = prometheus_name(metric) + ("_total" if counter else "")
            given = told(known.get(metric, {"policy.name": []}))
            kind = "counter" if counter else "gauge"
            yield [f"`{metric}`", f"`{name}`", kind, f"`{unit_of(metric)}`", given, text]


def subclasses(kind: type) -> list[type]:
    """All of them that are public, by name."""
    for module in pkgutil.walk_packages(seawall.__path__, "seawall."):
        if not module.name.endswith(("__main__", "pytest_plugin")):
            importlib.import_module(module.name)
    found, left = set(), [kind]
    while left:
        one = left.pop()
        left += one.__subclasses__()
        # a dataclass with slots leaves its first version behind
        named = getattr(sys.modules.get(one.__module__), one.__name__, None) is one
        if named and one.__module__.startswith("seawall.") and not one.__name__.startswith("_"):
            found.add(one)
    return sorted(found, key=lambda one: one.__name__)


def summary(kind: type) -> str:
    """The first sentence of its documentation."""
    first = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return first.split(". ")[0].rstrip(".") + "."


def event_rows() -> Iterator[list[str]]:
    """Events, with a level and attributes."""
    for kind in subclasses(Event):
        if kind is not Event and not kind.errand:
            fields = [field.name for field in dataclasses.fields(kind) if field.name not in ("policy", "at")]
            given = [
                "seawall.policy.name",
                *(f"seawall.{name}" if name != "error" else "error.type" for name in fields),
            ]
            level = logging.getLevelName(level_of(kind))
            yield [f"`{name_of(kind)}`", level, ", ".join(f"`{one}`" for one in given), summary(kind)]


def error_rows() -> Iterator[list[str]]:
    """Exceptions, with the type they are told as."""
    for kind in subclasses(BaseException):
        if issubclass(kind, Exception) and kind.__name__ != "Wait":
            yield [f"`{error_type(kind.__new__(kind))}`", f"`{kind.__mro__[1].__name__}`", summary(kind)]


def shortest(bound: float) -> str:
    """A bound without needless zeros."""
    return str(int(bound)) if bound == int(bound) else str(bound)


def page() -> str:
    """The whole page."""
    bounds = ", ".join(map(shortest, BOUNDS))
    gen_rows = [
        [f"`{name}`", f"`{prometheus_name(name)}`", f"`{one.unit}`", ", ".join(map(shortest, one.bounds)), one.text]
        for name, one in gen_ai.METRICS.items()
    ]
    parts = [
        HEAD,
        "## Guarded calls\n",
        rows(
            ["OpenTelemetry", "Prometheus", "kind", "unit", "attributes"],
            [
                [
                    f"`{PIPELINE_DURATION}`, with `duration_histogram=True`",
                    f"`{prometheus_name(PIPELINE_DURATION)}`",
                    "histogram",
                    "`s`",
                    "`pipeline.name`; `outcome` = success, failure, rejected, cancelled; `error.type`",
                ],
                [f"`{PIPELINE_CALLS}`", "the histogram's `_count`", "counter", "`{call}`", "the same"],
            ],
        ),
        f"Buckets (seconds): {bounds}, and the latency of each `SLO` around the function.\n",
        "## Policies\n",
        rows(["OpenTelemetry", "Prometheus", "kind", "unit", "attributes", ""], metrics()),
        SHARED_NAMES,
        "## Answers of models\n",
        ANSWERS,
        rows(["OpenTelemetry", "Prometheus", "unit", "buckets", ""], gen_rows),
        "## Spans\n",
        NAMES,
        rows(["attribute", ""], ([f"`{name}`", text] for name, text in spans.ATTRIBUTES.items())),
        "On answers:\n",
        rows(["attribute", ""], ([f"`{name}`", text] for name, text in gen_ai.ATTRIBUTES.items())),
        "## Events\n",
        rows(["event", "level", "attributes", ""], event_rows()),
        "## Error types\n",
        "Exceptions of Python's have their class's name, all others their module's name before it. Ours are:\n",
        rows(["`error.type`", "is a", ""], error_rows()),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
