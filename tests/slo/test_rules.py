"""The rules, in front of the real promtool; and on one trace of events beside the in-process alerts."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from seawall import SLO, listen, use_clock
from seawall.cli import main
from seawall.slo.alerts import BurnAlertFired, BurnAlertResolved
from seawall.slo.rules import EVENTS, Objective, prometheus_rules
from seawall.slo.windows import DAY
from seawall.telemetry.readings import DESCRIPTIONS
from seawall.testing import VirtualClock

UNPACKED = Path(__file__).resolve().parent.parent.parent / ".cache/prometheus/usr/bin/promtool"
PROMTOOL = shutil.which("promtool") or (str(UNPACKED) if UNPACKED.exists() else None)
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool (Debian: apt install prometheus)")
EVERY = 30  # seconds between scrapes and evaluations


def promtool(*arguments):
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)


@needs_promtool
@pytest.mark.parametrize("window", [30 * DAY, 28 * DAY, 7 * DAY])
def test_promtool_accepts_the_rules(tmp_path, window):
    path = tmp_path / "rules.yml"
    objectives = [Objective("answers", 0.999, window), Objective('an "odd" näme', 0.5, window, service="a b")]
    path.write_text(prometheus_rules(objectives, selector='job="shop"'), encoding="utf-8")
    done = promtool("check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "34 rules found" in done.stdout + done.stderr


def traced(phases, target=0.999, minimum_calls=10):
    """Cumulative counts every 30 s, and the seconds at which the in-process page alert began and ended."""
    clock, heard, series = VirtualClock(), [], [(0, 0)]
    with use_clock(clock):
        slo = SLO("answers", target=target, minimum_calls=minimum_calls)
        stop = listen(lambda event: heard.append((event, slo.severity)))
        good = bad = 0
        for minutes, goods, bads in phases:
            for _ in range(minutes * 60 // 5):
                clock.advance(5)
                for _ in range(goods):
                    slo.admit().success()
                for _ in range(bads):
                    slo.admit().failure(OSError())
                good, bad = good + goods, bad + bads
                if clock() % EVERY == 0:
                    series.append((good, bad))
        stop()
    page = [(event.at, severity == "page") for event, severity in heard]
    page = [(event.at, type(event)) for event, _ in heard if getattr(event, "severity", "") == "page"]
    return series, page


def expected(page, seconds):
    """Whether some page alert fires in process at that second."""
    began = sum(at <= seconds for at, kind in page if kind is BurnAlertFired)
    ended = sum(at <= seconds for at, kind in page if kind is BurnAlertResolved)
    return began > ended


TRACES = {
    "outage": [(120, 10, 0), (10, 0, 10), (60, 10, 0)],
    "slow burn": [(120, 99, 1)],
    "half of what is tolerated": [(100, 4000, 2)],
    "too few calls": [(9, 0, 0), (1, 0, 0), (30, 0, 0)],
}


@needs_promtool
@pytest.mark.parametrize("trace", ["outage", "slow burn", "half of what is tolerated"])
def test_prometheus_and_the_process_agree_when_to_page(tmp_path, trace):
    series, page = traced(TRACES[trace])
    (tmp_path / "rules.yml").write_text(prometheus_rules([Objective("answers", 0.999, service="shop")]))
    values = {
        outcome: " ".join(str(counts[index]) for counts in series) for index, outcome in enumerate(("good", "bad"))
    }
    changes = [at for at, _ in page]
    moments = [
        at for at in range(10 * 60, (len(series) - 1) * EVERY, 60) if all(abs(at - change) > 90 for change in changes)
    ]  # a minute and a half apart: a scrape, an evaluation, and a slot of ten seconds
    labels = {"sloth_id": "shop-answers", "sloth_service": "shop", "sloth_slo": "answers"}
    alert = {"exp_labels": {**labels, "sloth_severity": "page", "severity": "page"}}
    title = "shop answers: the error budget burns too fast"
    alert["exp_annotations"] = {"title": f"(page) {title}", "summary": title}
    tickets = {
        "exp_labels": {**labels, "sloth_severity": "ticket", "severity": "ticket"},
        "exp_annotations": {"title": f"(ticket) {title}", "summary": title},
    }
    probe = [
        {"expr": 'ALERTS{severity="page"}', "eval_time": f"{at}s", "exp_samples": _firing(labels, page, at)}
        for at in moments
    ]
    del alert, tickets
    test = {
        "rule_files": [str(tmp_path / "rules.yml")],
        "evaluation_interval": f"{EVERY}s",
        "tests": [
            {
                "interval": f"{EVERY}s",
                "input_series": [
                    {"series": f'{EVENTS}{{policy_name="answers", outcome="{outcome}"}}', "values": text}
                    for outcome, text in values.items()
                ],
                "promql_expr_test": probe,
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))
    done = promtool("test", "rules", str(tmp_path / "test.yml"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (trace == "half of what is tolerated") == (not page)
    assert len(moments) > 50


def _firing(labels, page, at):
    if not expected(page, at):
        return []
    names = {"alertname": "SLOErrorBudgetBurn", "alertstate": "firing", "severity": "page", "sloth_severity": "page"}
    inner = ", ".join(f'{key}="{value}"' for key, value in {**labels, **names}.items())
    return [{"labels": f"ALERTS{{{inner}}}", "value": 1}]


def test_the_rules_read_a_metric_that_is_exported():
    assert "seawall.slo.events" in DESCRIPTIONS
    assert EVENTS == "seawall.slo.events".replace(".", "_") + "_total"


def test_a_selector_can_not_break_out():
    with pytest.raises(ValueError, match="braces"):
        prometheus_rules([Objective("answers", 0.9)], selector='job="x"} or vector(1')


def test_the_command_prints_rules_of_a_file(tmp_path, capsys):
    path = tmp_path / "seawall.toml"
    path.write_text('[policies.answers]\ntype = "slo"\ntarget = 0.99\n[pipelines.a]\npolicies = ["answers"]\n')
    assert main(["slo", "rules", str(path), "--service", "shop", "--selector", 'job="shop"']) == 0
    text = capsys.readouterr().out
    assert 'sloth_id: "shop-answers"' in text
    assert 'job=\\"shop\\"' in text
    path.write_text('[policies.answers]\ntype = "slo"\ntarget = 99\n')
    assert main(["slo", "rules", str(path)]) == 1
    assert "for 99 % write 0.99" in capsys.readouterr().err
