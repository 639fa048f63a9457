"""What a hostile model file cannot do; docs/model-safety.md says the same in words."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import helper as make

from seawall.inference import Backend
from seawall.inference.errors import CorruptModelError, ModelError, QuantizationError, RuntimeExhaustedError
from seawall.inference.quantize import quantize_model
from tests.inference.onnx_models import model, tensor


@pytest.fixture
def folder(tmp_path):
    """A model's folder, beside a file that is none of its business; both hold sixteen floats."""
    inside = tmp_path / "model"
    inside.mkdir()
    for path in (tmp_path / "secret.bin", inside / "weights.bin"):
        path.write_bytes(np.arange(256, dtype=np.float32).tobytes())
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    return inside


def with_weights_at(folder, location, *, length=1024, offset=0):
    made = model([make.make_node("MatMul", ["x", "w"], ["y"], name="mm")], [tensor("x", ["n", 16])],
                 [tensor("y", ["n", 16])])  # fmt: skip
    weights = onnx.TensorProto(name="w", dims=[16, 16], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        weights.external_data.add(key=key, value=str(value))
    made.graph.initializer.append(weights)
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


ESCAPES = ["../secret.bin", "./../secret.bin", "sub/../../secret.bin", "{secret}", "link.bin", "*/_ORT_MEM_ADDR_/*"]


@pytest.mark.parametrize("location", ESCAPES)
def test_weights_outside_the_models_folder_are_not_read(folder, location):
    path = with_weights_at(folder, location.format(secret=folder.parent / "secret.bin"))
    with pytest.raises(CorruptModelError):
        Backend.load(path)


@pytest.mark.parametrize("location", ESCAPES)
def test_quantizing_reads_nothing_outside_either(folder, location):
    path = with_weights_at(folder, location.format(secret=folder.parent / "secret.bin"))
    with pytest.raises((CorruptModelError, QuantizationError)):
        quantize_model(path, folder.parent / "target", recipe="int8")
    assert not (folder.parent / "target").exists()


def test_weights_inside_the_folder_are(folder):
    with Backend.load(with_weights_at(folder, "weights.bin")) as backend:
        assert backend.run_sync({"x": np.eye(16, dtype=np.float32)})["y"][0, 15] == 15


@pytest.mark.parametrize(("length", "offset"), [(1 << 40, 0), (1024, 1 << 40), (1024, 4), (1024, -4)])
def test_weights_past_the_end_of_their_file_are_a_typed_error(folder, length, offset):
    with pytest.raises(CorruptModelError):
        Backend.load(with_weights_at(folder, "weights.bin", length=length, offset=offset))


def test_an_operator_from_elsewhere_is_refused(tmp_path):
    made = model([make.make_node("Run", ["x"], ["y"], domain="evil.example")], [tensor("x", [1])], [tensor("y", [1])])
    made.opset_import.append(make.make_opsetid("evil.example", 1))
    with pytest.raises(ModelError, match="not a registered") as caught:
        Backend.load(made.SerializeToString())
    assert not caught.value.retryable


def test_a_model_that_needs_more_memory_than_its_limit_fails_and_the_next_run_is_served():
    made = model([make.make_node("Expand", ["x", "s"], ["y"])], [tensor("x", [1]), tensor("s", [1], 7)],
                 [tensor("y", ["n"])])  # fmt: skip
    with Backend.load(made.SerializeToString(), memory_limit=4 << 20) as backend:
        feed = {"x": np.ones(1, np.float32)}
        with pytest.raises(RuntimeExhaustedError):
            backend.run_sync({**feed, "s": np.array([1 << 30], np.int64)})
        assert backend.run_sync({**feed, "s": np.array([3], np.int64)})["y"].tolist() == [1, 1, 1]


def test_no_module_can_unpickle():
    """Nothing that is imported for inference calls pickle, numpy's allow_pickle or torch."""
    code = (
        "import sys, pathlib, seawall.inference as i\n"
        "root = pathlib.Path(i.__file__).parent\n"
        "words = ('pickle.load', 'allow_pickle=True', 'import torch', 'marshal.load', 'import dill')\n"
        "print([str(p) for p in root.rglob('*.py') for w in words if w in p.read_text()])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
