"""Objectives as OpenSLO v1 documents, and objectives from such documents.

After the specification at github.com/OpenSLO/OpenSLO. What it cannot say of ours (the exact name, the latency in
seconds, the least number of calls) stands in annotations, so that what is written reads back the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Literal, TypeAlias

from seawall.core import checks
from seawall.slo import safe_yaml
from seawall.slo.rules import EVENTS, Objective, distinct, matchers
from seawall.slo.windows import DAY, HOUR, MINUTE

VERSION = "openslo/v1"
NAME, LATENCY, CALLS = "seawall/name", "seawall/latency", "seawall/minimum-calls"  # annotations
ThresholdUnit: TypeAlias = Literal["s", "ms"]

_KINDS = ("SLO", "SLI", "Service", "DataSource", "AlertPolicy", "AlertCondition", "AlertNotificationTarget")
_UNITS = {"m": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}
_SPEC = (
    "description", "service", "indicator", "indicatorRef", "timeWindow", "budgetingMethod", "objectives",
    "alertPolicies",
)  # fmt: skip
_OBJECTIVE = (
    "displayName", "op", "value", "target", "targetPercent", "timeSliceTarget", "timeSliceWindow", "indicator",
    "indicatorRef", "compositeWeight",
)  # fmt: skip


class OpenSLOError(ValueError):
    """A document is wrong, or says what an `SLO` can't do. `path` says where: `documents[0].spec.objectives[1].target`.

    Examples:
        >>> from_openslo("{apiVersion: openslo/v2, kind: SLO}")
        Traceback (most recent call last):
            ...
        seawall.slo.openslo.OpenSLOError: documents[0].apiVersion: must be 'openslo/v1', got 'openslo/v2'
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def to_openslo(objectives: Iterable[Objective], *, selector: str = "") -> str:
    """One document for each objective, whose indicator is the counter that Prometheus scrapes.

    Args:
        objectives: what to write.
        selector: more label matchers for the counters, such as `job="shop"`.

    Raises:
        OpenSLOError: a window is no whole number of minutes, OpenSLO's least unit.
        ValueError: as `prometheus_rules` raises.

    Examples:
        >>> text = to_openslo([Objective("answers", 0.999, service="shop")])
        >>> from_openslo(text)[0].target
        0.999
    """
    documents, taken = [], set[str]()
    for index, objective in enumerate(distinct(objectives)):
        slug = _slug(objective.name, taken)
        taken.add(slug)
        documents.append(_document(f"objectives[{index}]", objective, slug, selector))
    return safe_yaml.dump(documents)


def from_openslo(text: str, *, threshold_unit: ThresholdUnit | None = None) -> list[Objective]:
    """The objectives of all documents of kind SLO; of several in one, each gets the name of both.

    The indicator is left alone: seawall counts the calls itself, and the indicator says where others count theirs.
    An SLO by a threshold, OpenSLO's way to say a latency, needs the unit of that threshold, which OpenSLO leaves open.

    Args:
        text: YAML, of one or more documents. Nothing in it is ever run; aliases and repeated keys are refused.
        threshold_unit: of the `value` of threshold metrics: seconds or milliseconds.

    Raises:
        OpenSLOError: says where: no YAML, not OpenSLO v1, or time slices, calendar windows and composites, which an
            `SLO` can't judge by.
    """
    if threshold_unit not in (None, "s", "ms"):
        raise ValueError(f"threshold_unit must be 's', 'ms' or None, got {threshold_unit!r}")
    try:
        parsed = safe_yaml.load(text)
    except ValueError as error:
        raise OpenSLOError("documents", str(error)) from error
    documents = [(f"documents[{index}]", one) for index, one in enumerate(parsed) if one is not None]
    by_threshold = {_name(path, one) for path, one in documents if _kind(path, one) == "SLI" and _threshold(path, one)}
    found: list[Objective] = []
    for path, one in documents:
        if _kind(path, one) == "SLO":
            found += _Reader(path, one, by_threshold, threshold_unit).objectives()
    return found


def _document(path: str, objective: Objective, slug: str, selector: str) -> dict[str, object]:
    if objective.window % MINUTE:
        raise OpenSLOError(path, f"window must be whole minutes in OpenSLO, got {objective.window:g} s")
    size, unit = next((size, unit) for unit, size in (("d", DAY), ("h", HOUR), ("m", MINUTE))
                      if objective.window % size == 0)  # fmt: skip
    window = f"{objective.window / size:.0f}{unit}"
    annotations = {NAME: objective.name, CALLS: str(objective.minimum_calls)}
    if objective.latency is not None:
        annotations[LATENCY] = repr(objective.latency)
    within = "" if objective.latency is None else f" within {objective.latency:g} s"
    return {
        "apiVersion": VERSION,
        "kind": "SLO",
        "metadata": {"name": slug, "displayName": objective.name, "annotations": annotations},
        "spec": {
            "description": f"{objective.target * 100:.12g} % of the calls end well{within}, over {window}.",
            "service": objective.service,
            "indicator": {
                "metadata": {"name": f"{slug[:55]}-calls"},
                "spec": {
                    "ratioMetric": {
                        "counter": True,
                        "good": _metric(objective, 'outcome="good"', selector),
                        "total": _metric(objective, 'outcome=~"good|bad"', selector),
                    }
                },
            },
            "timeWindow": [{"duration": window, "isRolling": True}],
            "budgetingMethod": "Occurrences",
            "objectives": [{"displayName": objective.name, "target": objective.target}],
        },
    }


def _metric(objective: Objective, outcome: str, selector: str) -> dict[str, object]:
    query = f"sum({EVENTS}{{{matchers(objective, selector)}, {outcome}}})"
    return {"metricSource": {"type": "Prometheus", "spec": {"query": query}}}


def _slug(name: str, taken: set[str]) -> str:
    """A name by RFC 1123, which is all that every reader of OpenSLO must take."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].rstrip("-") or "slo"
    number = 1
    found = slug
    while found in taken:
        number += 1
        found = f"{slug[: 62 - len(str(number))]}-{number}"
    return found


class _Reader:
    """The objectives of one document of kind SLO."""

    def __init__(
        self, path: str, document: object, by_threshold: set[str], threshold_unit: ThresholdUnit | None
    ) -> None:
        self.path = path
        self.name = _name(path, document)
        self.annotations = _annotations(path, document)
        self.spec = _table(f"{path}.spec", _field(path, document, "spec"), _SPEC)
        self.by_threshold = self._by_threshold(by_threshold)
        self.threshold_unit = threshold_unit

    def objectives(self) -> list[Objective]:
        method = self.spec.get("budgetingMethod")
        if method != "Occurrences":
            raise OpenSLOError(
                f"{self.path}.spec.budgetingMethod",
                f"must be 'Occurrences', for an SLO counts calls, got {_shown(method)}",
            )
        window, path = self._window(), f"{self.path}.spec.objectives"
        entries = _list(path, self.spec.get("objectives"))
        if not entries:
            raise OpenSLOError(path, "must have an objective or more, got none")
        return [
            self._objective(f"{path}[{index}]", one, index, len(entries), window) for index, one in enumerate(entries)
        ]

    def _objective(self, path: str, entry: object, index: int, of: int, window: float) -> Objective:
        table = _table(path, entry, _OBJECTIVE)
        for key in ("indicator", "indicatorRef", "compositeWeight"):
            if key in table:
                raise OpenSLOError(f"{path}.{key}", "belongs to a composite, which is no one SLO: make an SLO of each")
        name = self.annotations.get(NAME, self.name)
        if of > 1:
            name = f"{name}-{table.get('displayName', index)}"
        given = {"name": name, "target": _target(path, table), "window": window, "service": self.spec.get("service")}
        given["latency"] = self._latency(path, table)
        if CALLS in self.annotations:
            given["minimum_calls"] = int(self._number(CALLS, r"\d{1,9}"))
        try:
            return Objective(**given)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise OpenSLOError(path, str(error)) from error

    def _window(self) -> float:
        path = f"{self.path}.spec.timeWindow"
        if "timeWindow" not in self.spec:
            return 30 * DAY
        entries = _list(path, self.spec["timeWindow"])
        if len(entries) != 1:
            raise OpenSLOError(path, f"must have exactly one entry, got {len(entries)}")
        table = _table(f"{path}[0]", entries[0], ("duration", "isRolling", "calendar"))
        if "calendar" in table or table.get("isRolling", True) is not True:
            raise OpenSLOError(f"{path}[0]", "must roll (isRolling: true, no calendar): an SLO looks back from now")
        text = table.get("duration")
        found = re.fullmatch(r"([1-9]\d{0,8})([mhdw])", text, re.ASCII) if isinstance(text, str) else None
        if found is None:
            raise OpenSLOError(
                f"{path}[0].duration",
                f"must be a number of minutes, hours, days or weeks, such as 30d, got {_shown(text)}",
            )
        return int(found[1]) * _UNITS[found[2]]

    def _by_threshold(self, names: set[str]) -> bool:
        """Whether the indicator is a number to compare, such as a latency."""
        path, given = f"{self.path}.spec", [key for key in ("indicator", "indicatorRef") if key in self.spec]
        if len(given) != 1:
            raise OpenSLOError(path, f"must have either indicator or indicatorRef, got {' and '.join(given) or 'none'}")
        if given == ["indicatorRef"]:
            return self.spec["indicatorRef"] in names
        return _threshold(f"{path}.indicator", self.spec["indicator"])

    def _latency(self, path: str, table: Mapping[str, object]) -> float | None:
        if LATENCY in self.annotations:
            return float(self._number(LATENCY, r"\d{1,9}(\.\d{1,20})?(e-?\d{1,2})?"))
        if not self.by_threshold:
            return None
        if table.get("op") not in ("lt", "lte"):
            raise OpenSLOError(
                f"{path}.op", f"must be lt or lte, for a call is good up to its latency, got {_shown(table.get('op'))}"
            )
        if self.threshold_unit is None:
            raise OpenSLOError(
                f"{path}.value", f"has no unit in OpenSLO: say threshold_unit, or annotate {LATENCY} in seconds"
            )
        value = table.get("value")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise OpenSLOError(f"{path}.value", f"must be a number, got {_shown(value)}")
        return value / 1000 if self.threshold_unit == "ms" else float(value)

    def _number(self, key: str, pattern: str) -> str:
        text = self.annotations[key]
        if not re.fullmatch(pattern, text, re.ASCII):
            raise OpenSLOError(f"{self.path}.metadata.annotations.{key}", f"must be a number, got {_shown(text)}")
        return text


def _target(path: str, table: Mapping[str, object]) -> object:
    given = [key for key in ("target", "targetPercent") if key in table]
    if len(given) != 1:
        raise OpenSLOError(path, f"must have either target or targetPercent, got {' and '.join(given) or 'none'}")
    value = table[given[0]]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OpenSLOError(f"{path}.{given[0]}", f"must be a number, got {_shown(value)}")
    try:
        number = checks.fraction(
            "target", value if given == ["target"] else float(Decimal(repr(value)).scaleb(-2)), one=False
        )
    except ValueError as error:
        raise OpenSLOError(f"{path}.{given[0]}", str(error)) from error
    return number


def _kind(path: str, document: object) -> str:
    version, kind = _field(path, document, "apiVersion"), _field(path, document, "kind")
    if version != VERSION:
        raise OpenSLOError(f"{path}.apiVersion", f"must be {VERSION!r}, got {_shown(version)}")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise OpenSLOError(
            f"{path}.kind", f"must be one of {', '.join(_KINDS)}, got {_shown(kind)}{_near(kind, _KINDS)}"
        )
    return kind


def _name(path: str, document: object) -> str:
    name = _table(f"{path}.metadata", _field(path, document, "metadata")).get("name")
    if not isinstance(name, str) or not name:
        raise OpenSLOError(f"{path}.metadata.name", f"must be a name, got {_shown(name)}")
    return name


def _annotations(path: str, document: object) -> dict[str, str]:
    given = _table(f"{path}.metadata", _field(path, document, "metadata")).get("annotations") or {}
    found = {}
    for key, value in _table(f"{path}.metadata.annotations", given).items():
        if not isinstance(value, str):
            raise OpenSLOError(f"{path}.metadata.annotations.{key}", f"must be a string, got {_shown(value)}")
        found[key] = value
    return found


def _threshold(path: str, indicator: object) -> bool:
    spec = _table(f"{path}.spec", _field(path, indicator, "spec"))
    given = [key for key in ("thresholdMetric", "ratioMetric") if key in spec]
    if len(given) != 1:
        raise OpenSLOError(f"{path}.spec", "must have either thresholdMetric or ratioMetric, got "
                           f"{' and '.join(given) or 'none'}")  # fmt: skip
    return given == ["thresholdMetric"]


def _field(path: str, value: object, key: str) -> object:
    table = _table(path, value)
    if key not in table:
        raise OpenSLOError(f"{path}.{key}", "is missing")
    return table[key]


def _table(path: str, value: object, known: tuple[str, ...] = ()) -> Mapping[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise OpenSLOError(path, f"must be a mapping with names as keys, got {_shown(value)}")
    for key in value if known else ():
        if key not in known:
            raise OpenSLOError(f"{path}.{key}", f"is not in OpenSLO v1{_near(key, known)}")
    return value


def _list(path: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise OpenSLOError(path, f"must be a list, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """`value` for a message; of what may be large the kind alone."""
    if isinstance(value, (dict, list)):
        return {dict: "a mapping", list: "a list"}[type(value)]
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _near(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else ()
    return f"; did you mean {close[0]!r}?" if close else ""
