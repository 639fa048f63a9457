"""`seawall slo`: rules for Prometheus from the objectives in a configuration file or in a module."""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seawall.slo.rules import Objective

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(commands: Commands) -> None:
    """Add `slo` with its actions."""
    parser = commands.add_parser("slo", help="Prometheus rules from service level objectives")
    actions = parser.add_subparsers(dest="action", required=True)
    rules = actions.add_parser("rules", help="print recording and alerting rules, in the names that Sloth uses")
    rules.add_argument("source", help="a TOML file of pipelines, or a module to import, such as shop.app")
    rules.add_argument("--service", default="seawall", help="whose objectives they are (default: %(default)s)")
    rules.add_argument("--selector", default="", help='more label matchers for the counters, such as job="shop"')
    rules.set_defaults(run=_rules)


def _rules(options: argparse.Namespace) -> int:
    from seawall.slo.rules import prometheus_rules

    try:
        found = list(_objectives(options.source, options.service))
        if not found:
            raise ValueError(f"{options.source} has no objective: a policy of type slo, or a live SLO")
        text = prometheus_rules(found, selector=options.selector)
    except (KeyError, TypeError, ValueError) as error:
        sys.stderr.write(f"seawall: {error}\n")
        return 1
    sys.stdout.write(text)
    return 0


def _objectives(source: str, service: str) -> Iterator[Objective]:
    from seawall.core.registry import live
    from seawall.slo.objective import SLO
    from seawall.slo.rules import Objective

    if not source.endswith(".toml"):
        sys.path.insert(0, "")  # as `python -m` does
        module = import_module(source)
        yield from (Objective.of(policy, service) for policy in live() if isinstance(policy, SLO))
        del module
        return
    configuration = tomllib.loads(Path(source).read_text(encoding="utf-8"))
    for name, table in _tables(configuration):
        if table.get("type") == "slo":
            known = {key: table[key] for key in ("target", "window", "minimum_calls") if key in table}
            if "target" not in known:
                raise ValueError(f"{name}.target is missing")
            yield Objective(str(table.get("name", name)), service=service, **known)  # type: ignore[arg-type]


def _tables(configuration: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Every policy of a configuration, with its name."""
    shared, pipelines = configuration.get("policies", {}), configuration.get("pipelines", {})
    for name, table in shared.items() if isinstance(shared, dict) else ():
        if isinstance(table, dict):
            yield name, table
    for name, pipeline in pipelines.items() if isinstance(pipelines, dict) else ():
        entries = pipeline.get("policies") if isinstance(pipeline, dict) else None
        yield from ((name, one) for one in (entries if isinstance(entries, list) else ()) if isinstance(one, dict))
