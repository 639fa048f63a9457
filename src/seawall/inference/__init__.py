"""A language model inside this process: fetched once, converted once, decoded step by step.

    from seawall.inference import Decoder, models

    models.add("smollm2-135m")
    with Decoder.load("smollm2-135m") as decoder:
        for step in decoder.start(decoder.encode_chat("Why is the sea salty?"), max_tokens=64):
            ...

This package knows nothing of policies and of event loops. Importing it is cheap: numpy, ONNX Runtime and
the rest load with the first name that needs them, and MissingExtraError says what to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    from . import models
    from .embed.embedder import Embedder
    from .generate.batch import Batch, Part
    from .generate.choosing import Logprobs, Penalties, TokenLogprob
    from .generate.constraints import Choice, Constraint, Grammar, JsonSchema, Matcher, Regex, Vocabulary
    from .generate.decoder import Decoder
    from .generate.exactness import StepExactness
    from .generate.report import DecoderReport
    from .generate.sampling import Greedy, Sampling
    from .generate.sequence import Sequence, Step
    from .generate.speculation.settings import Speculation
    from .quality import perplexity
    from .runtime.backend import Backend
    from .runtime.batching.batcher import MicroBatcher
    from .runtime.batching.padding import Padding
    from .runtime.calls import Cancellation
    from .runtime.ort import log_runtime
    from .runtime.pool import share_threads
    from .runtime.report import Report

__all__ = [
    "Backend",
    "Batch",
    "Cancellation",
    "Choice",
    "Constraint",
    "Decoder",
    "DecoderReport",
    "Embedder",
    "Grammar",
    "Greedy",
    "JsonSchema",
    "Logprobs",
    "Matcher",
    "MicroBatcher",
    "Padding",
    "Part",
    "Penalties",
    "Regex",
    "Report",
    "Sampling",
    "Sequence",
    "Speculation",
    "Step",
    "StepExactness",
    "TokenLogprob",
    "Vocabulary",
    "errors",
    "log_runtime",
    "models",
    "perplexity",
    "share_threads",
]

_HOMES = {
    "Backend": "runtime.backend",
    "Batch": "generate.batch",
    "Cancellation": "runtime.calls",
    "Choice": "generate.constraints",
    "Constraint": "generate.constraints",
    "Decoder": "generate.decoder",
    "DecoderReport": "generate.report",
    "Embedder": "embed.embedder",
    "Grammar": "generate.constraints",
    "Greedy": "generate.sampling",
    "JsonSchema": "generate.constraints",
    "Logprobs": "generate.choosing",
    "Matcher": "generate.constraints",
    "MicroBatcher": "runtime.batching.batcher",
    "Padding": "runtime.batching.padding",
    "Part": "generate.batch",
    "Penalties": "generate.choosing",
    "Regex": "generate.constraints",
    "Report": "runtime.report",
    "Sampling": "generate.sampling",
    "Sequence": "generate.sequence",
    "Speculation": "generate.speculation.settings",
    "Step": "generate.sequence",
    "StepExactness": "generate.exactness",
    "TokenLogprob": "generate.choosing",
    "Vocabulary": "generate.constraints",
    "log_runtime": "runtime.ort",
    "perplexity": "quality",
    "share_threads": "runtime.pool",
}


def __getattr__(name: str) -> Any:
    if name != "models" and name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name == "models":
            return importlib.import_module(f"{__name__}.models")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name == "numpy":  # the one package that nearly every module begins with
            raise errors.MissingExtraError("numpy") from error
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
