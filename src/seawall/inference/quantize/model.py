"""A whole ONNX model in fewer bits: what can be rounded is rounded, what cannot is told, and a folder is published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seawall.inference.errors import InvalidSettingError, ModelCacheError, QuantizationError
from seawall.inference.models.cache import locked, publishing, read_verified, write_manifest
from seawall.inference.runtime import ort

from .blocks import Blocks
from .calibration import Calibration, Feed, feeds_of, is_decoder, told
from .float8_weights import Float8, NativeFloat8
from .mixed import plan, sensitivity
from .passes import QuantizedWeight, Weights
from .products import Found, Graph, Left, find
from .recipes import MIXED, Recipe, recipe_of
from .source import MODEL, Source, onnx
from .static import Static
from .target import WEIGHTS, Target

_MOST_TOLD = 2000  # weights and nodes of a manifest, which has at most 1 MiB
_FORMS: dict[str, type[Weights]] = {
    "blocks": Blocks,
    "static": Static,
    "fp8-e4m3": Float8,
    "fp8-e5m2": Float8,
    "fp8-e4m3-native": NativeFloat8,
}


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A quantized model on disk, its files verified; a PreparedModel that also says what was done.

    Attributes:
        folder: holds `model.onnx`, `weights.bin` and `manifest.json`, and the tokenizer where the source has one.
        facts: what the manifest says.
        weights: what became of each weight.
        left: nodes that hold weights and stay as they are, each with the reason.
        bytes: of the graph and the weights on disk.
    """

    folder: Path
    facts: dict[str, Any]
    weights: tuple[QuantizedWeight, ...]
    left: tuple[Left, ...]
    bytes: int


def quantize_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    recipe: str | Recipe,
    calibration: Calibration | None = None,
    budget: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> QuantizedModel:
    """Quantize an ONNX model into a new folder, which appears whole or not at all.

    The same source, recipe and calibration give the same bytes again. The source is read one weight at a time.

    ```python
    import tempfile
    from pathlib import Path

    import numpy as np
    import onnx
    from onnx.parser import parse_model

    from seawall.inference import Backend
    from seawall.inference.quantize import quantize_model

    text = '<ir_version: 10, opset_import: ["" : 21]> double (float[n, 64] x) => (float[n, 64] y) { y = MatMul(x, w) }'
    model = parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(2 * np.eye(64, dtype=np.float32), "w"))
    folder = Path(tempfile.mkdtemp())
    onnx.save(model, folder / "float.onnx")

    small = quantize_model(folder / "float.onnx", folder / "small", recipe="int8")
    with Backend.load(small.folder) as backend:
        print(backend.run_sync({"x": np.ones((1, 64), np.float32)})["y"][0, :3], small.weights[0].stored)
    #> [2. 2. 2.] 8 bits, block 64, rtn
    ```

    Args:
        source: an .onnx file, its external data beside it, or a prepared folder, such as that of
            `models.prepare(..., precision="fp32")`.
        target: a folder that does not exist yet.
        recipe: a name in `RECIPES`, or a Recipe.
        calibration: what recipes that look at a product's inputs run the model on: arrays by input name; or, for
            a prepared decoder, texts or lists of tokens. A few thousand rows will do. None is enough for a decoder:
            a short text comes with this package. "kquant" uses what is given.
        budget: for "mixed", most bytes that the weights of inner products take together.
        progress: called with what is being done and how much of it, 0 to 1.

    Raises:
        InvalidSettingError: an unknown recipe, no calibration where it needs some, a target that exists.
        CorruptModelError: the source is damaged, or its data lies outside its folder.
        NotFiniteError: NaN or infinity in a weight, or in what the model makes of the calibration; `tensor` names it.
        QuantizationError: nothing in the model can be quantized, or its operators are too old for the recipe.
        ModelCacheError: the target cannot be written.
        RuntimeFailure: ONNX Runtime does not run the source on the calibration, or does not load the result.
    """
    into = Path(target).expanduser()
    _refuse_existing(into)
    if calibration is not None and not isinstance(calibration, (str, Mapping)):
        calibration = list(calibration)  # it may be read twice
    if recipe == MIXED:
        chosen = _mixed(source, calibration, budget, progress)
    else:
        chosen = recipe_of(recipe)
        if budget is not None:
            raise InvalidSettingError(f"budget goes with recipe {MIXED!r}, and this one is {chosen.name!r}")
    model = Source(source)
    looks = chosen.calibrated or (calibration is not None and chosen.rounding == "kquant")
    feeds = feeds_of(model, calibration, f"recipe {chosen.name!r}") if looks else []
    with locked(into):
        _refuse_existing(into)
        result = _build(model, into, chosen, feeds, progress or (lambda _stage, _done: None))
        (into.parent / f".{into.name}.lock").unlink(missing_ok=True)  # whoever waits for it finds the target there
    return result


def _mixed(
    source: str | os.PathLike[str],
    calibration: Calibration | None,
    budget: int | None,
    progress: Callable[[str, float], None] | None,
) -> Recipe:
    """The recipe of the plan for a budget."""
    if budget is None:
        raise InvalidSettingError(f"recipe {MIXED!r} needs a budget: most bytes that the weights may take")
    measure = "kl" if is_decoder(Source(source)) else "error"
    return plan(sensitivity(source, calibration=calibration, measure=measure, progress=progress), budget).recipe()


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise InvalidSettingError(f"target must be a folder that does not exist yet, and {str(target)!r} does")


def _build(
    source: Source, target: Path, recipe: Recipe, feeds: list[Feed], progress: Callable[[str, float], None]
) -> QuantizedModel:
    graph = Graph(source)
    found = find(source, graph, recipe.smallest)
    _check(source, found, recipe)
    size = sum(path.stat().st_size for path in source.files())
    with publishing(target, needed_bytes=size + (1 << 20)) as folder:
        with (folder / WEIGHTS).open("wb") as file:
            work = _FORMS[recipe.form](source, graph, found, recipe, Target(source, graph, file), progress)
            work.run(feeds)
            work.target.finish(folder)
        for path in source.other_files():
            shutil.copyfile(path, folder / path.name)
        progress("checking", 0.0)
        _check_loads(folder / MODEL, recipe)
        write_manifest(folder, _facts(source, recipe, work, feeds))
        if (facts := read_verified(folder)) is None:
            raise ModelCacheError(folder, OSError("what was written does not read back the same"))
        total = sum((folder / name).stat().st_size for name in (MODEL, WEIGHTS))
        progress("checking", 1.0)
    return QuantizedModel(target, facts, tuple(work.done.values()), tuple(found.left), total)


def _check(source: Source, found: Found, recipe: Recipe) -> None:
    if not found.products and not found.lookups:
        why = "; ".join(f"{left.node} ({left.op_type}): {left.why}" for left in found.left[:5])
        raise QuantizationError(
            f"nothing in {source.path} can be quantized: it has no MatMul, Gemm or Gather with a constant float matrix"
            + (f" ({why})" if why else "")
        )
    needed = recipe.opset
    if source.opset < needed:
        raise QuantizationError(
            f"recipe {recipe.name!r} needs operators of opset {needed}, and {source.path} is of {source.opset}: "
            f"convert it with onnx.version_converter.convert_version(model, {max(needed, 21)}), or export it anew"
        )


def _check_loads(path: Path, recipe: Recipe) -> None:
    if recipe.form.endswith("native"):
        return  # no CPU can
    try:
        ort.open_session(str(path), providers=[("CPUExecutionProvider", {})], threads=1)
    except ort.EXCEPTIONS as error:
        raise ort.typed(f"loading the quantized {path.name}", error) from error


def _facts(source: Source, recipe: Recipe, work: Weights, feeds: list[Feed]) -> dict[str, Any]:
    worst_first = sorted(work.done.values(), key=lambda weight: weight.sqnr_db)[:_MOST_TOLD]
    return {
        "model": source.path.stem,
        **{key: value for key, value in source.facts.items() if key not in ("recipe", "quality", "quantization")},
        "precision": recipe.name,
        "recipe": asdict(recipe),
        "quantization": {
            "source_digest": source.digest(),
            "source_precision": source.facts.get("precision", "unknown"),
            "versions": {"numpy": np.__version__, "onnx": onnx.__version__, "onnxruntime": ort.version},
            "weights": [
                [weight.name, weight.stored, weight.bytes, round(max(-999.0, min(weight.sqnr_db, 999.0)), 2)]
                for weight in worst_first
            ],
            "calibration": told(feeds),
            **work.remarks(),
            "left": [list(left) for left in work.found.left[:_MOST_TOLD]],
        },
    }
