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


INT64 = TensorProto.INT64


def encoder(width=8, words=50, *, masked=True, heads=1):
    """A small transformer of one layer: ids [batch, sequence] to states [batch, sequence, width] and [batch, width].

    With `masked` it takes a mask as well, and ignores what that says is padding.
    """
    random = np.random.default_rng(0)
    weights = [("words", random.normal(size=(words, width)).astype(np.float32)),
               ("w", random.normal(size=(width, width)).astype(np.float32) / width**0.5),
               ("one", np.array(1, np.float32)), ("much", np.array(-1e9, np.float32)), ("axis1", np.array([1])),
               ("axis2", np.array([2])), ("least", np.array(1e-9, np.float32))]  # fmt: skip
    node = make.make_node
    nodes = [
        node("Gather", ["words", "ids"], ["e"]),
        *([node("Cast", ["mask"], ["m"], to=FLOAT)] if masked else
          [node("Cast", ["ids"], ["f"], to=FLOAT), node("Sub", ["f", "f"], ["z"]), node("Add", ["z", "one"], ["m"])]),
        node("Sub", ["one", "m"], ["out"]), node("Mul", ["out", "much"], ["far"]),
        node("Unsqueeze", ["far", "axis1"], ["bias"]),
        node("Transpose", ["e"], ["t"], perm=[0, 2, 1]), node("MatMul", ["e", "t"], ["raw"]),
        node("Add", ["raw", "bias"], ["scores"]), node("Softmax", ["scores"], ["attention"], axis=-1),
        node("MatMul", ["attention", "e"], ["context"]), node("MatMul", ["context", "w"], ["states"]),
        node("Unsqueeze", ["m", "axis2"], ["m3"]), node("Mul", ["states", "m3"], ["kept"]),
        node("ReduceSum", ["kept", "axis1"], ["sum"], keepdims=0),
        node("ReduceSum", ["m", "axis1"], ["raw_count"], keepdims=1), node("Max", ["raw_count", "least"], ["count"]),
        node("Div", ["sum", "count"], ["pooled"]),
    ]  # fmt: skip
    shape = ["batch", "sequence"]
    inputs = [tensor("ids", shape, INT64), *([tensor("mask", shape, INT64)] if masked else [])]
    return model(nodes, inputs, [tensor("states", [*shape, width]), tensor("pooled", ["batch", width])], weights)


def dynamically_quantized(columns=64):
    """What `quantize_dynamic` makes of `linear`: one scale for all rows."""
    random = np.random.default_rng(0)
    whole = random.integers(-127, 127, (columns, columns)).astype(np.int8)
    weights = [("w", whole), ("ws", np.array(0.01, np.float32))]
    node = make.make_node
    nodes = [node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), node("MatMulInteger", ["q", "w", "z"], ["i"]),
             node("Cast", ["i"], ["f"], to=FLOAT), node("Mul", ["s", "ws"], ["scale"]),
             node("Mul", ["f", "scale"], ["y"])]  # fmt: skip
    return model(nodes, [tensor("x", ["batch", columns])], [tensor("y", ["batch", columns])], weights)


def normalized_over_rows(columns=4):
    """Each column less its largest value among all rows: plain float operators, and rows that depend on each other."""
    nodes = [
        make.make_node("ReduceMax", ["x", "rows"], ["most"], keepdims=1),
        make.make_node("Sub", ["x", "most"], ["y"]),
    ]
    return model(nodes, [tensor("x", ["batch", columns])], [tensor("y", ["batch", columns])], [("rows", np.array([0]))])


def endless_rows():
    """Counts to the largest of `n` [batch] and answers `n`; with a large one only its caller ends it."""
    body = make.make_graph(
        [make.make_node("Identity", ["go"], ["go_on"]), make.make_node("Add", ["h", "one"], ["more"])],
        "turn",
        [tensor("i", [], INT64), tensor("go", [], TensorProto.BOOL), tensor("h", [1])],
        [tensor("go_on", [], TensorProto.BOOL), tensor("more", [1])],
    )
    nodes = [make.make_node("ReduceMax", ["n"], ["turns"], keepdims=0),
             make.make_node("Loop", ["turns", "", "zero"], ["counted"], name="loop", body=body),
             make.make_node("Cast", ["counted"], ["whole"], to=INT64),
             make.make_node("Mul", ["whole", "none"], ["nothing"]),
             make.make_node("Add", ["n", "nothing"], ["y"])]  # fmt: skip
    weights = [("one", np.ones(1, np.float32)), ("zero", np.zeros(1, np.float32)), ("none", np.array([0]))]
    return model(nodes, [tensor("n", ["batch"], INT64)], [tensor("y", ["batch"], INT64)], weights)
