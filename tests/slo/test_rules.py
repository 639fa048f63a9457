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
from seawall.slo.openslo import to_openslo
from seawall.slo.rules import EVENTS, Objective, prometheus_rules
from seawall.slo.windows import DAY, HOUR, pairs_for
from seawall.telemetry.readings import DESCRIPTIONS
from seawall.testing import VirtualClock

UNPACKED = Path(__file__).resolve().parent.parent.parent / ".cache/prometheus/usr/bin/promtool"
PROMTOOL = shutil.which("promtool") or (str(UNPACKED) if UNPACKED.exists() else None)
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool (Debian: apt install prometheus)")
GROUPS = ("sli-recordings", "meta-recordings", "alerts")
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
        owed = 0.0
        for minutes, goods, share in phases:
            for _ in range(minutes * 60 // 5):
                clock.advance(5)
                owed += share
                bads, owed = int(owed), owed % 1
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
    "half of what is tolerated": [(100, 100, 0.05)],
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


def judged(tmp_path, phases, moments, *, every, calls=1000.0, severity="page", **objective):
    """Have promtool see an alert at the `moments` that say so; phases are of seconds, with a share of bad calls."""
    (tmp_path / "rules.yml").write_text(prometheus_rules([Objective("answers", 0.99, service="shop", **objective)]))
    good, bad = [0.0], [0.0]
    for seconds, share in phases:
        for _ in range(int(seconds // every)):
            good.append(good[-1] + calls * (1 - share))
            bad.append(bad[-1] + calls * share)
    test = {
        "rule_files": [str(tmp_path / "rules.yml")],
        "evaluation_interval": f"{every}s",
        "group_eval_order": [f"sloth-slo-{kind}-shop-answers" for kind in GROUPS],  # else any, and records are old
        "tests": [
            {
                "interval": f"{every}s",
                "input_series": [
                    {
                        "series": f'{EVENTS}{{policy_name="answers", outcome="{outcome}"}}',
                        "values": " ".join(f"{value:.12g}" for value in values),
                    }
                    for outcome, values in (("good", good), ("bad", bad))
                ],
                "promql_expr_test": [
                    {
                        "expr": f'max(ALERTS{{severity="{severity}", alertstate="firing"}})',
                        "eval_time": f"{at:g}s",
                        "exp_samples": [{"labels": "{}", "value": 1}] if expected else [],
                    }
                    for at, expected in moments
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))
    done = promtool("test", "rules", str(tmp_path / "test.yml"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@needs_promtool
@pytest.mark.parametrize("pair", pairs_for(30 * DAY), ids=lambda pair: f"{pair.factor:g}")
@pytest.mark.parametrize("above", [True, False], ids=["above", "below"])
def test_each_alert_begins_just_above_its_factor_and_not_just_below(tmp_path, pair, above):
    share = 0.01 * pair.factor * (1.05 if above else 0.95)
    quiet = {HOUR: 6 * HOUR, DAY: 3 * DAY}.get(pair.long, 0)  # so that the longer look back of the two stays below
    every = 60 if pair.severity == "page" else 900
    moments = [(quiet, False), (quiet + pair.long, above)]
    judged(tmp_path, [(quiet, 0.0), (pair.long, share)], moments, every=every, severity=pair.severity)


@needs_promtool
def test_an_alert_ends_with_its_cause_though_the_long_look_back_still_burns(tmp_path):
    end = 6 * HOUR + 20 * 60  # a third of an hour is bad, 33 % where 14.4 % are too many, and 5 % of six hours
    moments = [(end, True), (end + 3 * 60, True), (end + 7 * 60, False)]
    judged(tmp_path, [(6 * HOUR, 0.0), (20 * 60, 1.0), (10 * 60, 0.0)], moments, every=60)


@needs_promtool
@pytest.mark.parametrize(("calls", "fires"), [(0.2, True), (0.1, False)])
def test_too_few_calls_wake_nobody(tmp_path, calls, fires):
    moments = [(HOUR, fires)]  # of 12 and of 6 calls in that hour, all of them bad; ten are needed
    judged(tmp_path, [(HOUR, 1.0)], moments, every=60, calls=calls, minimum_calls=10)


def test_the_rules_read_a_metric_that_is_exported():
    assert "seawall.slo.events" in DESCRIPTIONS
    assert EVENTS == "seawall.slo.events".replace(".", "_") + "_total"


@pytest.mark.parametrize("selector", ['job="x"} or vector(1', "job=", 'job="a",', 'job="a\nb"', '{job="a"}'])
def test_a_selector_can_not_break_out(selector):
    with pytest.raises(ValueError, match="must be label matchers"):
        prometheus_rules([Objective("answers", 0.9)], selector=selector)


@needs_promtool
def test_a_selector_may_hold_whatever_prometheus_reads(tmp_path):
    path = tmp_path / "rules.yml"
    path.write_text(prometheus_rules([Objective("a", 0.9)], selector='job=~\'a{2}|\\\\d\', x != "b\\"c"'))
    assert "SUCCESS: 17 rules" in promtool("check", "rules", str(path)).stdout


def test_an_objective_that_stands_twice_has_its_rules_once_and_one_that_says_otherwise_is_refused():
    one, same, other = Objective("answers", 0.9), Objective("answers", 0.9), Objective("answers", 0.99)
    for write in (prometheus_rules, to_openslo):
        assert write([one, same]) == write([one])
        with pytest.raises(ValueError, match="must have names of their own, got Objective"):
            write([one, other])


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
