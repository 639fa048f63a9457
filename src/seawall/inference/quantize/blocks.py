"""Weights in blocks: MatMulNBits, whose inputs are rounded to 8 bits as they come, and rows looked up in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from seawall.inference.models.packing import pack, unpack

from .calibration import Feed, collect
from .passes import Weights
from .products import Left, Lookup, Product
from .recipes import Grid
from .source import onnx
from .target import CONTRIB
from .weights import InputStatistics, round_weight


class Blocks(Weights):
    """Puts MatMulNBits in place of products, and GatherBlockQuantized in place of lookups."""

    def run(self, feeds: list[Feed]) -> None:
        """Replace every product and lookup."""
        for lookup in self.found.lookups:
            self.look_up(lookup)
        self.scale(feeds)
        for products, statistics in self._with_statistics(feeds):
            for product in products:
                self.multiply(product, statistics.get(product.source))
                self.advance()

    def multiply(self, product: Product, statistics: InputStatistics | None) -> None:
        """Replace a product; a weight that several share is rounded once, for the inputs of the first."""
        grid = self.grid(product)
        at = f"{product.weight}.{grid.bits}b{grid.block}{'t' if product.transposed else ''}"
        if not self.is_plain(product):
            at += f".{product.output}"
        if not self.target.has(f"{at}.q"):
            matrix = self.matrix(product)
            packed = round_weight(
                matrix, bits=grid.bits, block=grid.block, rounding=grid.rounding, asymmetric=grid.asymmetric,
                statistics=self.seen(product, statistics),
            )  # fmt: skip
            self.target.packed(at, packed, product.kind)
            self.tell(product.weight, product.name, _told(grid), matrix, unpack(packed), packed.nbytes)
        else:
            self.tell_again(product.weight, product.name, _told(grid))
        bias = self.bias(product)
        name = "" if bias is None else self.target.tensor(f"{product.bias}.{product.output}", bias)
        self.target.replace(product.node, self.target.product(product, grid, at, name))

    def look_up(self, lookup: Lookup) -> None:
        """Replace a lookup, or say why not."""
        bits, block = self.recipe.embedding_bits, self.recipe.head_block
        why = "the recipe leaves tables as they are" if bits is None else ""
        if lookup.columns % 2:
            why = f"its rows have {lookup.columns} values, an odd number"
        if bits is None or why:
            self.found.left.append(Left(lookup.name, "Gather", why))
            return
        table = self.source.weights(lookup.table)
        packed = pack(table, bits=bits, block=block)
        at = f"{lookup.table}.rows{bits}b{block}"
        data = packed.data.reshape(lookup.rows, -1)[:, : lookup.columns * bits // 8]
        scales = packed.scales.astype(onnx.helper.tensor_dtype_to_np_dtype(lookup.kind))
        inputs = [self.target.tensor(f"{at}.q", data), lookup.indices, self.target.tensor(f"{at}.s", scales)]
        node = self.target.node(
            "GatherBlockQuantized", inputs, [lookup.output], name=lookup.name, domain=CONTRIB,
            bits=bits, block_size=block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        self.target.replace(lookup.node, node)
        stored = f"rows of {bits} bits, block {block}"
        self.tell(lookup.table, lookup.name, stored, table, unpack(packed), packed.nbytes)

    def _with_statistics(self, feeds: list[Feed]) -> Iterator[tuple[list[Product], Mapping[str, InputStatistics]]]:
        """The products with the statistics that their rounding asks for, a few at a time."""
        by_need: dict[str, list[Product]] = {"": [], "kquant": [], "gptq": []}
        for product in self.found.products:
            rounding = self.grid(product).rounding if feeds else ""
            by_need[rounding if rounding in by_need else ""].append(product)
        yield by_need[""], {}
        for rounding in ("kquant", "gptq"):
            products = by_need[rounding]
            inputs = {product.source: product.columns for product in products}
            for statistics in collect(self.source, inputs, feeds, hessian=rounding == "gptq"):
                yield [product for product in products if product.source in statistics], statistics


def _told(grid: Grid) -> str:
    return f"{grid.bits} bits, block {grid.block}, {grid.rounding}{', zero points' if grid.asymmetric else ''}"
