"""Small ONNX models, made in the test that needs them."""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx import helper as make

FLOAT = TensorProto.FLOAT


def tensor(name, shape, kind=FLOAT):
    return make.make_tensor_value_info(name, kind, shape)


def model(nodes, inputs, outputs, weights=()):
    graph = make.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(array, n) for n, array in weights])
    opsets = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
    return make.make_model(graph, opset_imports=opsets, ir_version=10)


def linear(kind="float32", columns=64):
    """Outputs y = x @ w; x is [batch, columns]."""
    weights = [("w", np.eye(columns, dtype=kind))]
    shape = ["batch", columns]
    return model([make.make_node("MatMul", ["x", "w"], ["y"], name="mm")], [tensor("x", shape)], [tensor("y", shape)],
                 weights)  # fmt: skip


def chain(nodes, columns=64):
    """`nodes` matrix products in a row, all with the same weights."""
    steps = [make.make_node("MatMul", [f"h{i}" if i else "x", "w"], [f"h{i + 1}"], name=f"mm{i}") for i in range(nodes)]
    shape = ["batch", columns]
    return model(steps, [tensor("x", shape)], [tensor(f"h{nodes}", shape)], [("w", np.eye(columns, dtype=np.float32))])


def endless():
    """Counts to `n`; with a large n only its caller ends it. Each turn is a few nodes."""
    body = make.make_graph(
        [make.make_node("Identity", ["go"], ["go_on"]), make.make_node("Add", ["h", "one"], ["more"])],
        "turn",
        [tensor("i", [], TensorProto.INT64), tensor("go", [], TensorProto.BOOL), tensor("h", [1])],
        [tensor("go_on", [], TensorProto.BOOL), tensor("more", [1])],
    )
    loop = make.make_node("Loop", ["n", "", "x"], ["y"], name="loop", body=body)
    one = [("one", np.ones(1, np.float32))]
    return model([loop], [tensor("n", [], TensorProto.INT64), tensor("x", [1])], [tensor("y", [1])], one)


def counting(turns):
    """Inputs of `endless`."""
    return {"n": np.array(turns, np.int64), "x": np.zeros(1, np.float32)}


FOREVER = counting(1 << 60)


def quantized(kind, rows=64, columns=64):
    """A matrix product whose weights are stored as `kind`: int8 in Q/DQ form, fp8 in Q/DQ form, or MatMulNBits."""
    weights = np.random.default_rng(0).normal(0, 1, (rows, columns)).astype(np.float32)
    ports = [tensor("x", ["b", rows])], [tensor("y", ["b", columns])]
    if kind == "nbits":
        blocks = rows // 32
        stored = [("q", np.zeros((columns, blocks, 16), np.uint8)), ("s", np.ones(columns * blocks, np.float32))]
        node = make.make_node("MatMulNBits", ["x", "q", "s"], ["y"], name="mm", domain="com.microsoft", K=rows,
                              N=columns, bits=4, block_size=32)  # fmt: skip
        return model([node], *ports, stored)
    nodes = [make.make_node("MatMul", ["x", "w"], ["y"], name="mm")]
    if kind == "int8":
        scale = (np.abs(weights).max(0) / 127).astype(np.float32)
        stored = [("q", np.round(weights / scale).astype(np.int8)), ("s", scale)]
        return model([make.make_node("DequantizeLinear", ["q", "s"], ["w"], name="dq", axis=1), *nodes], *ports, stored)
    made = model([make.make_node("DequantizeLinear", ["q", "s"], ["w"], name="dq"), *nodes], *ports,
                 [("s", np.array(0.1, np.float32))])  # fmt: skip
    values = [float(v) for v in (weights / 0.1).ravel()]
    made.graph.initializer.append(make.make_tensor("q", TensorProto.FLOAT8E4M3FN, [rows, columns], values))
    return made


def with_external_data(folder):
    """`linear` with its weights in a file of their own; paths of both."""
    path = folder / "model.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path, folder / "weights.bin"


def rows(count, columns=64):
    return {"x": np.ones((count, columns), np.float32)}
