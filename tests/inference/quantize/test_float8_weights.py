"""Weights stored as 8-bit floats: half of what float16 takes on disk, expanded once at load, and said so."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx import helper as make

from seawall.inference import Backend
from seawall.inference.errors import CorruptModelError, InvalidSettingError, QuantizationError
from seawall.inference.quantize import decode_e4m3, errors, expand_fp8, quantize_model
from seawall.inference.runtime import ort
from tests.inference.onnx_models import model, tensor
from tests.inference.quantize.models import WIDTH, encoder, saved, tokens, weights


def ran(path, feed):
    with Backend.load(path, threads=1) as backend:
        return backend.run_sync(feed)["y"]


def bare(folder):
    """What the file itself says, run without expansion."""
    session = ort.open_session(str(folder / "model.onnx"), providers=[("CPUExecutionProvider", {})], threads=1).session
    return session.run(None, tokens(99))[0]


@pytest.mark.parametrize(("recipe", "decibels"), [("fp8-e4m3", 24), ("fp8-e5m2", 18)])
def test_a_loaded_model_answers_as_the_file_says_and_the_report_tells_how(recipe, decibels, tmp_path):
    source = saved(encoder(), tmp_path)
    done = quantize_model(source, tmp_path / "q", recipe=recipe)
    feed = tokens(99)
    exact, said = ran(source, feed), bare(done.folder)
    assert errors(exact, said).sqnr_db > decibels
    with Backend.load(done.folder, threads=1) as backend:
        served, report = backend.run_sync(feed)["y"], backend.report()
    assert errors(said, served).sqnr_db > 35
    assert {"expanded": 5, "native": 1} == dict(report.kinds)  # the table is looked up as it is stored
    assert "expanded" in str(report)
    assert "model.onnx" == report.model
    assert recipe == done.facts["quantization"]["storage"]
    elements = sum(weight.elements for weight in done.weights)
    assert elements < done.bytes < 1.2 * elements


def test_expanding_into_float32_is_exact(tmp_path):
    done = quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="fp8-e4m3")
    expanded = expand_fp8(done.folder, into="float32")
    session = ort.build_session(expanded.model, threads=1, folder=expanded.folder, initializers=expanded.initializers)
    assert np.array_equal(bare(done.folder), session.run(None, tokens(99))[0])


def test_scales_belong_to_outputs_whichever_way_a_weight_is_stored(tmp_path):
    """One output is a thousand times as large as the others, which keep their precision."""
    lopsided = weights(1, WIDTH, WIDTH)
    lopsided[:, 3] *= 1000
    nodes = [
        make.make_node("MatMul", ["x", "w"], ["h"], name="one"),
        make.make_node("Gemm", ["h", "v"], ["y"], name="two", transB=1),
    ]
    made = model(nodes, [tensor("x", ["b", WIDTH])], [tensor("y", None)],
                 [("w", lopsided), ("v", np.ascontiguousarray(lopsided.T))])  # fmt: skip
    done = quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="fp8-e4m3")
    stored = onnx.load(done.folder / "model.onnx").graph.initializer
    by_name = {one.name: one for one in stored}
    for name, axis in (("w", 1), ("v", 0)):
        codes = decode_e4m3(np.frombuffer(by_name[f"{name}.f8"].raw_data, np.uint8).reshape(WIDTH, WIDTH))
        assert np.all(np.abs(codes).max(axis=1 - axis) == 448)
    assert all(weight.sqnr_db > 25 for weight in done.weights)


def test_tied_tables_are_stored_once(tmp_path):
    nodes = [
        make.make_node("Gather", ["w", "ids"], ["h"], name="embed"),
        make.make_node("Gemm", ["h", "w"], ["y"], name="head", transB=1),
    ]
    made = model(nodes, [tensor("ids", ["n"], TensorProto.INT64)], [tensor("y", ["n", 512])],
                 [("w", weights(1, 512, 96))])  # fmt: skip
    done = quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="fp8-e4m3")
    assert 512 * 96 < done.bytes < 1.2 * 512 * 96
    ids = {"ids": np.arange(50)}
    assert errors(ran(tmp_path / "model.onnx", ids), ran(done.folder, ids)).sqnr_db > 25


def test_a_weight_of_zeros_comes_back_as_zeros(tmp_path):
    made = model([make.make_node("MatMul", ["x", "w"], ["y"])], [tensor("x", ["b", WIDTH])], [tensor("y", None)],
                 [("w", np.zeros((WIDTH, WIDTH), np.float32))])  # fmt: skip
    done = quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="fp8-e5m2")
    assert not ran(done.folder, {"x": np.ones((2, WIDTH), np.float32)}).any()


def test_the_same_source_gives_the_same_bytes(tmp_path):
    source = saved(encoder(), tmp_path)
    for target in ("one", "two"):
        quantize_model(source, tmp_path / target, recipe="fp8-e4m3")
    for file in ("model.onnx", "weights.bin"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_operators_that_are_too_old_are_refused_with_the_cure(tmp_path):
    made = encoder()
    made.opset_import[0].version = 17
    made.graph.node[3].attribute.pop()  # num_outputs came with opset 18
    with pytest.raises(
        QuantizationError, match=r"needs operators of opset 19, .* is of 17: convert it with onnx.version"
    ):
        quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="fp8-e4m3")


@pytest.mark.parametrize("manifest", ["[]", '{"facts": []}', '{"facts": {"quantization": ["fp8-e4m3"]}}'])
def test_a_manifest_that_says_nothing_is_no_reason_to_expand(manifest, tmp_path):
    done = quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="fp8-e4m3")
    (done.folder / "manifest.json").write_text(manifest)
    with Backend.load(done.folder, threads=1) as backend:
        assert {"emulated": 5, "native": 1} == dict(backend.report().kinds)


def test_a_model_without_8_bit_floats_has_nothing_to_expand(tmp_path):
    with pytest.raises(InvalidSettingError, match="holds no weights that are stored as 8-bit floats"):
        expand_fp8(saved(encoder(), tmp_path))
    with pytest.raises(InvalidSettingError, match="into must be"):
        expand_fp8(tmp_path, into="int4")


def test_scales_that_do_not_fit_are_refused(tmp_path):
    done = quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="fp8-e4m3")
    broken = onnx.load(done.folder / "model.onnx")
    scale = next(one for one in broken.graph.initializer if one.name == "l0.up.scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.ones(7, np.float32), "l0.up.scale"))
    onnx.save(broken, done.folder / "model.onnx")
    (done.folder / "manifest.json").unlink()
    with pytest.raises(CorruptModelError, match=r"'l0.up.f8' does not fit its scales"):
        expand_fp8(done.folder)


def test_the_form_for_gpus_fits_the_schema_though_no_cpu_runs_it(tmp_path):
    """Only the kernel is missing: ONNX Runtime checks names, types and shapes first."""
    nodes = [make.make_node("MatMul", ["x", "w"], ["h"], name="one"), make.make_node("Tanh", ["h"], ["y"])]
    made = model(nodes, [tensor("x", ["b", 256])], [tensor("y", ["b", 48])], [("w", weights(1, 256, 48))])
    done = quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="fp8-e4m3-native")
    assert done.facts["quantization"]["unrun"]
    operators = [node.op_type for node in onnx.load(done.folder / "model.onnx").graph.node]
    assert ["Cast", "MatMulBlockQuantizedFp8Weight", "Cast", "Tanh"] == operators
    with pytest.raises(ort.EXCEPTIONS, match="Could not find an implementation for MatMulBlockQuantizedFp8Weight"):
        ort.open_session(str(done.folder / "model.onnx"), providers=[("CPUExecutionProvider", {})], threads=1)
    assert done.weights[0].sqnr_db > 25
