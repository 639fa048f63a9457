"""Prometheus rules of objectives: the same burn rates and alerts that an `SLO` reckons, for a whole fleet.

Names and labels are those of Sloth, so that dashboards made for Sloth show them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from seawall.core import checks
from seawall.slo.objective import SLO
from seawall.slo.windows import DAY, SEVERITIES, WindowPair, duration, pairs_for

EVENTS = "seawall_slo_events_total"  # with the labels policy_name and outcome
_MATCHER = r'\s*[a-zA-Z_][a-zA-Z0-9_]*\s*(=~|!~|!=|=)\s*("([^"\\\n]|\\.)*"|\'([^\'\\\n]|\\.)*\')\s*'


@dataclass(frozen=True, slots=True)
class Objective:
    """What rules are made of: the settings of an `SLO`, and the service it is of. Times are in seconds."""

    name: str
    target: float
    window: float = 30 * DAY
    minimum_calls: int = 10
    service: str = "seawall"
    latency: float | None = None

    def __post_init__(self) -> None:
        checks.name("Objective", self.name)
        checks.name("service", self.service)
        checks.fraction("target", self.target, one=False)
        checks.window("window", self.window)
        checks.count("minimum_calls", self.minimum_calls)
        if self.latency is not None:
            checks.seconds("latency", self.latency)

    @property
    def id(self) -> str:
        """Its name among those of all services, as Sloth makes it."""
        return f"{self.service}-{self.name}"

    @classmethod
    def of(cls, slo: SLO, service: str = "seawall") -> Objective:
        """The objective of a live `SLO`."""
        return cls(slo.name, slo.target, slo.window, slo.minimum_calls, service, slo.latency)


def prometheus_rules(objectives: Iterable[Objective], *, selector: str = "") -> str:
    """A rules file, in YAML: for each objective its recording rules, what dashboards ask, and two alerts.

    Args:
        objectives: what to make rules of.
        selector: more label matchers for the counters, such as `job="shop"`.

    Raises:
        ValueError: `selector` is no list of matchers, or two objectives of one name differ, whose counters are one.

    Examples:
        >>> text = prometheus_rules([Objective("answers", 0.999, service="shop")])
        >>> "record: slo:sli_error:ratio_rate5m" in text
        True
    """
    lines = ["# Written by `seawall slo rules`. Change the objectives and run it again.", "groups:"]
    for objective in distinct(objectives):
        for name, rules in _Rules(objective, selector).groups().items():
            lines += [f"- name: {_quoted(name)}", "  rules:"]
            for rule in rules:
                lines += _lines(rule)
    return "\n".join(lines) + "\n"


def distinct(objectives: Iterable[Objective]) -> list[Objective]:
    """Each of them once. ValueError if two differ, but not in service and name: they would be one to Prometheus."""
    found: dict[str, Objective] = {}
    for one in objectives:
        known = found.setdefault(one.id, one)
        if known != one:
            raise ValueError(f"objectives must have names of their own, got {known!r} and {one!r}")
    return list(found.values())


Rule = Mapping[str, str | Mapping[str, str]]


class _Rules:
    def __init__(self, objective: Objective, selector: str) -> None:
        self.objective = objective
        self.pairs = pairs_for(objective.window)
        self.budget = f"{1 - objective.target:.12g}"
        self.labels = {"sloth_id": objective.id, "sloth_service": objective.service, "sloth_slo": objective.name}
        self.matchers = ", ".join(f"{key}={_quoted(value)}" for key, value in self.labels.items())
        self.own = matchers(objective, selector)

    def groups(self) -> dict[str, list[Rule]]:
        return {
            f"sloth-slo-sli-recordings-{self.objective.id}": self.recordings(),
            f"sloth-slo-meta-recordings-{self.objective.id}": self.meta(),
            f"sloth-slo-alerts-{self.objective.id}": [self.alert(severity) for severity in SEVERITIES],
        }

    def ratio(self, window: str) -> str:
        return f"slo:sli_error:ratio_rate{window}{{{self.matchers}}}"

    def recordings(self) -> list[Rule]:
        looks = sorted({look for pair in self.pairs for look in (pair.long, pair.short)})
        rules: list[Rule] = []
        for look in map(duration, looks):
            bad = f'sum(rate({EVENTS}{{{self.own}, outcome="bad"}}[{look}]))'
            total = f'sum(rate({EVENTS}{{{self.own}, outcome=~"good|bad"}}[{look}]))'
            labels = {**self.labels, "sloth_window": look}
            rules.append({"record": f"slo:sli_error:ratio_rate{look}", "expr": f"{bad} / {total}", "labels": labels})
        short, window = self.ratio(duration(looks[0])), duration(self.objective.window)
        whole = f"sum_over_time({short}[{window}]) / ignoring (sloth_window) count_over_time({short}[{window}])"
        labels = {**self.labels, "sloth_window": window}
        return [*rules, {"record": f"slo:sli_error:ratio_rate{window}", "expr": whole, "labels": labels}]

    def meta(self) -> list[Rule]:
        short = self.ratio(duration(min(pair.short for pair in self.pairs)))
        whole = self.ratio(duration(self.objective.window))
        budget = f"on (sloth_id, sloth_slo, sloth_service) group_left slo:error_budget:ratio{{{self.matchers}}}"
        found = {
            "slo:objective:ratio": f"vector({self.objective.target:.12g})",
            "slo:error_budget:ratio": f"vector({self.budget})",
            "slo:time_period:days": f"vector({self.objective.window / DAY:.12g})",
            "slo:current_burn_rate:ratio": f"{short} / {budget}",
            "slo:period_burn_rate:ratio": f"{whole} / {budget}",
            "slo:period_error_budget_remaining:ratio": f"1 - slo:period_burn_rate:ratio{{{self.matchers}}}",
        }
        rules: list[Rule] = [{"record": name, "expr": expr, "labels": self.labels} for name, expr in found.items()]
        info = {**self.labels, "sloth_mode": "cli-gen-prom", "sloth_spec": "prometheus/v1", "sloth_version": "seawall"}
        return [*rules, {"record": "sloth_slo_info", "expr": "vector(1)", "labels": info}]

    def alert(self, severity: str) -> Rule:
        pairs = [self.condition(pair) for pair in self.pairs if pair.severity == severity]
        title = "{{$labels.sloth_service}} {{$labels.sloth_slo}}: the error budget burns too fast"
        return {
            "alert": "SLOErrorBudgetBurn",
            "expr": " or ignoring (sloth_window) ".join(f"({pair})" for pair in pairs),
            "labels": {**self.labels, "sloth_severity": severity, "severity": severity},
            "annotations": {"title": f"({severity}) {title}", "summary": title},
        }

    def condition(self, pair: WindowPair) -> str:
        """Both look backs burn, and the long one has calls enough to say so."""
        long, short = duration(pair.long), duration(pair.short)
        over = f"> ({pair.factor:.12g} * {self.budget})"
        calls = f'sum(increase({EVENTS}{{{self.own}, outcome=~"good|bad"}}[{long}]))'
        enough = f"and on () ({calls} >= {self.objective.minimum_calls})"
        return f"({self.ratio(short)} {over}) and ignoring (sloth_window) ({self.ratio(long)} {over}) {enough}"


def matchers(objective: Objective, selector: str) -> str:
    """What picks the objective's counters, and with `selector` those of one service. ValueError if it says more."""
    if selector and not re.fullmatch(rf"{_MATCHER}(,{_MATCHER})*", selector):
        raise ValueError(f'selector must be label matchers such as job="shop", without braces, got {selector!r}')
    return f"policy_name={_quoted(objective.name)}" + (f", {selector}" if selector else "")


def _lines(rule: Rule) -> list[str]:
    lines: list[str] = []
    for key, value in rule.items():
        start = "    " if lines else "  - "
        if isinstance(value, str):
            lines.append(f"{start}{key}: {value if key == 'record' else _quoted(value)}")
        else:
            lines += [f"{start}{key}:", *(f"      {name}: {_quoted(text)}" for name, text in value.items())]
    return lines


def _quoted(text: str) -> str:
    """A string of YAML, and of PromQL: JSON's are both."""
    return json.dumps(text, ensure_ascii=False)
