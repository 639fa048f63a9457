"""Real processes for tests: a service with `/metrics`, and a Prometheus server that scrapes it."""

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
from contextlib import contextmanager

import pytest

PROMETHEUS = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="no Prometheus server (Debian: apt install prometheus)"
)
CONFIGURATION = """
global: {scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}
rule_files: [RULES]
scrape_configs: [{job_name: shop, static_configs: [{targets: ["127.0.0.1:PORT"]}]}]
"""


@contextmanager
def serving(script, *arguments):
    """The port of a script that prints the address of its metrics."""
    command = [sys.executable, str(script), "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OTEL_SDK_DISABLED": ""})
    try:
        yield int(process.stdout.readline().rsplit(":", 1)[1].split("/")[0])
    finally:
        _stop(process)


@contextmanager
def scraping(port, folder, rules=""):
    """Asks a server that scrapes that port until it knows, for at most half a minute."""
    (folder / "rules.yml").write_text(rules, encoding="utf-8")
    configuration = CONFIGURATION.replace("PORT", str(port)).replace("RULES", str(folder / "rules.yml"))
    (folder / "prometheus.yml").write_text(configuration)
    own = _free_port()
    process = subprocess.Popen(
        [
            PROMETHEUS,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{own}",
            "--enable-feature=exemplar-storage",
            "--log.level=error",
        ],
        stderr=subprocess.DEVNULL,
    )

    def ask(path, **parameters):
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                url = f"http://127.0.0.1:{own}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    data = json.load(answer)["data"]
            except OSError:
                data = None
            found = data["result"] if isinstance(data, dict) else data
            if found:
                return found
            time.sleep(0.1)  # real processes: there is nothing to wait on
        pytest.fail(f"Prometheus knows nothing of {parameters}")

    try:
        yield ask
    finally:
        _stop(process)


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _stop(process):
    process.terminate()
    process.wait(20)
    if process.stdout is not None:
        process.stdout.close()
