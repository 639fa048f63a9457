"""ONNX models to quantize, made in the test that needs them."""

import numpy as np
import onnx
from onnx import TensorProto
from onnx import helper as make

from tests.inference.onnx_models import model, tensor

WIDTH = 64


def weights(seed, *shape, spread=1.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * spread / np.sqrt(shape[0])).astype(np.float32)


def encoder(seed=0, vocabulary=128, outliers=False):
    """Tokens to vectors: a table, two gated blocks with norms, a last Gemm. `outliers`: norms have large channels."""
    rng = np.random.default_rng(seed)
    node = make.make_node
    gamma = rng.uniform(0.5, 1.5, WIDTH).astype(np.float32)
    if outliers:
        gamma[::16] *= 40
    nodes = [node("Gather", ["table", "ids"], ["h0"], name="embed")]
    stored = [("table", weights(seed + 1, vocabulary, WIDTH, spread=8)), ("gamma", gamma),
              ("beta", rng.normal(size=WIDTH).astype(np.float32) * gamma * 0.1)]  # fmt: skip
    for layer in range(2):
        at, hidden = f"l{layer}.", f"h{layer}"
        stored += [
            (f"{at}up", weights(seed + 10 + layer, WIDTH, 256)),
            (f"{at}down", weights(seed + 20 + layer, 128, WIDTH)),
            (f"{at}bias", rng.normal(size=WIDTH).astype(np.float32)),
        ]
        nodes += [
            node("LayerNormalization", [hidden, "gamma", "beta"], [f"{at}n"], name=f"{at}norm", axis=-1),
            node("MatMul", [f"{at}n", f"{at}up"], [f"{at}u"], name=f"{at}up"),
            node("Split", [f"{at}u"], [f"{at}a", f"{at}b"], name=f"{at}split", axis=-1, num_outputs=2),
            node("Sigmoid", [f"{at}a"], [f"{at}g"], name=f"{at}gate"),
            node("Mul", [f"{at}g", f"{at}b"], [f"{at}m"], name=f"{at}mul"),
            node("MatMul", [f"{at}m", f"{at}down"], [f"{at}d"], name=f"{at}down"),
            node("Add", [f"{at}d", f"{at}bias"], [f"{at}e"], name=f"{at}add"),
            node("Add", [hidden, f"{at}e"], [f"h{layer + 1}"], name=f"{at}residual"),
        ]
    stored += [("head", weights(seed + 30, 32, WIDTH)), ("head.bias", np.arange(32, dtype=np.float32))]
    nodes += [node("Gather", ["h2", "first"], ["pooled"], name="pool", axis=1),
              node("Gemm", ["pooled", "head", "head.bias"], ["y"], name="head", transB=1)]  # fmt: skip
    stored.append(("first", np.array(0, np.int64)))
    return model(nodes, [tensor("ids", ["batch", "tokens"], TensorProto.INT64)], [tensor("y", ["batch", 32])], stored)


def tokens(seed, batch=4, count=12, vocabulary=128):
    return {"ids": np.random.default_rng(seed).integers(0, vocabulary, (batch, count))}


def saved(made, folder, *, external=False, name="model.onnx"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    if external:
        onnx.save(made, path, save_as_external_data=True, location="data.bin", size_threshold=0)
    else:
        onnx.save(made, path)
    return path


def with_subgraph():
    """A product of its own, and one inside both branches of an If."""
    branches = {
        f"{side}_branch": make.make_graph(
            [make.make_node("MatMul", ["x", "inner"], [f"{side}_out"])], side, [], [tensor(f"{side}_out", None)]
        )
        for side in ("then", "else")
    }
    nodes = [
        make.make_node("If", ["go"], ["i"], name="if", **branches),
        make.make_node("MatMul", ["x", "w"], ["o"], name="mm"),
        make.make_node("Add", ["i", "o"], ["y"], name="sum"),
    ]
    stored = [("inner", weights(1, WIDTH, WIDTH)), ("w", weights(2, WIDTH, WIDTH))]
    return model(
        nodes, [tensor("x", ["b", WIDTH]), tensor("go", [], TensorProto.BOOL)], [tensor("y", ["b", WIDTH])], stored
    )
