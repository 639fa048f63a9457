"""`seawall quantize`, `report` and `verify`, as a person types them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from seawall.cli import main
from seawall.inference import models
from tests.inference import tiny
from tests.inference.onnx_models import make, model, tensor

TEXT = "abcd efgh abab cdef " * 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def gguf(tmp_path):
    return str(tiny.write(tmp_path / "tiny.gguf"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def classifier(tmp_path):
    """A float model of one product, and a file of inputs."""
    weights = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    proto = model([make.make_node("MatMul", ["x", "w"], ["y"], name="mm")], [tensor("x", ["n", 64])],
                  [tensor("y", ["n", 32])], [("w", weights)])  # fmt: skip
    onnx.save(proto, tmp_path / "float.onnx")
    np.savez(tmp_path / "inputs.npz", x=np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32))
    return str(tmp_path / "float.onnx"), str(tmp_path / "inputs.npz")


def test_quantize_measures_records_and_verify_agrees(gguf, text, tmp_path, capsys):
    target = str(tmp_path / "small")
    assert 0 == main(["quantize", gguf, target, "--recipe", "int8-block32", "--text", text, "--gate", "kl=0.1"])
    printed = capsys.readouterr()
    assert re.search(r"KL divergence, nats +0 +0\.\d{5}", printed.out)
    assert f"recorded in {target}: passes kl 0.1" in printed.out
    assert "" == printed.err  # no bar in a pipe
    assert 0 == main(["verify", target, "--strict"])
    assert f"{target}: verified" in capsys.readouterr().out


def test_a_model_that_fails_its_gate_is_kept_refused_and_told(gguf, text, tmp_path, capsys):
    target = str(tmp_path / "small")
    assert 1 == main(["quantize", gguf, target, "--recipe", "int4-rtn", "--text", text, "--gate", "kl=0.0000001"])
    printed = capsys.readouterr()
    assert "gate: kl is " in printed.out
    assert "does not load unless asked to" in printed.err
    assert 1 == main(["verify", target])
    assert "FAILED" in capsys.readouterr().out
    assert 0 == main(["report", target, "--reference", target, "--text", text, "--quick"])  # it may still be measured


def test_report_writes_json_and_says_whether_the_gate_is_kept(gguf, text, tmp_path, capsys):
    prepared = str(models.prepare(gguf, precision="int8").folder)
    reference = str(models.prepare(gguf, precision="fp32").folder)
    out = tmp_path / "report.json"
    arguments = ["report", prepared, "--reference", reference, "--text", text, "--quick", "--json", str(out)]
    assert 0 == main([*arguments, "--gate", "kl=0.5"])
    assert "gate: passes kl 0.5" in capsys.readouterr().out
    assert "int8" == json.loads(out.read_text())["candidate"]["precision"]
    assert 1 == main([*arguments, "--gate", "kl=1e-9"])
    assert "must be at most 1e-09" in capsys.readouterr().out


def test_any_other_model_needs_inputs(classifier, tmp_path, capsys):
    source, inputs = classifier
    target = str(tmp_path / "small")
    assert 0 == main(["quantize", source, target, "--recipe", "int8", "--inputs", inputs, "--logits", "y"])
    out = capsys.readouterr().out
    assert "mean, worst cosine" in out
    assert "passes cosine 0.995" in out
    assert "KL divergence, largest" in out
    assert 1 == main(["report", target, "--reference", source])
    assert "seawall: these are no language models: give --inputs" in capsys.readouterr().err


def test_calibration_and_budget_reach_the_recipe(classifier, tmp_path, capsys):
    source, inputs = classifier
    gptq = ["quantize", source, str(tmp_path / "a"), "--recipe", "int4-gptq", "--calibration", inputs, "--no-report"]
    assert 0 == main(gptq)
    assert 1 == main(["quantize", source, str(tmp_path / "b"), "--recipe", "int4-gptq"])
    assert "needs calibration" in capsys.readouterr().err
    mixed = ["quantize", source, str(tmp_path / "c"), "--recipe", "mixed", "--calibration", inputs, "--no-report"]
    assert 0 == main([*mixed, "--budget", "1.6kB"])
    assert 1 == main([*mixed[:2], str(tmp_path / "d"), *mixed[3:]])
    assert "needs a budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "FLOAT", "EXISTING", "--recipe", "int8"], "does not exist yet"),
        (["quantize", "FLOAT", "new", "--recipe", "int3"], "recipe must be one of int8"),
        (["quantize", "no-such-model", "new", "--recipe", "int8"], "unknown model 'no-such-model'"),
        (["report", "FLOAT", "--reference", "FLOAT", "--inputs", "FLOAT"], "is no .npz file"),
        (["report", "FLOAT", "--reference", "FLOAT", "--inputs", "nowhere.npz"], "No such file"),
        (["report", "nowhere.onnx", "--reference", "FLOAT", "--inputs", "INPUTS"], "nowhere.onnx"),
    ],
)
def test_a_failure_is_one_clear_line(arguments, words, classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").mkdir()
    names = {"FLOAT": classifier[0], "INPUTS": classifier[1], "EXISTING": str(tmp_path / "existing")}
    assert 1 == main([names.get(each, each) for each in arguments])
    error = capsys.readouterr().err
    assert error.startswith("seawall: ")
    assert words in error
    assert 1 == len(error.splitlines())
    assert not (tmp_path / "new").exists()


def test_verify_of_something_else_is_a_failure_in_words(tmp_path, capsys):
    assert 1 == main(["verify", str(tmp_path)])
    assert "FAILED: it has no usable manifest.json" in capsys.readouterr().out


def test_strict_wants_a_record(gguf, capsys):
    folder = str(models.prepare(gguf, precision="int8").folder)
    assert 0 == main(["verify", folder])
    assert 1 == main(["verify", folder, "--strict"])
    assert "no quality was recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "a"],
        ["quantize", "a", "b"],
        ["report", "a"],
        ["verify"],
        ["quantize", "a", "b", "--recipe", "mixed", "--budget", "lots"],
        ["quantize", "a", "b", "--recipe", "mixed", "--budget", "-1MB"],
        ["report", "a", "--reference", "b", "--gate", "kl"],
        ["report", "a", "--reference", "b", "--gate", "beauty=1"],
        ["report", "a", "--reference", "b", "--gate", "kl=nan"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert 2 == caught.value.code
    assert "usage: seawall" in capsys.readouterr().err


def test_the_installed_command_in_a_process_of_its_own(classifier, tmp_path):
    source, inputs = classifier
    target = str(tmp_path / "small")

    def seawall(*arguments):
        command = [sys.executable, "-W", "error", "-m", "seawall", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"})

    done = seawall("quantize", source, target, "--recipe", "int8", "--inputs", inputs)
    assert (0, "") == (done.returncode, done.stderr)
    done = seawall("verify", target)
    assert (0, "") == (done.returncode, done.stderr)
    with Path(target, "weights.bin").open("r+b") as file:
        file.write(b"salt")
    done = seawall("verify", target)
    assert (1, "") == (done.returncode, done.stderr)
    assert "weights.bin is not the file that was sealed" in done.stdout
