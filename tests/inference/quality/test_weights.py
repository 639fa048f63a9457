"""Weights read from the files of both models."""

import math

import numpy as np
import onnx
import pytest

from seawall.inference.errors import IncomparableModelsError
from seawall.inference.quality import compare_weights
from seawall.inference.quantize import dequantize, errors, quantize, quantize_model
from tests.inference.onnx_models import make, model, tensor

RNG = np.random.default_rng(0)
WEIGHTS = {"up": RNG.normal(size=(64, 96)).astype(np.float32), "down": RNG.normal(size=(32, 96)).astype(np.float32),
           "table": RNG.normal(size=(40, 64)).astype(np.float32)}  # fmt: skip


def network():
    """A lookup, a MatMul and a Gemm of transposed weights."""
    nodes = [
        make.make_node("Gather", ["table", "ids"], ["x"], name="lookup"),
        make.make_node("MatMul", ["x", "up"], ["h"], name="first"),
        make.make_node("Relu", ["h"], ["a"], name="relu"),
        make.make_node("Gemm", ["a", "down"], ["y"], name="second", transB=1),
    ]
    return model(nodes, [tensor("ids", ["n"], onnx.TensorProto.INT64)], [tensor("y", ["n", 32])], WEIGHTS.items())


@pytest.fixture
def source(tmp_path):
    onnx.save(network(), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


FLOORS = {"int8": 40, "int8-block32": 40, "int4-rtn": 17, "int4-kquant": 17, "int4-hqq": 17, "int4-gptq": 15,
          "int4-awq": 13, "int8-static": 12, "fp8-e4m3": 28, "fp8-e5m2": 22, "int2-kquant": 5}  # fmt: skip


@pytest.mark.parametrize("recipe", FLOORS)
def test_every_recipe_of_ours_is_read_back(source, tmp_path, recipe):
    data = [{"ids": np.arange(40)}]
    quantize_model(source, tmp_path / "small", recipe=recipe, calibration=data)
    found = {weight.name: weight for weight in compare_weights(source, tmp_path / "small")}
    assert {"first", "second"} <= found.keys() <= {"first", "second", "lookup"}
    assert (64, 96) == found["first"].shape
    assert FLOORS[recipe] < found["first"].errors.sqnr_db < 60


def test_a_model_is_its_own_equal(source):
    for weight in compare_weights(source, source):
        assert (math.inf, 0.0) == (weight.errors.sqnr_db, weight.errors.max_error)


@pytest.mark.parametrize("precision", ["int8", "int4-rtn", "int4", "fp8-e4m3"])
def test_precisions_of_decoders_are_read_back(folders, precision):
    found = compare_weights(folders["fp32"], folders[precision])
    assert 8 == len(found)  # four products in each of two layers; the head is too small to count
    worst = min(weight.errors.sqnr_db for weight in found)
    best = {"int8": 60, "int4-rtn": 30, "int4": math.inf, "fp8-e4m3": 40}[precision]
    assert {"int8": 38, "int4-rtn": 12, "int4": 40, "fp8-e4m3": 25}[precision] < worst <= best


def test_codes_behind_dequantizelinear_are_expanded_per_channel_and_per_block(tmp_path):
    weights = WEIGHTS["up"]
    exact = model([make.make_node("MatMul", ["x", "w"], ["y"], name="mm")], [tensor("x", ["n", 64])],
                  [tensor("y", ["n", 96])], [("w", weights)])  # fmt: skip
    onnx.save(exact, tmp_path / "a.onnx")
    channel = quantize(weights, axis=1)
    shifted = quantize(weights, axis=1, symmetric=False)
    blocks = quantize(np.ascontiguousarray(weights.T), block_size=16)
    cases = [
        (channel.data, channel.scale, {"axis": 1}, dequantize(channel)),
        (blocks.data.T, blocks.scale.T, {"axis": 0, "block_size": 16}, dequantize(blocks).T),
        (shifted.data, shifted.scale, {"axis": 1}, dequantize(shifted)),
    ]
    for codes, scale, settings, kept in cases:
        zero = [("z", shifted.zero_point)] if codes is shifted.data else []
        nodes = [
            make.make_node("DequantizeLinear", ["q", "s", *(n for n, _ in zero)], ["w"], name="dq", **settings),
            *exact.graph.node,
        ]
        stored = [("q", np.ascontiguousarray(codes)), ("s", np.ascontiguousarray(scale)), *zero]
        onnx.save(model(nodes, exact.graph.input, exact.graph.output, stored), tmp_path / "b.onnx")
        (found,) = compare_weights(tmp_path / "a.onnx", tmp_path / "b.onnx")
        assert errors(weights, kept) == found.errors


def test_onnxruntimes_dynamic_quantization_is_read_back(source, tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, tmp_path / "dynamic.onnx", per_channel=True)
    found = {weight.name: weight for weight in compare_weights(source, tmp_path / "dynamic.onnx")}
    assert 35 < found["first"].errors.sqnr_db < 60


def test_models_without_a_weight_in_common_are_told_so(source, tmp_path):
    other = model([make.make_node("Relu", ["x"], ["r"], name="r")], [tensor("x", ["n"])], [tensor("r", ["n"])])
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(IncomparableModelsError, match="none of the 3 weights"):
        compare_weights(source, tmp_path / "other.onnx")
    with pytest.raises(IncomparableModelsError, match="no float weights"):
        compare_weights(tmp_path / "other.onnx", source)
