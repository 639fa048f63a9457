"""Weights stored as 8-bit floats, one scale per output, and what becomes of them when a model is loaded.

No CPU multiplies 8-bit floats. The file says DequantizeLinear, which is portable and correct, but ONNX Runtime would
expand every weight at every run (measured: 3 tokens a second instead of 100). So a loader calls `expand_fp8`, which
rounds the weights once more, to 8-bit blocks that have a fast kernel, and hands them over in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .calibration import Feed
from .float8 import decode_e4m3, decode_e5m2, encode_e4m3, encode_e5m2
from .layout import Array
from .passes import Weights
from .products import Left, Product
from .source import TensorProto
from .target import CONTRIB

NATIVE_BLOCK = 128  # inputs per scale of MatMulBlockQuantizedFp8Weight
_FORMATS = {
    "fp8-e4m3": (TensorProto.FLOAT8E4M3FN, 448.0, encode_e4m3, decode_e4m3),
    "fp8-e5m2": (TensorProto.FLOAT8E5M2, 57344.0, encode_e5m2, decode_e5m2),
}


class Float8(Weights):
    """Puts a DequantizeLinear of 8-bit floats in place of each weight; the products stay."""

    def run(self, feeds: list[Feed]) -> None:
        """Replace every weight of a product, and every table."""
        form = self.recipe.form
        kind, largest, encode, decode = _FORMATS[form]
        tables = {lookup.table for lookup in self.found.lookups}
        done = set()
        for product in self.found.products:
            self.advance()
            name, axis = product.weight, int(product.transposed)  # where outputs stand in the stored weight
            if name in done:
                self.tell_again(name, product.name, _told(form))
                continue
            if product.kind != TensorProto.FLOAT:
                self.found.left.append(Left(product.name, "MatMul", "only FLOAT weights are stored as 8-bit floats"))
                continue
            done.add(name)
            weights = self.source.weights(name)
            scale = _scale(weights, axis, largest)
            spread = scale[:, None] if axis == 0 else scale
            codes = encode(weights / spread)
            self._store(name, weights.shape, kind, codes, scale, axis)
            if name in tables and axis == 0:
                self._look_up(name, scale, _told(form))
            self.tell(name, product.name, _told(form), weights, decode(codes) * spread, codes.size + scale.nbytes)
        for lookup in self.found.lookups:
            if lookup.table not in done:
                self._store_table(lookup.table, lookup.name, form)

    def remarks(self) -> dict[str, Any]:
        """That loaders are to expand it."""
        return {"storage": self.recipe.form}

    def _store(self, name: str, shape: tuple[int, ...], kind: int, codes: Array, scale: Array, axis: int) -> None:
        self.target.raw(f"{name}.f8", shape, kind, codes.tobytes())
        inputs = [f"{name}.f8", self.target.tensor(f"{name}.scale", scale)]
        self.target.begin_with(
            self.target.node("DequantizeLinear", inputs, [name], name=f"{name}.dequantize", axis=axis)
        )

    def _store_table(self, name: str, node: str, form: str) -> None:
        kind, largest, encode, decode = _FORMATS[form]
        table = self.source.weights(name)
        scale = _scale(table, 0, largest)
        codes = encode(table / scale[:, None])
        self.target.raw(f"{name}.f8", table.shape, kind, codes.tobytes())
        self._look_up(name, scale, _told(form))
        self.tell(name, node, _told(form), table, decode(codes) * scale[:, None], codes.size + scale.nbytes)

    def _look_up(self, name: str, scale: Array, stored: str) -> None:
        """Look rows up in the codes themselves: few rows are expanded, at any load."""
        for lookup in self.found.lookups:
            if lookup.table != name:
                continue
            block = max(16, 1 << (lookup.columns - 1).bit_length())  # a row is one block
            rows = self.target.tensor(f"{name}.scale.rows", scale[:, None])
            node = self.target.node(
                "GatherBlockQuantized", [f"{name}.f8", lookup.indices, rows], [lookup.output], name=lookup.name,
                domain=CONTRIB, block_size=block, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
            self.target.replace(lookup.node, node)


class NativeFloat8(Weights):
    """Puts CUDA's product of 8-bit floats in place of products: E4M3, one scale per 128 inputs, float16 around it.

    ONNX Runtime has this kernel for GPUs only. The form follows its schema and **has never been run**.
    """

    def run(self, feeds: list[Feed]) -> None:
        """Replace every product whose inputs are whole blocks."""
        for product in self.found.products:
            self.advance()
            if product.columns % NATIVE_BLOCK or product.kind != TensorProto.FLOAT:
                why = f"its {product.columns} inputs are no multiple of {NATIVE_BLOCK}"
                self.found.left.append(Left(product.name, "MatMul", why))
                continue
            self._multiply(product)
        for lookup in self.found.lookups:
            self.found.left.append(Left(lookup.name, "Gather", "tables stay as they are in this form"))

    def remarks(self) -> dict[str, Any]:
        """That no processor here could check it."""
        return {"storage": self.recipe.form, "unrun": True}

    def _multiply(self, product: Product) -> None:
        matrix = self.matrix(product)
        blocks = matrix.reshape(product.rows, -1, NATIVE_BLOCK)
        scale = np.maximum(np.abs(blocks).max(axis=2) / np.float32(448), np.float32(1e-30))
        codes = encode_e4m3(blocks / scale[:, :, None])
        at = f"{product.output}.f8"
        self.target.raw(f"{at}.q", matrix.shape, TensorProto.FLOAT8E4M3FN, codes.tobytes())
        inputs = [f"{at}.x", f"{at}.q", self.target.tensor(f"{at}.s", scale)]
        if (bias := self.bias(product)) is not None:
            inputs += ["", self.target.tensor(f"{at}.b", bias.astype(np.float16))]
        make = self.target.node
        self.target.replace(
            product.node,
            make("Cast", [product.source], [f"{at}.x"], name=f"{at}.narrow", to=TensorProto.FLOAT16),
            make("MatMulBlockQuantizedFp8Weight", inputs, [f"{at}.y"], name=product.name, domain=CONTRIB,
                 block_size=NATIVE_BLOCK),
            make("Cast", [f"{at}.y"], [product.output], name=f"{at}.widen", to=TensorProto.FLOAT),
        )  # fmt: skip
        kept = (decode_e4m3(codes) * scale[:, :, None]).reshape(matrix.shape)
        self.tell(product.weight, product.name, f"E4M3, block {NATIVE_BLOCK}", matrix, kept, codes.size + scale.nbytes)


def _scale(weights: Array, axis: int, largest: float) -> Array:
    """Per index of the axis, so that the largest magnitude becomes the largest code; 1 for zeros."""
    size = np.abs(weights).max(axis=1 - axis)
    return np.where(size > 0, np.maximum(size / np.float32(largest), np.float32(1e-30)), np.float32(1)).astype(
        np.float32
    )


def _told(form: str) -> str:
    return f"{form.removeprefix('fp8-').upper()} floats, per output"
