"""`seawall slo`: what other tools need to know of the objectives in a configuration file or in a module."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seawall.slo.rules import Objective

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(commands: Commands) -> None:
    """Add `slo` with its actions."""
    parser = commands.add_parser("slo", help="service level objectives for Prometheus, Grafana and OpenSLO")
    actions = parser.add_subparsers(dest="action", required=True)
    rules = actions.add_parser("rules", help="print recording and alerting rules, in the names that Sloth uses")
    _add_source(rules, _rules)
    export = actions.add_parser("export", help="print OpenSLO documents of the objectives")
    _add_source(export, _export)
    read = actions.add_parser("import", help="print a configuration with the objectives of OpenSLO documents")
    read.add_argument("file", help="OpenSLO v1, in YAML")
    read.add_argument("--threshold-unit", choices=("s", "ms"), help="of the values of threshold metrics")
    read.set_defaults(run=_reporting(_import))
    dashboard = actions.add_parser("dashboard", help="print a Grafana dashboard of objectives, policies and models")
    dashboard.add_argument("--title", default="seawall", help="as Grafana shows it (default: %(default)s)")
    dashboard.add_argument("--uid", default="seawall", help="by which Grafana knows it again (default: %(default)s)")
    dashboard.set_defaults(run=_reporting(_dashboard))


def _add_source(parser: argparse.ArgumentParser, text: Callable[[list[Objective], str], str]) -> None:
    parser.add_argument("source", help="a TOML file of pipelines, or a module to import, such as shop.app")
    parser.add_argument("--service", default="seawall", help="whose objectives they are (default: %(default)s)")
    parser.add_argument("--selector", default="", help='more label matchers for the counters, such as job="shop"')

    def told(options: argparse.Namespace) -> str:
        found = list(_objectives(options.source, options.service))
        if not found:
            raise ValueError(f"{options.source} has no objective: a policy of type slo, or a live SLO")
        return text(found, options.selector)

    parser.set_defaults(run=_reporting(told))


def _reporting(text: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], int]:
    """Prints the text, or what is wrong with the input."""

    def run(options: argparse.Namespace) -> int:
        try:
            told = text(options)
        except (KeyError, TypeError, ValueError) as error:
            sys.stderr.write(f"seawall: {error}\n")
            return 1
        sys.stdout.write(told)
        return 0

    return run


def _rules(objectives: list[Objective], selector: str) -> str:
    from seawall.slo.rules import prometheus_rules

    return prometheus_rules(objectives, selector=selector)


def _export(objectives: list[Objective], selector: str) -> str:
    from seawall.slo.openslo import to_openslo

    return to_openslo(objectives, selector=selector)


def _import(options: argparse.Namespace) -> str:
    from seawall.slo.openslo import from_openslo

    found = from_openslo(Path(options.file).read_text(encoding="utf-8"), threshold_unit=options.threshold_unit)
    if not found:
        raise ValueError(f"{options.file} has no document of kind SLO")
    names = [objective.name for objective in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{options.file} has several objectives called {name!r}")
    return "\n".join(map(_configured, found))


def _dashboard(options: argparse.Namespace) -> str:
    from seawall.telemetry.dashboard import grafana_dashboard

    return json.dumps(grafana_dashboard(title=options.title, uid=options.uid), indent=2) + "\n"


def _configured(objective: Objective) -> str:
    """The objective as a table of a configuration. A string of JSON is one of TOML, too."""
    name = json.dumps(objective.name, ensure_ascii=False)
    lines = [f"[policies.{name}]  # of {json.dumps(objective.service, ensure_ascii=False)}", 'type = "slo"']
    for setting in ("target", "window", "minimum_calls", "latency"):
        value = getattr(objective, setting)
        lines += [] if value is None else [f"{setting} = {value!r}"]
    return "\n".join(lines) + "\n"


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
            known = {key: table[key] for key in ("target", "window", "minimum_calls", "latency") if key in table}
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
