"""The dashboard shows what there is: every metric is exported, and every expression has an answer."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from seawall.cli import main
from seawall.slo.rules import Objective, prometheus_rules
from seawall.telemetry.dashboard import grafana_dashboard
from seawall.telemetry.dashboard.panels import ROWS, expressions
from seawall.telemetry.dashboard.promql import rate, series
from seawall.telemetry.names import METRICS, kind_of, prometheus_name
from tests.slo.test_rules import PROMTOOL, needs_promtool
from tests.telemetry.real import needs_prometheus, scraping, serving

EVERYTHING = Path(__file__).parent / "everything.py"
SAMPLES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}


def filled_in(expression):
    return expression.replace("$__rate_interval", "5s").replace("$job", ".*")


def test_every_metric_in_every_panel_is_exported():
    exported = {prometheus_name(metric) + suffix for metric in METRICS for suffix in SAMPLES[kind_of(metric)]}
    used = {name for one in expressions() for name in re.findall(r"([a-z_]+)\{", one)}
    assert used <= exported
    assert len(used) > 30


def test_a_metric_that_is_not_exported_can_not_be_shown():
    with pytest.raises(ValueError, match=r"no metric is called 'seawall\.slo\.evnts'"):
        rate("seawall.slo.evnts", "policy_name")
    assert series("seawall.slo.events", 'outcome="bad"') == 'seawall_slo_events_total{job=~"$job", outcome="bad"}'


def test_every_kind_of_policy_is_shown():
    kinds = {name.split(".")[1] for name in METRICS if name.startswith("seawall.")} - {"pipeline"}
    shown = " ".join(expressions())
    elsewhere = {"aiobreaker", "chaos", "keyed"}  # another's breakers, tests, and sums that say little
    assert {kind for kind in kinds if f"seawall_{kind}_" not in shown} == elsewhere


@needs_promtool
def test_promtool_parses_every_expression(tmp_path):
    rules = [{"record": "a:b", "expr": filled_in(one), "labels": {"n": str(n)}} for n, one in enumerate(expressions())]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([PROMTOOL, "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout + done.stderr


@needs_prometheus
@pytest.mark.timeout(120)
def test_a_real_server_answers_every_expression_with_the_labels_its_legend_names(tmp_path):
    rules = prometheus_rules([Objective("orders", 0.99, service="shop")])
    with serving(EVERYTHING) as port, scraping(port, tmp_path, rules) as ask:
        for panels in ROWS.values():
            for panel in panels:
                for legend, expression in panel.queries.items():
                    found = ask("query", query=filled_in(expression))
                    named = set(re.findall(r"\{\{(\w+)\}\}", legend))
                    assert named == set(found[0]["metric"]), panel.title
        (burns,) = ask("query", query='slo:current_burn_rate:ratio{sloth_id="shop-orders"} >= 0')
        assert burns["metric"]["sloth_service"] == "shop"


def plain(value):
    """What is left where defaults that say nothing are left out."""
    if isinstance(value, dict):
        return {key: kept for key, one in value.items() if (kept := plain(one)) not in (None, {}, [], "")}
    return [plain(one) for one in value] if isinstance(value, list) else value


def test_grafanas_own_types_know_every_field():
    register_default_plugins()  # those of each kind of panel, and of Prometheus queries
    dashboard = grafana_dashboard()
    theirs = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))

    def within(ours, known, path="dashboard"):
        if isinstance(ours, dict):
            for key, value in ours.items():
                assert key in known, f"{path}.{key}"
                within(value, known[key], f"{path}.{key}")
        elif isinstance(ours, list):
            assert len(ours) == len(known), path
            for index, (one, other) in enumerate(zip(ours, known, strict=True)):
                within(one, other, f"{path}[{index}]")
        else:
            assert ours == known, path

    within(plain(dashboard), plain(theirs))


def test_no_panel_covers_another_and_each_has_a_number_of_its_own():
    panels = grafana_dashboard()["panels"]
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_command_prints_it(capsys):
    assert main(["slo", "dashboard", "--title", "shop", "--uid", "shop-1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == grafana_dashboard(title="shop", uid="shop-1")
    assert main(["slo", "dashboard", "--uid", "a b"]) == 1
    assert "uid must be 1 to 40 letters" in capsys.readouterr().err
