"""Named ways to make a whole model smaller, and what each one does to a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from seawall.inference.errors import InvalidSettingError

from .weights import ROUNDINGS

FORMS = ("blocks", "static", "fp8-e4m3", "fp8-e5m2", "fp8-e4m3-native")
SCALINGS = ("none", "awq", "smooth")


MIXED = "mixed"


class Grid(NamedTuple):
    """How one weight is rounded."""

    bits: int
    block: int
    rounding: str
    asymmetric: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is quantized. Take one of `RECIPES`, or change one: `replace(RECIPES["int4-hqq"], block=64)`.

    Attributes:
        name: what the manifest and the reports call it.
        form: "blocks": weights in blocks, inputs rounded to 8 bits block by block as they come (MatMulNBits).
            "static": weights and inputs in 8 bits, with scales fixed by calibration (Q/DQ). "fp8-e4m3" and
            "fp8-e5m2": weights stored as 8-bit floats, expanded when they are loaded. "fp8-e4m3-native": the same
            for a GPU that multiplies them; it does not run on a CPU.
        bits: of a weight: 8, 4, or, by explicit choice, 2.
        block: inputs that share a scale: a power of two from 16 on. With 32 an output does not depend on the
            other rows of a batch.
        rounding: "rtn", "mse", "hqq", "kquant" or "gptq"; see `round_weight`.
        asymmetric: whole zero points: 0.1 bit more per weight in blocks of 32, at no cost in speed.
        scaling: "awq" or "smooth" move some of the size of a weight's inputs into the weight, where a norm or a
            product before it can take it up; "none" does not.
        head_bits: of a product that yields the model's outputs, such as the logits; it is the one that hurts most.
        head_block: inputs that share a scale there.
        embedding_bits: of the tables that tokens are looked up in; None leaves them as they are.
        smallest: weights of fewer elements stay as they are.
        strength: 0 to 1, how much "smooth" moves; None searches it for each input, as "awq" always does.
        narrow: for "static": 7-bit weights, which processors without VNNI need or else sums may overflow.
            None decides by this machine's processor.
        plan: for "mixed": how the weight of each node is rounded, by the node's name, where it is not as the rest.
        meaning: in a few words.
    """

    name: str
    form: str = "blocks"
    bits: int = 8
    block: int = 32
    rounding: str = "rtn"
    asymmetric: bool = False
    scaling: str = "none"
    head_bits: int = 8
    head_block: int = 32
    embedding_bits: int | None = 8
    smallest: int = 1024
    strength: float | None = None
    narrow: bool | None = None
    plan: tuple[tuple[str, Grid], ...] = ()
    meaning: str = ""

    def __post_init__(self) -> None:
        _one_of("form", self.form, FORMS)
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("scaling", self.scaling, SCALINGS)
        for name, bits in (("bits", self.bits), ("head_bits", self.head_bits)):
            _one_of(name, bits, (8, 4, 2))
        _one_of("embedding_bits", self.embedding_bits, (8, 4, None))
        for name, block in (("block", self.block), ("head_block", self.head_block)):
            if type(block) is not int or not 16 <= block <= 1024 or block & (block - 1):
                raise InvalidSettingError(f"{name} must be a power of two from 16 to 1024, got {block!r}")
        if type(self.smallest) is not int or self.smallest < 1:
            raise InvalidSettingError(f"smallest must be a whole number of at least 1, got {self.smallest!r}")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise InvalidSettingError(f"strength must be from 0 to 1, or None to search it, got {self.strength!r}")

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        return self.form == "static" or self.scaling != "none" or self.rounding == "gptq"

    @property
    def opset(self) -> int:
        """The least version of ONNX's operators that it builds on."""
        if self.form == "blocks":
            return 7
        return 13 if self.form == "static" else 19

    @property
    def planned(self) -> dict[str, Grid]:
        """The plan by node."""
        return dict(self.plan)

    @property
    def body(self) -> Grid:
        """How the model's inner weights are rounded."""
        return Grid(self.bits, self.block, self.rounding, self.asymmetric)

    @property
    def head(self) -> Grid:
        """How the weight of a last product is rounded: plainly where it has 8 bits, for then nothing is to gain."""
        if self.head_bits == 8:
            return Grid(8, self.head_block, "rtn", asymmetric=False)
        return Grid(self.head_bits, self.head_block, self.rounding, self.asymmetric)


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise InvalidSettingError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")


_INT4 = Recipe(name="int4", bits=4, asymmetric=True)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="int8", block=64, head_block=64, meaning="8-bit weights, one scale per 64: the fast choice"),
        Recipe(name="int8-block32", meaning="8-bit weights, one scale per 32: the careful choice"),
        replace(_INT4, name="int4-rtn", asymmetric=False, meaning="4 bits, plain rounding: the baseline"),
        replace(_INT4, name="int4-hqq", rounding="hqq", meaning="4 bits, half-quadratic; no data needed"),
        replace(_INT4, name="int4-kquant", rounding="kquant", meaning="4 bits, searched ranges; no data needed"),
        replace(_INT4, name="int4-awq", rounding="kquant", scaling="awq", meaning="4 bits, inputs' sizes evened out"),
        replace(_INT4, name="int4-gptq", rounding="gptq", meaning="4 bits, later weights make up for errors"),
        replace(
            _INT4, name="int4-awq-gptq", rounding="gptq", scaling="awq", meaning="4 bits, both of them: the best of 4"
        ),
        Recipe(name="int2-kquant", bits=2, rounding="kquant", asymmetric=True, meaning="2 bits: an experiment"),
        Recipe(name="int2-gptq", bits=2, rounding="gptq", asymmetric=True, meaning="2 bits: an experiment"),
        Recipe(name="int8-static", form="static", scaling="smooth", meaning="weights and inputs 8 bits: for encoders"),
        Recipe(name="fp8-e4m3", form="fp8-e4m3", meaning="8-bit floats on disk, expanded when loaded"),
        Recipe(name="fp8-e5m2", form="fp8-e5m2", meaning="8-bit floats of less precision on disk"),
        Recipe(
            name="fp8-e4m3-native", form="fp8-e4m3-native", meaning="8-bit floats for CUDA's own product; never run"
        ),
    )
}


def recipe_of(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or the recipe itself."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise InvalidSettingError(f"recipe must be one of {', '.join([*RECIPES, MIXED])}, or a Recipe, got {recipe!r}")
    return RECIPES[recipe]
