"""Static INT8: every product becomes one integer kernel, no row sees another, and outliers are moved into weights."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx import helper as make

from seawall.inference import Backend
from seawall.inference.errors import InvalidSettingError, QuantizationError
from seawall.inference.quantize import RECIPES, errors, quantize_model
from seawall.inference.quantize.processor import Integers
from tests.inference.onnx_models import model, tensor
from tests.inference.quantize.models import WIDTH, encoder, saved, tokens, weights

CALIBRATION = [tokens(seed, batch=16) for seed in range(4)]
STATIC = RECIPES["int8-static"]


def ran(path, feed):
    with Backend.load(path, threads=1) as backend:
        return backend.run_sync(feed)["y"]


def made_of(nodes, stored, shape, folder):
    ports = [tensor("x", shape)], [tensor("y", None)]
    return saved(model(nodes, *ports, stored), folder)


def rows(seed, *shape):
    return {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_a_model_answers_nearly_the_same_by_integers_alone(narrow, signed, tmp_path, monkeypatch):
    monkeypatch.setattr("seawall.inference.quantize.static.preferred", lambda: Integers(narrow, signed))
    source = saved(encoder(), tmp_path)
    done = quantize_model(source, tmp_path / "q", recipe="int8-static", calibration=CALIBRATION)
    feed = tokens(99)
    assert errors(ran(source, feed), ran(done.folder, feed)).sqnr_db > 25
    with Backend.load(done.folder) as backend:
        kinds = backend.report().kinds
    assert {"fused": 4, "native": 2} == dict(kinds)  # the table and the last product are in blocks
    assert (narrow, signed) == tuple(done.facts["quantization"][key] for key in ("narrow", "signed_inputs"))
    stored = {one.name: one for one in onnx.load(done.folder / "model.onnx").graph.initializer}
    codes = onnx.numpy_helper.to_array(stored["l0.u.static.q"])
    assert (63 if narrow else 127) == np.abs(codes).max()
    assert (TensorProto.INT8 if signed else TensorProto.UINT8) == stored["l0.n.static.zero"].data_type


def test_a_row_does_not_depend_on_those_beside_it(tmp_path):
    """An outlier in another row would move a scale that is made at run time; quantize_dynamic fails this."""
    quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="int8-static", calibration=CALIBRATION)
    with Backend.load(tmp_path / "q", threads=1) as backend:
        batch = tokens(1, batch=6)["ids"]
        together = backend.run_sync({"ids": batch})["y"]
        for row in range(6):
            assert np.array_equal(together[row], backend.run_sync({"ids": batch[row : row + 1]})["y"][0])


def test_smoothing_pays_off_where_channels_differ_a_thousandfold(tmp_path):
    rng = np.random.default_rng(0)
    gamma = rng.uniform(0.5, 1.5, WIDTH).astype(np.float32)
    gamma[::16] *= 100
    nodes = [
        make.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], axis=-1),
        make.make_node("MatMul", ["n", "w"], ["h"], name="one"),
        make.make_node("Tanh", ["h"], ["y"]),
    ]
    kernel = weights(1, WIDTH, WIDTH)
    kernel[::16] /= 50
    stored = [("gamma", gamma), ("beta", gamma * 0), ("w", kernel)]
    source = made_of(nodes, stored, ["b", WIDTH], tmp_path)
    feed = rows(9, 50, WIDTH)
    exact = ran(source, feed)
    lost = {}
    for recipe in (STATIC, replace(STATIC, name="plain", scaling="none")):
        done = quantize_model(source, tmp_path / recipe.name, recipe=recipe, calibration=[rows(1, 200, WIDTH)])
        lost[recipe.name] = errors(exact, ran(done.folder, feed)).mse
        operators = [node.op_type for node in onnx.load(done.folder / "model.onnx").graph.node]
        assert "Mul" not in operators  # the norm pays
    assert lost["plain"] > 5 * lost["int8-static"]


def test_where_nothing_can_pay_a_mul_does(tmp_path):
    """The input of the model itself has outliers, and is also used elsewhere."""
    nodes = [
        make.make_node("MatMul", ["x", "w"], ["h"], name="one"),
        make.make_node("Add", ["h", "x"], ["s"]),
        make.make_node("Tanh", ["s"], ["y"]),
    ]
    source = made_of(nodes, [("w", weights(1, WIDTH, WIDTH, spread=0.1))], ["b", WIDTH], tmp_path)
    data = [rows(seed, 100, WIDTH)["x"] for seed in (1, 2)]
    for part in data:
        part[:, 5] *= 100
    done = quantize_model(source, tmp_path / "q", recipe="int8-static", calibration=[{"x": data[0]}])
    plain = quantize_model(source, tmp_path / "p", recipe=replace(STATIC, scaling="none"), calibration=[{"x": data[0]}])
    operators = [node.op_type for node in onnx.load(done.folder / "model.onnx").graph.node]
    assert ["Mul", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add", "Tanh"] == operators
    exact = ran(source, {"x": data[1]})
    lost = [errors(exact, ran(one.folder, {"x": data[1]})).mse for one in (plain, done)]
    assert lost[0] > 3 * lost[1]


TWO_AXES, THREE_AXES = ["b", WIDTH], ["b", 3, WIDTH]


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        ("MatMul", TWO_AXES), ("MatMul", THREE_AXES), ("Gemm", TWO_AXES),
        ("MatMul and Add", TWO_AXES), ("MatMul and Add", THREE_AXES),
    ],
)  # fmt: skip
def test_a_bias_never_keeps_a_product_from_being_fused(operator, shape, tmp_path):
    nodes = [make.make_node("Relu", ["x"], ["r"])]
    if operator == "Gemm":
        nodes.append(make.make_node("Gemm", ["r", "w", "b"], ["h"], name="one", transB=1, alpha=0.5, beta=2.0))
    elif operator == "MatMul":
        nodes.append(make.make_node("MatMul", ["r", "w"], ["h"], name="one"))
    else:
        nodes += [make.make_node("MatMul", ["r", "w"], ["m"], name="one"), make.make_node("Add", ["b", "m"], ["h"])]
    nodes.append(make.make_node("Tanh", ["h"], ["y"]))
    stored = [("w", weights(1, WIDTH, WIDTH)), ("b", np.linspace(-1, 1, WIDTH, dtype=np.float32))]
    source = made_of(nodes, stored[: 1 if operator == "MatMul" else 2], shape, tmp_path)
    sizes = [7, *shape[1:]]
    done = quantize_model(source, tmp_path / "q", recipe="int8-static", calibration=[rows(1, 50, *shape[1:])])
    feed = rows(9, *sizes)
    assert errors(ran(source, feed), ran(done.folder, feed)).sqnr_db > 25
    with Backend.load(done.folder) as backend:
        assert {"fused": 1} == dict(backend.report().kinds)


def test_products_that_share_an_input_round_it_once(tmp_path):
    nodes = [
        make.make_node("Relu", ["x"], ["r"]),
        make.make_node("MatMul", ["r", "w"], ["a"], name="one"),
        make.make_node("MatMul", ["r", "v"], ["b"], name="two"),
        make.make_node("Mul", ["a", "b"], ["m"]),
        make.make_node("Tanh", ["m"], ["y"]),
    ]
    stored = [("w", weights(1, WIDTH, WIDTH)), ("v", weights(2, WIDTH, WIDTH))]
    source = made_of(nodes, stored, ["b", WIDTH], tmp_path)
    done = quantize_model(source, tmp_path / "q", recipe="int8-static", calibration=[rows(1, 50, WIDTH)])
    operators = [node.op_type for node in onnx.load(done.folder / "model.onnx").graph.node]
    assert 1 == operators.count("QuantizeLinear")


def test_values_past_the_calibrated_range_saturate_and_stay_finite(tmp_path):
    source = saved(encoder(), tmp_path)
    done = quantize_model(source, tmp_path / "q", recipe="int8-static", calibration=[tokens(1, batch=1, count=1)])
    assert np.isfinite(ran(done.folder, tokens(99, batch=30))).all()


def test_the_same_source_gives_the_same_bytes(tmp_path):
    source = saved(encoder(outliers=True), tmp_path)
    for target in ("one", "two"):
        quantize_model(source, tmp_path / target, recipe="int8-static", calibration=CALIBRATION)
    for file in ("model.onnx", "weights.bin"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_it_needs_calibration_and_operators_of_opset_13(tmp_path):
    made = encoder()
    with pytest.raises(InvalidSettingError, match="recipe 'int8-static' needs calibration"):
        quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="int8-static")
    made.opset_import[0].version = 12
    with pytest.raises(QuantizationError, match="needs operators of opset 13"):
        quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="int8-static", calibration=CALIBRATION)


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fma avx2", Integers(narrow=True, signed=False)),
        ("x86_64", "fma avx2 avx_vnni", Integers(narrow=False, signed=False)),
        ("AMD64", "avx512_vnni", Integers(narrow=False, signed=False)),
        ("x86_64", None, Integers(narrow=True, signed=False)),
        ("aarch64", None, Integers(narrow=False, signed=True)),
    ],
)
def test_the_processor_decides_how_integers_are_rounded(machine, flags, expected, monkeypatch):
    from seawall.inference.quantize import processor

    def read_text(path, **_):
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nflags\t\t: {flags}\n"

    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(processor.Path, "read_text", read_text)
    assert expected == processor.preferred.__wrapped__()
