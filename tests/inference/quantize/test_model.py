"""A whole model is quantized, or said why not; what cannot be rounded is left and told; the same comes out twice."""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx import helper as make

from seawall.inference import Backend
from seawall.inference.errors import (
    CorruptModelError,
    InvalidSettingError,
    NotFiniteError,
    QuantizationError,
    RuntimeFailure,
)
from seawall.inference.models.cache import read_verified
from seawall.inference.quantize import RECIPES, errors, quantize_model
from tests.inference.onnx_models import model, tensor
from tests.inference.quantize.models import WIDTH, encoder, saved, tokens, weights, with_subgraph

CALIBRATION = [tokens(seed) for seed in range(8)]
BLOCKS = [name for name, recipe in RECIPES.items() if recipe.form == "blocks"]


def ran(path, feed):
    with Backend.load(path, threads=1) as backend:
        return backend.run_sync(feed)


def matrices(*nodes, inputs=("x",), extra=(), columns=WIDTH):
    ports = [tensor(name, ["b", columns]) for name in inputs]
    return model(list(nodes), ports, [tensor("y", None)], [("w", weights(3, WIDTH, WIDTH)), *extra])


def ops(folder):
    return [node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize("name", BLOCKS)
def test_each_recipe_gives_a_model_that_answers_nearly_the_same(name, tmp_path):
    source = saved(encoder(), tmp_path)
    made = quantize_model(source, tmp_path / name, recipe=name, calibration=CALIBRATION)
    feed = tokens(99)
    exact, kept = ran(source, feed)["y"], ran(tmp_path / name / "model.onnx", feed)["y"]
    assert errors(exact, kept).sqnr_db > {8: 35, 4: 15, 2: 3}[RECIPES[name].bits]
    assert not made.left
    assert 5 == ops(made.folder).count("MatMulNBits")
    assert name == made.facts["precision"]
    assert read_verified(made.folder) == made.facts
    assert made.bytes < source.stat().st_size * {8: 0.5, 4: 0.4, 2: 0.4}[RECIPES[name].bits]


@pytest.mark.parametrize("name", ["int4-rtn", "int4-hqq", "int4-awq", "int4-gptq"])
def test_the_same_source_gives_the_same_bytes(name, tmp_path):
    source = saved(encoder(outliers=True), tmp_path)
    for target in ("one", "two"):
        quantize_model(source, tmp_path / target, recipe=name, calibration=CALIBRATION)
    for file in ("model.onnx", "weights.bin", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_calibrated_recipe_loses_less_than_plain_rounding(tmp_path):
    source = saved(encoder(outliers=True), tmp_path)
    feed = tokens(99, batch=32)
    exact = ran(source, feed)["y"]
    lost = {}
    for name in ("int4-rtn", "int4-awq", "int4-gptq"):
        quantize_model(source, tmp_path / name, recipe=name, calibration=CALIBRATION)
        lost[name] = errors(exact, ran(tmp_path / name / "model.onnx", feed)["y"]).mse
    assert lost["int4-rtn"] > 1.5 * lost["int4-awq"]
    assert lost["int4-rtn"] > 1.5 * lost["int4-gptq"]


def test_scaling_alone_changes_nothing_but_the_rounding(tmp_path):
    """With 8 bits in blocks of 16 nothing is lost that matters, so what was moved must have been paid back."""
    source = saved(encoder(outliers=True), tmp_path)
    recipe = replace(RECIPES["int4-awq"], bits=8, block=16, rounding="rtn", name="scaled", asymmetric=False)
    quantize_model(source, tmp_path / "scaled", recipe=recipe, calibration=CALIBRATION)
    scaled = onnx.load(tmp_path / "scaled" / "model.onnx")
    kept = {one.name for one in scaled.graph.initializer}
    assert any(name.startswith("gamma.") for name in kept), "the norm's scale takes part of the inputs' size"
    feed = tokens(99)
    assert errors(ran(source, feed)["y"], ran(tmp_path / "scaled" / "model.onnx", feed)["y"]).sqnr_db > 35


def test_rows_of_a_batch_do_not_see_each_other(tmp_path):
    source = saved(encoder(), tmp_path)
    quantize_model(source, tmp_path / "q", recipe="int4-kquant")
    with Backend.load(tmp_path / "q" / "model.onnx", threads=1) as backend:
        together = backend.run_sync(tokens(1, batch=5))["y"]
        for row in range(5):
            alone = backend.run_sync({"ids": tokens(1, batch=5)["ids"][row : row + 1]})["y"]
            assert np.array_equal(alone[0], together[row])


def test_tied_weights_are_stored_once(tmp_path):
    nodes = [
        make.make_node("Gather", ["w", "ids"], ["h"], name="embed"),
        make.make_node("Gemm", ["h", "w"], ["y"], name="head", transB=1),
    ]
    table = weights(1, 512, 128)
    made = model(nodes, [tensor("ids", ["n"], TensorProto.INT64)], [tensor("y", ["n", 512])], [("w", table)])
    done = quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="int4-rtn")
    assert ["GatherBlockQuantized", "MatMulNBits"] == ops(done.folder)
    codes = 512 * 128  # 8 bits each, for the head and the table alike
    scales = 512 * 128 // 32 * 4
    assert codes + scales <= (done.folder / "weights.bin").stat().st_size < codes + scales + 8192
    ids = np.arange(9)
    assert (
        errors(
            ran(tmp_path / "model.onnx", {"ids": ids})["y"], ran(done.folder / "model.onnx", {"ids": ids})["y"]
        ).sqnr_db
        > 35
    )


def test_a_weight_that_two_products_share_is_stored_once(tmp_path):
    nodes = [
        make.make_node("MatMul", ["x", "w"], ["h"], name="one"),
        make.make_node("Relu", ["h"], ["r"]),
        make.make_node("MatMul", ["r", "w"], ["t"], name="two"),
        make.make_node("Tanh", ["t"], ["y"]),
    ]
    done = quantize_model(saved(matrices(*nodes), tmp_path), tmp_path / "q", recipe="int4-gptq", calibration=[
        {"x": weights(7, 40, WIDTH)}])  # fmt: skip
    (weight,) = done.weights
    assert ("one", "two") == weight.nodes
    stored = onnx.load(done.folder / "model.onnx", load_external_data=False).graph.initializer
    assert 3 == len(stored)  # codes, scales, zero points


@pytest.mark.parametrize("external", [False, True])
def test_external_data_is_read_and_never_left_behind(external, tmp_path):
    source = saved(encoder(), tmp_path / "source", external=external)
    quantize_model(source, tmp_path / "q", recipe="int8")
    shutil.move(tmp_path / "source", tmp_path / "elsewhere")
    feed = tokens(5)
    exact, kept = (
        ran(path, feed)["y"] for path in (tmp_path / "elsewhere" / "model.onnx", tmp_path / "q" / "model.onnx")
    )
    assert errors(exact, kept).sqnr_db > 35
    assert {"model.onnx", "weights.bin", "manifest.json"} == {path.name for path in (tmp_path / "q").iterdir()}


def test_all_that_stays_float_is_kept_exactly(tmp_path):
    """A convolution in front, a product behind: only the product changes, and the result says what stayed."""
    nodes = [
        make.make_node("Conv", ["x", "kernel"], ["c"], name="conv", kernel_shape=[3], pads=[1, 1]),
        make.make_node("MatMul", ["c", "w"], ["y"], name="mm"),
    ]
    made = model(nodes, [tensor("x", ["b", 16, WIDTH])], [tensor("y", None)],
                 [("kernel", weights(1, 32, 16, 3)), ("w", weights(2, WIDTH, WIDTH))])  # fmt: skip
    done = quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="int8")
    assert [("conv", "Conv", "this operator is not quantized")] == list(done.left)
    assert ["Conv", "MatMulNBits"] == ops(done.folder)
    kept = onnx.load(done.folder / "model.onnx")
    kernel = next(one for one in kept.graph.initializer if one.name == "kernel")
    assert np.array_equal(weights(1, 32, 16, 3), onnx.numpy_helper.to_array(kernel))
    assert done.facts["quantization"]["left"] == [["conv", "Conv", "this operator is not quantized"]]


def test_products_of_a_subgraph_are_left_and_told(tmp_path):
    source = saved(with_subgraph(), tmp_path, external=True)
    done = quantize_model(source, tmp_path / "q", recipe="int8")
    assert [("if", "If", "2 MatMul in its subgraph: left alone")] == list(done.left)
    feed = {"x": weights(9, 3, WIDTH), "go": np.array(True)}
    assert errors(ran(source, feed)["y"], ran(done.folder / "model.onnx", feed)["y"]).sqnr_db > 35


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (make.make_node("MatMul", ["w", "x"], ["y"], name="m"), "its constant is the left factor"),
        (make.make_node("Gemm", ["x", "w"], ["y"], name="m", transA=1), "transposed"),
        (make.make_node("Gemm", ["x", "w", "b"], ["y"], name="m"), "its bias has the shape"),
        (make.make_node("MatMul", ["x", "small"], ["y"], name="m"), "fewer than 1024 stay"),
        (make.make_node("MatMul", ["x", "three"], ["y"], name="m"), "3 axes"),
        (make.make_node("MatMul", ["x", "double"], ["y"], name="m"), "DOUBLE"),
    ],
)
def test_a_product_that_cannot_be_quantized_is_refused_with_the_reason(node, why, tmp_path):
    extra = [
        ("b", np.ones((WIDTH, 1), np.float32)),
        ("small", weights(1, WIDTH, 2)),
        ("three", weights(1, 2, WIDTH, WIDTH)),
        ("double", weights(1, WIDTH, WIDTH).astype(np.float64)),
    ]
    made = matrices(node, extra=[one for one in extra if one[0] in node.input])
    with pytest.raises(QuantizationError, match=why):
        quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="int8")
    assert not (tmp_path / "q").exists()


def test_gemm_keeps_its_factors_and_bias(tmp_path):
    node = make.make_node("Gemm", ["x", "w", "b"], ["y"], name="g", alpha=0.5, beta=3.0, transB=1)
    source = saved(matrices(node, extra=[("b", weights(4, 1, WIDTH))]), tmp_path)
    done = quantize_model(source, tmp_path / "q", recipe="int8")
    feed = {"x": weights(9, 5, WIDTH)}
    assert ["MatMulNBits"] == ops(done.folder)
    assert errors(ran(source, feed)["y"], ran(done.folder / "model.onnx", feed)["y"]).sqnr_db > 35


def test_a_weight_behind_transpose_and_constant_nodes_is_found(tmp_path):
    nodes = [
        make.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(weights(1, 80, WIDTH))),
        make.make_node("Transpose", ["c"], ["t"], perm=[1, 0]),
        make.make_node("MatMul", ["x", "t"], ["y"], name="mm"),
    ]
    made = model(nodes, [tensor("x", ["b", WIDTH])], [tensor("y", ["b", 80])])
    source = saved(made, tmp_path)
    done = quantize_model(source, tmp_path / "q", recipe="int8")
    assert ["MatMulNBits"] == ops(done.folder)
    feed = {"x": weights(9, 5, WIDTH)}
    assert errors(ran(source, feed)["y"], ran(done.folder / "model.onnx", feed)["y"]).sqnr_db > 35


def test_float16_weights_are_quantized_too(tmp_path):
    ports = [[tensor(name, ["b", WIDTH], TensorProto.FLOAT16)] for name in "xy"]
    node = make.make_node("MatMul", ["x", "w"], ["y"], name="mm")
    made = model([node], *ports, [("w", weights(1, WIDTH, WIDTH).astype(np.float16))])
    source = saved(made, tmp_path)
    done = quantize_model(source, tmp_path / "q", recipe="int8")
    feed = {"x": weights(9, 5, WIDTH).astype(np.float16)}
    exact, kept = ran(source, feed)["y"], ran(done.folder / "model.onnx", feed)["y"]
    assert np.float16 == kept.dtype
    assert errors(exact, kept).sqnr_db > 30


def test_an_initializer_that_callers_may_override_stays(tmp_path):
    nodes = [make.make_node("MatMul", ["x", "w"], ["h"], name="one"), make.make_node("MatMul", ["h", "v"], ["y"])]
    made = matrices(*nodes, extra=[("v", weights(4, WIDTH, WIDTH))])
    made.graph.input.append(tensor("w", [WIDTH, WIDTH]))
    done = quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="int8")
    assert ["MatMul", "MatMulNBits"] == ops(done.folder)
    assert "callers may override" in done.left[0].why


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(value, tmp_path):
    made = encoder()
    broken = next(one for one in made.graph.initializer if one.name == "l1.down")
    values = onnx.numpy_helper.to_array(broken).copy()
    values[3, 4] = value
    broken.CopyFrom(onnx.numpy_helper.from_array(values, "l1.down"))
    with pytest.raises(NotFiniteError, match=r"in 'l1.down', found 1 NaN or infinite, the first at \[3, 4\]") as raised:
        quantize_model(saved(made, tmp_path), tmp_path / "q", recipe="int4-rtn")
    assert "l1.down" == raised.value.tensor
    assert ["model.onnx"] == [path.name for path in tmp_path.iterdir() if not path.name.startswith(".q")]


def test_calibration_that_overflows_names_the_value(tmp_path):
    nodes = [
        make.make_node("Exp", ["x"], ["e"]),
        make.make_node("MatMul", ["e", "w"], ["m"], name="mm"),
        make.make_node("Tanh", ["m"], ["y"]),
    ]
    source = saved(matrices(*nodes), tmp_path)
    with pytest.raises(NotFiniteError, match="in 'e'"):
        quantize_model(
            source, tmp_path / "q", recipe="int4-gptq", calibration=[{"x": np.full((1, WIDTH), 1e3, np.float32)}]
        )


def test_calibration_that_the_model_does_not_take_is_onnx_runtimes_error(tmp_path):
    with pytest.raises(RuntimeFailure, match="calibrating"):
        quantize_model(
            saved(encoder(), tmp_path), tmp_path / "q", recipe="int4-gptq", calibration=[{"ids": np.ones(3)}]
        )


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "recipe 'int4-gptq' needs calibration"),
        ([], "the list is empty"),
        ("a text", "a list of inputs or texts, not a single one"),
        (["a text"], "needs a prepared decoder"),
        ([{"y": np.ones(3)}], "calibration must give the model's inputs, ids, got y"),
        ([CALIBRATION[0], {**CALIBRATION[0], "y": np.ones(3)}], "the model's inputs, ids, got ids, y"),
    ],
)
def test_calibration_that_is_missing_or_wrong_is_said_before_any_work(calibration, message, tmp_path):
    with pytest.raises(InvalidSettingError, match=message):
        quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="int4-gptq", calibration=calibration)


def test_an_unknown_recipe_or_a_taken_target_is_refused(tmp_path):
    source = saved(encoder(), tmp_path)
    with pytest.raises(InvalidSettingError, match=r"recipe must be one of int8, .*got 'int3'"):
        quantize_model(source, tmp_path / "q", recipe="int3")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InvalidSettingError, match="does not exist yet"):
        quantize_model(source, tmp_path / "taken", recipe="int8")
    with pytest.raises(InvalidSettingError, match=r"an \.onnx file, or a folder"):
        quantize_model(tmp_path / "nothing", tmp_path / "q", recipe="int8")


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("bits", 3), ("block", 48), ("head_block", 8), ("rounding", "best"), ("form", "gguf"), ("scaling", "log"),
        ("embedding_bits", 5), ("smallest", 0), ("strength", 1.5),
    ],
)  # fmt: skip
def test_a_recipe_of_one_s_own_is_checked_when_it_is_made(field, wrong):
    with pytest.raises(InvalidSettingError, match=f"{field} must be"):
        replace(RECIPES["int8"], **{field: wrong})


@pytest.mark.parametrize("damage", ["no model", "cut", "data gone", "data short", "data elsewhere", "data linked"])
def test_a_damaged_or_hostile_source_is_refused(damage, tmp_path):
    source = saved(encoder(), tmp_path / "source", external=True)
    data = tmp_path / "source" / "data.bin"
    if damage == "no model":
        source.write_bytes(b"\x7fELF not a model at all")
    elif damage == "cut":
        source.write_bytes(source.read_bytes()[:500])
    elif damage == "data gone":
        data.unlink()
    elif damage == "data short":
        data.write_bytes(data.read_bytes()[:1000])
    elif damage == "data linked":
        data.rename(tmp_path / "secret")
        data.symlink_to(tmp_path / "secret")
    else:
        made = onnx.load(source, load_external_data=False)
        for one in made.graph.initializer:
            for entry in one.external_data:
                if entry.key == "location":
                    entry.value = "../secret"
        source.write_bytes(made.SerializeToString())
        (tmp_path / "secret").write_bytes(data.read_bytes())
    with pytest.raises(CorruptModelError):
        quantize_model(source, tmp_path / "q", recipe="int8")
    assert not (tmp_path / "q").exists()


def test_a_prepared_folder_that_does_not_match_its_manifest_is_refused(tmp_path):
    done = quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="int8")
    (done.folder / "weights.bin").write_bytes(b"\0" * 10)
    with pytest.raises(CorruptModelError, match="do not match its manifest"):
        quantize_model(done.folder, tmp_path / "again", recipe="int8")


def test_quantizing_twice_says_that_it_is_done_already(tmp_path):
    done = quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="int8")
    with pytest.raises(QuantizationError, match="it is quantized already"):
        quantize_model(done.folder, tmp_path / "again", recipe="int4-rtn")


def test_a_name_that_is_taken_is_said(tmp_path):
    nodes = [make.make_node("MatMul", ["x", "w"], ["h"]), make.make_node("MatMul", ["h", "w.8b32t.q"], ["y"])]
    source = saved(matrices(*nodes, extra=[("w.8b32t.q", weights(4, WIDTH, WIDTH))]), tmp_path)
    with pytest.raises(QuantizationError, match=r"has a value 'w\.8b32t\.q' already"):
        quantize_model(source, tmp_path / "q", recipe="int8-block32")


def test_progress_only_grows_and_ends_at_one(tmp_path):
    seen = []
    quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="int4-awq", calibration=CALIBRATION,
                   progress=lambda stage, done: seen.append((stage, done)))  # fmt: skip
    for stage in ("scaling", "quantizing", "checking"):
        steps = [done for at, done in seen if at == stage]
        assert steps == sorted(steps)
        assert 1 == steps[-1]


def test_an_error_of_the_progress_callback_passes_and_leaves_nothing(tmp_path):
    def stop(stage, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="int8", progress=stop)
    assert [] == [path.name for path in tmp_path.iterdir() if path.name.startswith((".partial", "q"))]


def test_of_two_at_once_one_makes_the_folder_and_the_other_is_told(tmp_path):
    source = saved(encoder(), tmp_path)
    outcomes = []

    def work():
        try:
            outcomes.append(quantize_model(source, tmp_path / "q", recipe="int8").facts["precision"])
        except InvalidSettingError as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["InvalidSettingError", "int8"] == sorted(outcomes)
    assert read_verified(tmp_path / "q") is not None


def test_the_manifest_tells_what_was_done(tmp_path):
    done = quantize_model(saved(encoder(), tmp_path), tmp_path / "q", recipe="int4-gptq", calibration=CALIBRATION)
    facts = json.loads((done.folder / "manifest.json").read_text())["facts"]
    assert "gptq" == facts["recipe"]["rounding"]
    told = facts["quantization"]
    assert 64 == len(told["source_digest"])
    assert {"numpy", "onnx", "onnxruntime"} == set(told["versions"])
    assert {weight.name for weight in done.weights} == {name for name, *_ in told["weights"]}
    worst = told["weights"][0]
    assert worst[3] == min(row[3] for row in told["weights"])
    assert str(tmp_path) not in json.dumps(facts)
