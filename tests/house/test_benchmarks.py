"""The measuring itself, on calls whose cost is known in kind; no test here reads a clock."""

import ast
import json

import pytest

import dev
from benchmarks import _harness


@pytest.mark.asyncio
async def test_every_case_runs_in_every_round_each_paired_with_the_bare_call():
    ran = []

    async def bare():
        ran.append("bare")

    async def case():
        ran.append("case")

    found = await _harness.compare(bare, {"case": case}, rounds=5, calls=2)

    assert 2 * ["bare"] + 2 * ["case"] == ran[:4]  # warm-up
    assert 5 * (2 * ["bare"] + 2 * ["case"]) == ran[4:]
    assert 5 == len(found.added["case"].cpu) == len(found.added["case"].wall) == len(found.bare.cpu)


def test_results_name_the_machine_the_versions_and_the_samples(tmp_path):
    path = tmp_path / "new folder" / "results.json"
    _harness.write_results(path, {"a_ns": 1.5}, {"a": [1, 2]}, ["pytest", "not-installed"])

    results = json.loads(path.read_text())
    assert ["machine", "versions", "figures", "samples"] == list(results)
    assert {"a_ns": 1.5} == results["figures"]
    assert pytest.__version__ == results["versions"]["pytest"]
    assert "not-installed" not in results["versions"]
    assert {"processor", "cores", "system", "python"} == set(results["machine"])


@pytest.mark.parametrize("path", sorted((dev.ROOT / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_says_what_it_measures(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_peers_are_pinned():
    for path in (dev.ROOT / "benchmarks" / "peers-requirements").glob("*.txt"):
        pins = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert [] == [pin for pin in pins if "==" not in pin]
