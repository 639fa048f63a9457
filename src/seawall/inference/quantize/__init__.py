"""Arrays and whole models in fewer bits, without torch: rounding, packing, recipes, and what was lost.

The functions on arrays need numpy only and are here at once; those on models load with the first use of their name.
`docs/quantization.md` says what each scheme costs and loses, `docs/recipes.md` what each recipe does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from seawall.inference.errors import MissingExtraError

try:
    import numpy as np  # noqa: F401 - every module below needs it; here it is missed with advice
except ImportError as error:
    raise MissingExtraError("numpy") from error

from .arrays import Quantized, dequantize, quantize
from .bits import pack_bits, unpack_bits
from .float8 import decode_e4m3, decode_e5m2, encode_e4m3, encode_e5m2
from .measures import Errors, errors, kl_divergence, top1_agreement
from .refine import refine
from .scheme import Scheme

if TYPE_CHECKING:
    from .expand import ExpandedModel, expand_fp8
    from .mixed import Loss, Plan, plan, sensitivity
    from .model import QuantizedModel, quantize_model
    from .passes import QuantizedWeight
    from .products import Left
    from .recipes import RECIPES, Grid, Recipe
    from .weights import ROUNDINGS, InputStatistics, round_weight

__all__ = [
    "RECIPES",
    "ROUNDINGS",
    "Errors",
    "ExpandedModel",
    "Grid",
    "InputStatistics",
    "Left",
    "Loss",
    "Plan",
    "Quantized",
    "QuantizedModel",
    "QuantizedWeight",
    "Recipe",
    "Scheme",
    "decode_e4m3",
    "decode_e5m2",
    "dequantize",
    "encode_e4m3",
    "encode_e5m2",
    "errors",
    "expand_fp8",
    "kl_divergence",
    "pack_bits",
    "plan",
    "quantize",
    "quantize_model",
    "refine",
    "round_weight",
    "sensitivity",
    "top1_agreement",
    "unpack_bits",
]

_HOMES = {
    "RECIPES": "recipes",
    "ROUNDINGS": "weights",
    "ExpandedModel": "expand",
    "InputStatistics": "weights",
    "Grid": "recipes",
    "Left": "products",
    "Loss": "mixed",
    "Plan": "mixed",
    "QuantizedModel": "model",
    "QuantizedWeight": "passes",
    "Recipe": "recipes",
    "expand_fp8": "expand",
    "plan": "mixed",
    "quantize_model": "model",
    "round_weight": "weights",
    "sensitivity": "mixed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
