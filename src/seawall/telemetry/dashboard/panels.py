"""What the dashboard shows: objectives, guarded calls, policies and answers of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from seawall.telemetry.dashboard.promql import burn_rate, quantile, rate, total, worst
from seawall.telemetry.ledger import PIPELINE_DURATION

Kind = Literal["timeseries", "stat", "state-timeline"]


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: PromQL by what its lines are called, and a text that says how to read it."""

    title: str
    text: str
    queries: Mapping[str, str]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 8
    most: float | None = None
    steps: tuple[tuple[float, str], ...] = ()  # colours from a value on
    states: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # of values: a word and a colour


_REFUSALS = ("breaker", "bulkhead", "adaptive_bulkhead", "limiter", "load_shedder", "brownout")
_OPEN, _HALF_OPEN = 'state="open"', 'state="half_open"'
_QUANTILES = (0.5, 0.95, 0.99)
_BURNING = ((0.0, "green"), (1.0, "yellow"), (6.0, "orange"), (14.4, "red"))

ROWS: Mapping[str, tuple[Panel, ...]] = {
    "Objectives": (
        Panel(
            "Error budget left",
            "Share of the window's budget, of the process that has least. Below 0 the objective is missed.",
            {"{{policy_name}}": worst("min", "seawall.slo.error_budget", "policy_name")},
            "percentunit",
            "stat",
            steps=((-1e9, "red"), (0.0, "orange"), (0.25, "green")),
        ),
        Panel(
            "Budget used up in",
            "If calls go on as in the last hour. A year stands for longer, and for never.",
            {"{{policy_name}}": "clamp_max(" + worst("min", "seawall.slo.exhausted_in", "policy_name") + ", 31536000)"},
            "s",
            "stat",
            steps=((-1e9, "red"), (86400.0, "orange"), (259200.0, "green")),
        ),
        Panel(
            "Alerts",
            "Burn rate alerts that fire in some process.",
            {"{{policy_name}} {{severity}}": worst("max", "seawall.slo.alert", "policy_name, severity")},
            kind="state-timeline",
            states={0: ("quiet", "green"), 1: ("fires", "red")},
        ),
        Panel(
            "Burn rate",
            "Of the fleet, over an hour and five minutes: 1 uses the budget up at the window's end; a page comes where "
            "both are above 14.4.",
            {"{{policy_name}} 1h": burn_rate("1h"), "{{policy_name}} 5m": burn_rate("5m")},
            steps=_BURNING,
        ),
        Panel(
            "Burn rate by look back",
            "As the worst process reckons it.",
            {"{{policy_name}} {{window}}": worst("max", "seawall.slo.burn_rate", "policy_name, window")},
            steps=_BURNING,
        ),
        Panel(
            "Brown-out",
            "Steps of the ladder that hold.",
            {"{{policy_name}}": worst("max", "seawall.brownout.level", "policy_name")},
        ),
    ),
    "Guarded calls": (
        Panel(
            "Calls",
            "By how they ended, for who called.",
            {"{{pipeline_name}} {{outcome}}": rate(PIPELINE_DURATION, "pipeline_name, outcome")},
            "reqps",
        ),
        Panel(
            "Duration of those that went well",
            "Waiting and retries included.",
            {
                f"{{{{pipeline_name}}}} p{share * 100:g}": quantile(
                    share, PIPELINE_DURATION, "pipeline_name", 'outcome="success"'
                )
                for share in _QUANTILES
            },
            "s",
        ),
        Panel(
            "Errors",
            "By type, refusals included.",
            {
                "{{pipeline_name}} {{error_type}}": rate(
                    PIPELINE_DURATION, "pipeline_name, error_type", 'error_type!=""'
                )
            },
            "reqps",
        ),
    ),
    "Policies": (
        Panel(
            "Circuit breakers",
            "The worst state among the processes.",
            {
                "{{policy_name}}": f"clamp_max(2 * {worst('max', 'seawall.breaker.state', 'policy_name', _OPEN)} + "
                f"{worst('max', 'seawall.breaker.state', 'policy_name', _HALF_OPEN)}, 2)"
            },
            kind="state-timeline",
            states={0: ("closed", "green"), 1: ("half open", "yellow"), 2: ("open", "red")},
        ),
        Panel(
            "Refused calls",
            "By the policy that refused them.",
            {
                f"{kind.replace('_', ' ')} {{{{policy_name}}}}": rate(
                    f"seawall.{kind}.calls", "policy_name", 'outcome="rejected"'
                )
                for kind in _REFUSALS
            },
            "reqps",
        ),
        Panel(
            "Failure rate of breakers",
            "In the breaker's window; nothing below its least number of calls.",
            {"{{policy_name}}": worst("max", "seawall.breaker.failure_rate", "policy_name")},
            "percentunit",
            most=1,
        ),
        Panel(
            "Bulkheads",
            "Places taken, and calls that wait, of all processes.",
            {
                f"{{{{policy_name}}}} {what}{note}": total(f"seawall.{kind}.{what}")
                for kind, note in (("bulkhead", ""), ("adaptive_bulkhead", " (adaptive)"))
                for what in ("active", "waiting", "limit")
            },
        ),
        Panel(
            "Rate limiters",
            "Calls that could start now, and calls that wait.",
            {f"{{{{policy_name}}}} {what}": total(f"seawall.limiter.{what}") for what in ("available", "waiting")},
        ),
        Panel(
            "Timeouts and deadlines",
            "By what became of the call.",
            {
                f"{kind} {{{{policy_name}}}} {{{{outcome}}}}": rate(f"seawall.{kind}.calls", "policy_name, outcome")
                for kind in ("timeout", "deadline")
            },
            "reqps",
        ),
        Panel(
            "Retries and hedges",
            "By how the call ended, and whether it took more than one attempt.",
            {
                f"{kind} {{{{policy_name}}}} {{{{outcome}}}}": rate(f"seawall.{kind}.calls", "policy_name, outcome")
                for kind in ("retry", "hedge")
            },
            "reqps",
        ),
        Panel(
            "Retry budgets",
            "Extra attempts that could start now, of all processes.",
            {"{{policy_name}}": total("seawall.retry_budget.balance")},
        ),
        Panel(
            "Caches and fallbacks",
            "By who answered.",
            {
                f"{kind} {{{{policy_name}}}} {{{{outcome}}}}": rate(f"seawall.{kind}.calls", "policy_name, outcome")
                for kind in ("cache", "fallback")
            },
            "reqps",
        ),
    ),
    "Answers of models": (
        Panel(
            "Answers",
            "Of engines and embedders, by the type of error; nothing for those that are whole.",
            {
                "{{gen_ai_request_model}} {{error_type}}": rate(
                    "gen_ai.server.request.duration", "gen_ai_request_model, error_type"
                )
            },
            "reqps",
        ),
        Panel(
            "Time to the first token",
            "Waiting for a row included.",
            {
                f"{{{{gen_ai_request_model}}}} p{share * 100:g}": quantile(
                    share, "gen_ai.server.time_to_first_token", "gen_ai_request_model"
                )
                for share in _QUANTILES
            },
            "s",
        ),
        Panel(
            "Time per token after it",
            "Of whole answers.",
            {
                f"{{{{gen_ai_request_model}}}} p{share * 100:g}": quantile(
                    share, "gen_ai.server.time_per_output_token", "gen_ai_request_model"
                )
                for share in _QUANTILES
            },
            "s",
        ),
        Panel(
            "Tokens",
            "Read (input) and written (output).",
            {
                "{{gen_ai_request_model}} {{gen_ai_token_type}}": rate(
                    "gen_ai.client.token.usage", "gen_ai_request_model, gen_ai_token_type", part="_sum"
                )
            },
        ),
        Panel(
            "Duration of answers",
            "From the question to the last token.",
            {
                f"{{{{gen_ai_request_model}}}} p{share * 100:g}": quantile(
                    share, "gen_ai.server.request.duration", "gen_ai_request_model"
                )
                for share in _QUANTILES
            },
            "s",
        ),
        Panel(
            "Answers by what became of them",
            "Of engines; shed ones gave their row back when memory ran out, stuck counts steps.",
            {"{{policy_name}} {{outcome}}": rate("seawall.engine.calls", "policy_name, outcome")},
            "reqps",
        ),
        Panel(
            "Rows",
            "Answers that have one, answers that wait for one, and how many there are.",
            {f"{{{{policy_name}}}} {what}": total(f"seawall.engine.{what}") for what in ("running", "waiting", "rows")},
        ),
        Panel(
            "Key/value cache",
            "Of tokens in use, held, and the limit.",
            {
                f"{{{{policy_name}}}} {what}": total(f"seawall.engine.cache_{what}")
                for what in ("used", "committed", "limit")
            },
            "bytes",
        ),
        Panel(
            "Prefix cache and drafts",
            "Share of the prompts' tokens that need not be read, and of the drafted tokens that the model took.",
            {
                "{{policy_name}} prefix hits": f"{rate('seawall.engine.prefix_hits', 'policy_name')} / "
                f"{rate('seawall.engine.prefix_queries', 'policy_name')}",
                "{{policy_name}} drafts accepted": f"{rate('seawall.engine.accepted_tokens', 'policy_name')} / "
                f"{rate('seawall.engine.drafted_tokens', 'policy_name')}",
            },
            "percentunit",
            most=1,
        ),
        Panel(
            "What stands before models",
            "Deployments, supervisors (lost, rebuilt and failed are models), replicas and downgrades.",
            {
                f"{kind} {{{{policy_name}}}} {{{{outcome}}}}": rate(f"seawall.{kind}.calls", "policy_name, outcome")
                for kind in ("deployment", "supervisor", "replicas", "downgrade")
            },
            "reqps",
        ),
        Panel(
            "Models",
            "The generation that serves, and whether a supervised model is up.",
            {
                "{{policy_name}} generation": worst("max", "seawall.deployment.generation", "policy_name"),
                "{{policy_name}} serving": worst("min", "seawall.supervisor.serving", "policy_name"),
            },
        ),
        Panel(
            "Replicas",
            "How many there are, those that may be asked, calls in flight, and times that one was left out in five "
            "minutes, of all processes. 1 is panic: even those that are left out are asked.",
            {
                **{
                    f"{{{{policy_name}}}} {what}": total(f"seawall.replicas.{what}")
                    for what in ("replicas", "healthy", "active")
                },
                "{{policy_name}} ejections": f"300 * {rate('seawall.replicas.ejections', 'policy_name', over='5m')}",
                "{{policy_name}} panicking": worst("max", "seawall.replicas.panicking", "policy_name"),
            },
        ),
    ),
}


def expressions() -> Iterator[str]:
    """Every expression of every panel."""
    for panels in ROWS.values():
        for panel in panels:
            yield from panel.queries.values()
