"""Proof that a smaller model is still the same model: measure it beside its reference, gate it, record both.

    from seawall.inference.quality import GATES, quality_report

    report = quality_report(reference, candidate, text)
    GATES["int8"].check(report)

`gates` and `manifest` need the standard library alone, since every load asks them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from seawall.inference.errors import MissingExtraError

from .gates import GATES, OUTPUT_GATES, Failure, Gate, gate_for

if TYPE_CHECKING:
    from .costs import Costs, fresh_costs
    from .manifest import Verification, record, verify
    from .outputs import OutputScores, compare_outputs
    from .report import QualityReport, quality_report
    from .text import TextScores, compare_texts, evaluation_text, perplexity, token_losses
    from .weights import WeightScores, compare_weights

__all__ = [
    "GATES",
    "OUTPUT_GATES",
    "Costs",
    "Failure",
    "Gate",
    "OutputScores",
    "QualityReport",
    "TextScores",
    "Verification",
    "WeightScores",
    "compare_outputs",
    "compare_texts",
    "compare_weights",
    "evaluation_text",
    "fresh_costs",
    "gate_for",
    "perplexity",
    "quality_report",
    "record",
    "token_losses",
    "verify",
]

_HOMES = {
    "Costs": "costs",
    "OutputScores": "outputs",
    "QualityReport": "report",
    "TextScores": "text",
    "Verification": "manifest",
    "WeightScores": "weights",
    "compare_outputs": "outputs",
    "compare_texts": "text",
    "compare_weights": "weights",
    "evaluation_text": "text",
    "fresh_costs": "costs",
    "perplexity": "text",
    "quality_report": "report",
    "record": "manifest",
    "token_losses": "text",
    "verify": "manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name == "numpy":
            raise MissingExtraError("numpy") from error
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
