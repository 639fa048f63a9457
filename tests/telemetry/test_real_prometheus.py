"""A real Prometheus server scrapes the example service, exemplars included."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.telemetry.real import needs_prometheus, scraping, serving

SERVICE = Path(__file__).parent.parent.parent / "examples" / "scraped.py"


@needs_prometheus
@pytest.mark.timeout(90)
def test_a_real_server_scrapes_counters_histograms_and_exemplars(tmp_path):
    with serving(SERVICE, "tracing") as port, scraping(port, tmp_path) as ask:
        judge(ask)


def judge(ask):
    (count,) = ask("query", query='seawall_pipeline_duration_seconds_count{outcome="success"} > 20')
    assert count["metric"]["pipeline_name"] == "checkout"
    bounds = {row["metric"]["le"] for row in ask("query", query="seawall_pipeline_duration_seconds_bucket")}
    assert "0.2" in bounds  # the latency of the objective
    (state,) = ask("query", query='seawall_breaker_state{state="closed"} == 1')
    assert state["metric"]["policy_name"] == "payments"
    retried = ask("query", query='seawall_retry_calls_total{outcome="succeeded_with_retry"} > 0')
    assert len(retried) == 1
    (good,) = ask("query", query="sum(seawall_slo_events_total{outcome='good'}) > 0")
    assert float(good["value"][1]) > 0
    now = time.time()
    exemplars = ask("query_exemplars", query="seawall_pipeline_duration_seconds_bucket", start=now - 60, end=now + 60)
    assert len(exemplars[0]["exemplars"][0]["labels"]["trace_id"]) == 32
