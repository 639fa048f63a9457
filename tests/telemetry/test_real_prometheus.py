"""A real Prometheus server scrapes the example service, exemplars included."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CONFIGURATION = """
global: {scrape_interval: 200ms, scrape_timeout: 200ms}
scrape_configs: [{job_name: shop, static_configs: [{targets: ["127.0.0.1:PORT"]}]}]
"""

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no Prometheus server (Debian: apt install prometheus)"
)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def stopped(process):
    process.terminate()
    process.wait(20)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


@pytest.fixture
def service():
    command = [sys.executable, str(ROOT / "examples" / "scraped.py"), "0", "tracing"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OTEL_SDK_DISABLED": ""})
    yield int(process.stdout.readline().rsplit(":", 1)[1].split("/")[0])
    stopped(process)


@pytest.fixture
def ask(service, tmp_path):
    """Asks the server until it knows, for at most half a minute."""
    (tmp_path / "prometheus.yml").write_text(CONFIGURATION.replace("PORT", str(service)))
    port = free_port()
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
            "--log.level=error",
        ],
        stderr=subprocess.DEVNULL,
    )

    def ask(path, **parameters):
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    data = json.load(answer)["data"]
            except OSError:
                data = None
            found = data["result"] if isinstance(data, dict) else data
            if found:
                return found
            time.sleep(0.1)  # real processes: there is nothing to wait on
        pytest.fail(f"Prometheus knows nothing of {parameters}")

    yield ask
    stopped(process)


@pytest.mark.timeout(90)
def test_a_real_server_scrapes_counters_histograms_and_exemplars(ask):
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
