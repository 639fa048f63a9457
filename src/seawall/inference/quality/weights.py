"""What each weight of a model lost, read from the files: codes are expanded again and compared with the reference's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from seawall.inference.errors import IncomparableModelsError, NotFiniteError
from seawall.inference.models.lossless import adopted_values
from seawall.inference.models.packing import PackedWeight, unpack
from seawall.inference.quantize.measures import Errors, errors
from seawall.inference.quantize.products import Graph, Lookup, Product, attribute, find
from seawall.inference.quantize.source import Source

Array = np.ndarray[Any, Any]
Progress = Callable[[str, float], None]
_SMALLEST = 1024  # elements; fewer is no weight worth a row


@dataclass(frozen=True, slots=True)
class WeightScores:
    """What one weight lost.

    Attributes:
        name: the node that uses it.
        op_type: the operator that does in the candidate.
        shape: as the reference stores it.
        errors: mean squared, mean absolute and largest difference, and signal to noise.
    """

    name: str
    op_type: str
    shape: tuple[int, ...]
    errors: Errors


def compare_weights(
    reference: str | os.PathLike[str], candidate: str | os.PathLike[str], *, progress: Progress | None = None
) -> tuple[WeightScores, ...]:
    """Compare the weights of two ONNX models, .onnx files or folders that hold model.onnx; one is in memory at a time.

    A weight belongs to the node that makes the same output in both models, or has the same name. Weights that are
    not found in the candidate, or not in a form that is known here, are left out. Recipes that even out channels
    (AWQ, SmoothQuant) multiply each input of a weight by a factor that is paid back elsewhere: for models whose
    manifest names such a recipe the best factor per input is divided out first.

    Raises:
        IncomparableModelsError: not one weight in common, or none in float in the reference.
        CorruptModelError: a model is damaged, or its data lies outside its folder.
    """
    first, second = Source(reference), Source(candidate)
    found = find(first, Graph(first), _SMALLEST)
    weights: list[Product | Lookup] = [*found.products, *found.lookups]
    if not weights:
        raise IncomparableModelsError(f"{first.path} has no float weights to compare with: give the model in float")
    kept = _Kept(second)
    recipe = second.facts.get("recipe")
    scaled = isinstance(recipe, dict) and recipe.get("scaling", "none") != "none"
    scores = []
    for done, weight in enumerate(weights):
        if (other := kept.matrix(weight)) is not None:
            scores.append(_compared(first, weight, *other, scaled=scaled))
        if progress is not None:
            progress("comparing weights", (done + 1) / len(weights))
    if not scores:
        raise IncomparableModelsError(
            f"{second.path} has none of the {len(weights)} weights of {first.path}: "
            "nodes are matched by their outputs' names, and by their own"
        )
    return tuple(scores)


def _compared(source: Source, weight: Product | Lookup, op_type: str, kept: Array, *, scaled: bool) -> WeightScores:
    """Both as the reference stores them."""
    stored = weight.weight if isinstance(weight, Product) else weight.table
    exact = source.weights(stored)
    if isinstance(weight, Product) and weight.transposed:
        kept = kept.T
    if scaled and isinstance(weight, Product):
        kept = _unscaled(exact, kept, axis=1 if weight.transposed else 0)
    try:
        return WeightScores(weight.name, op_type, tuple(exact.shape), errors(exact, kept))
    except NotFiniteError as error:
        raise NotFiniteError(error.count, error.index, stored) from None


def _unscaled(exact: Array, kept: Array, axis: int) -> Array:
    """`kept` without the least-squares factor of each input; `axis` is that of the outputs, which is summed over."""
    power = (kept * kept).sum(axis=axis, keepdims=True)
    factor = np.divide((exact * kept).sum(axis=axis, keepdims=True), power, out=np.ones_like(power), where=power > 0)
    unscaled: Array = kept * factor
    return unscaled


class _Kept:
    """The weights of a quantized model, expanded one at a time."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._graph = Graph(source)
        self._by_output = {name: node for node in self._graph.nodes for name in node.output if name}
        self._by_name = {node.name: node for node in self._graph.nodes if node.name}

    def matrix(self, weight: Product | Lookup) -> tuple[str, Array] | None:
        """The operator, and [outputs, inputs] of a product or the rows of a table; None where there is none."""
        name = weight.weight if isinstance(weight, Product) else weight.table
        shape = (weight.rows, weight.columns)
        for node in (self._by_output.get(weight.output), self._by_name.get(weight.name)):
            if node is not None and (found := self._of_node(node, weight)) is not None and found.shape == shape:
                return str(node.op_type), found
        found = self._integers(name)
        if found is not None and isinstance(weight, Product) and weight.transposed:
            found = found.T
        return None if found is None or found.shape != shape else ("MatMulInteger", found)

    def _of_node(self, node: Any, weight: Product | Lookup) -> Array | None:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            return self._blocks(node, weight)
        if node.op_type in ("MatMul", "Gemm") and isinstance(weight, Product):
            values = self._dequantized(node.input[1])
            rows = node.op_type == "Gemm" and attribute(node, "transB", 0)
            return values if values is None or rows else values.T
        if node.op_type == "Gather":
            return self._dequantized(node.input[0])
        return None

    def _blocks(self, node: Any, weight: Product | Lookup) -> Array | None:
        product = node.op_type == "MatMulNBits"
        data, scales, zeros = (node.input[1:4] if product else [node.input[0], *node.input[2:4]])[:3] + [""] * (
            3 - len(node.input[1:4])
        )
        bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 128)
        rows, blocks = weight.rows, -(-attribute(node, "K", weight.columns) // block)
        codes = self._values(data)
        if codes is None or codes.dtype != np.uint8 or (zeros and not product):
            return None
        codes = codes.reshape(rows, -1)
        codes = np.pad(codes, ((0, 0), (0, blocks * block * bits // 8 - codes.shape[1])))
        zero_points = self._values(zeros) if zeros else None
        if zero_points is not None:
            if zero_points.dtype != np.uint8:
                return None
            zero_points = zero_points.reshape(rows, -1)
        packed = PackedWeight(
            codes.reshape(rows, blocks, -1), np.asarray(self._values(scales), np.float32).reshape(rows, blocks),
            rows, attribute(node, "K", weight.columns), bits, block, zero_points,
        )  # fmt: skip
        return unpack(packed) if packed.columns == weight.columns else adopted_values(packed, weight.columns)

    def _dequantized(self, name: str) -> Array | None:
        """The values of an initializer, or of one behind a DequantizeLinear and perhaps a Transpose."""
        constant = self._graph.constant(name)
        if constant is not None:
            values = np.asarray(self._source.array(constant.tensor), np.float32)
            return values.T if constant.transposed else values
        node = self._by_output.get(name)
        if node is not None and node.op_type == "Transpose" and attribute(node, "perm", [1, 0]) == [1, 0]:
            inner = self._dequantized(node.input[0])
            return None if inner is None else inner.T
        if node is None or node.op_type != "DequantizeLinear":
            return None
        codes, scale, zero = (self._values(each) if each else None for each in [*node.input, ""][:3])
        if codes is None or scale is None:
            return None
        axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        return _expanded(codes, scale, zero, axis % codes.ndim, block)

    def _integers(self, name: str) -> Array | None:
        """What ONNX Runtime's quantize_dynamic makes of a weight."""
        codes, scale = self._values(f"{name}_quantized"), self._values(f"{name}_scale")
        if codes is None or scale is None:
            return None
        return _expanded(codes, scale, self._values(f"{name}_zero_point"), codes.ndim - 1, 0)

    def _values(self, name: str) -> Array | None:
        return self._source.array(name) if name in self._source.tensors else None


def _expanded(codes: Array, scale: Array, zero: Array | None, axis: int, block: int) -> Array:
    """(codes - zero) * scale, with one scale for all, per index of `axis`, or per `block` of them."""
    values = codes.astype(np.float32)
    for step, array in enumerate(_spread(codes.shape, (zero, scale), axis, block)):
        if array is not None:
            values = values * array if step else values - array
    return values


def _spread(shape: tuple[int, ...], arrays: tuple[Array | None, ...], axis: int, block: int) -> Iterator[Array | None]:
    """The arrays as float32, shaped to broadcast."""
    for array in arrays:
        if array is None or array.size == 1:
            yield None if array is None else array.astype(np.float32).reshape(())
        elif block:
            spread = np.repeat(array.astype(np.float32), block, axis=axis)
            yield np.take(spread, range(shape[axis]), axis=axis)
        else:
            yield array.astype(np.float32).reshape([-1 if one == axis else 1 for one in range(len(shape))])
