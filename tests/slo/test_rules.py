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


def traced(phases):
    """Cumulative counts every 30 s, and when page alerts began and ended in process."""
    clock, heard, series = VirtualClock(), [], [(0, 0)]
    with use_clock(clock):
        slo = SLO("answers", target=0.999)
        stop = listen(heard.append)
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
    return series, [(event.at, type(event)) for event in heard if getattr(event, "severity", "") == "page"]


def fires(page, seconds):
    """Whether some page alert fires in process at that second."""
    began = sum(at <= seconds for at, kind in page if kind is BurnAlertFired)
    ended = sum(at <= seconds for at, kind in page if kind is BurnAlertResolved)
    return began > ended


TRACES = {
    "outage": [(120, 10, 0), (10, 0, 10), (60, 10, 0)],
    "slow burn": [(120, 99, 1)],
    "half of what is tolerated": [(100, 1999, 1)],
}


@needs_promtool
@pytest.mark.parametrize("trace", TRACES)
def test_prometheus_and_the_process_agree_when_to_page(tmp_path, trace):
    series, page = traced(TRACES[trace])
    (tmp_path / "rules.yml").write_text(prometheus_rules([Objective("answers", 0.999, service="shop")]))
    # but for a minute and a half around a change: a scrape, an evaluation and a slot of ten seconds
    moments = [at for at in range(600, (len(series) - 1) * EVERY, 60) if all(abs(at - one) > 90 for one, _ in page)]
    test = {
        "rule_files": [str(tmp_path / "rules.yml")],
        "evaluation_interval": f"{EVERY}s",
        "tests": [
            {
                "interval": f"{EVERY}s",
                "input_series": [
                    {
                        "series": f'{EVENTS}{{policy_name="answers", outcome="{outcome}"}}',
                        "values": " ".join(str(counts[index]) for counts in series),
                    }
                    for index, outcome in enumerate(("good", "bad"))
                ],
                "promql_expr_test": [
                    {
                        "expr": 'max(ALERTS{severity="page", alertstate="firing"})',
                        "eval_time": f"{at}s",
                        "exp_samples": [{"labels": "{}", "value": 1}] if fires(page, at) else [],
                    }
                    for at in moments
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))
    done = promtool("test", "rules", str(tmp_path / "test.yml"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert bool(page) == (trace != "half of what is tolerated")
    assert len(moments) > 50


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
