"""The report says what really runs: it is checked against ONNX Runtime's own profiler."""

import dataclasses
import hashlib
import json
import re
import time
from pathlib import Path

import onnxruntime
import pytest

from seawall.inference import Backend, errors
from seawall.inference.runtime import ort, report
from tests.inference import onnx_models as models


@pytest.mark.parametrize(("kind", "expected"), [("int8", "fused"), ("fp8", "emulated"), ("nbits", "native")])
def test_a_quantized_node_is_native_fused_or_emulated(kind, expected):
    with Backend.load(models.quantized(kind).SerializeToString(), threads=1) as backend:
        found = backend.report()
    assert {expected: 1} == found.kinds
    assert f"1 {expected}" in str(found)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nbits"])
def test_the_nodes_are_those_that_the_profiler_sees_run(tmp_path, kind):
    model = models.quantized(kind).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, models.rows(2))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [(event["args"]["op_name"], event["args"]["provider"]) for event in events
           if event["name"].endswith("_kernel_time")]  # fmt: skip
    with Backend.load(model, threads=1) as backend:
        assert ran == [(node.op_type, node.provider) for node in backend.report().nodes]


def test_settings_ports_and_digest_are_told(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(models.linear().SerializeToString())
    with Backend.load(path, threads=1, memory_limit=64 << 20, workers=2) as backend:
        found = backend.report()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == found.digest
    assert (("model.onnx", found.digest),) == found.files
    assert (1, 2, 64 << 20, False, False) == (
        found.threads, found.workers, found.memory_limit, found.shared_pool, found.telemetry)  # fmt: skip
    assert onnxruntime.__version__ == found.onnxruntime
    assert (("CPUExecutionProvider",),) * 2 == (found.requested, found.providers)
    table = dict(line.split("  ", 1) for line in str(found).splitlines())
    assert "tensor(float) [batch, 64]" == table["input x"].strip()
    assert "64 MiB, of which 64 MiB for runs" == table["memory limit"].strip()
    assert f"{onnxruntime.__version__}, telemetry off" == table["onnxruntime"].strip()


def test_the_digest_is_that_of_the_external_data_as_well(tmp_path):
    path, weights = models.with_external_data(tmp_path)

    def reported():
        with Backend.load(path, threads=1) as backend:
            return backend.report()

    before = reported()
    assert [path.name, weights.name] == [name for name, _ in before.files]
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, weights)] == [
        sum_ for _, sum_ in before.files
    ]
    weights.write_bytes(weights.read_bytes()[::-1])
    after = reported()
    assert before.files[0] == after.files[0]
    assert before.digest != after.digest
    assert before.digest == dataclasses.replace(before, threads=7).digest
    assert f"file {weights.name}  " in str(after)


def test_weights_that_are_not_those_that_were_loaded_are_told(tmp_path):
    path, weights = models.with_external_data(tmp_path)
    with Backend.load(path, threads=1) as backend, Backend.load(path, threads=1) as other:
        while time.time_ns() <= other._loaded_at + 20_000_000:  # a file system's clock ticks every 4 to 10 ms
            pass
        weights.write_bytes(weights.read_bytes())
        assert (weights.name, "changed since it was loaded") == backend.report().files[1]
        weights.unlink()
        with pytest.raises(errors.RuntimeFailure, match="for a report"):
            other.report()
        assert 1 == len(other.run_sync(models.rows(1)))


def test_a_second_report_builds_nothing(monkeypatch):
    with Backend.load(models.linear().SerializeToString(), threads=1) as backend:
        first = backend.report()
        monkeypatch.setattr(ort, "open_session", None)
        assert first == backend.report()
        assert first is not backend.report()  # what a batcher finds out later is told too


def test_nodes_in_subgraphs_are_told_as_well():
    with Backend.load(models.endless().SerializeToString(), threads=1) as backend:
        assert {"Loop", "Add"} <= {node.op_type for node in backend.report().nodes}


def test_a_node_has_the_provider_that_it_was_assigned_to_or_an_honest_unknown():
    graph = models.chain(3).graph
    assigned = [ort.Node("CUDAExecutionProvider", "mm0", "MatMul"), ort.Node("CPUExecutionProvider", "mm1", "MatMul")]
    nodes = report.describe(graph, graph, assigned, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert ["CUDAExecutionProvider", "CPUExecutionProvider", "unknown"] == [node.provider for node in nodes]
    nodes = report.describe(graph, graph, assigned[:1], ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert ["CUDAExecutionProvider"] * 3 == [node.provider for node in nodes]
    nodes = report.describe(graph, graph, [], ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert ["unknown"] * 3 == [node.provider for node in nodes]


def test_a_report_leaves_no_file_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(report.tempfile, "tempdir", str(tmp_path))
    with Backend.load(models.quantized("int8").SerializeToString(), threads=1) as backend:
        backend.report()
    assert [] == list(tmp_path.iterdir())
    assert ("", "") == capfd.readouterr()


def test_the_documented_errors_are_as_retryable_as_the_page_says():
    page = (Path(__file__).parents[2] / "docs" / "backend.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+Error|RuntimeFailure)` \| (yes|no) \|", page, re.MULTILINE)
    assert len(rows) >= 12
    assert {name: getattr(errors, name).retryable for name, _ in rows} == {name: told == "yes" for name, told in rows}
