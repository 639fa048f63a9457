"""What a quantized model must reach to serve, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

from seawall.inference.errors import InvalidSettingError, QualityGateError

_RANGES = {  # of what can be measured: a bound outside is always kept, or never
    "kl": (0, math.inf),
    "kl_p99": (0, math.inf),
    "top1": (0, 1),
    "perplexity_ratio": (0, math.inf),
    "cosine": (-1, 1),
    "sqnr_db": (-math.inf, math.inf),
}
_AT_MOST = frozenset({"kl", "kl_p99", "perplexity_ratio"})
_CURE = "Choose a recipe that keeps more, or measure it against a gate of your own that asks for less"


class Failure(NamedTuple):
    """A measure out of its bounds.

    Attributes:
        measure: its name, as in `Gate`.
        measured: its value, or None where it was not measured.
        how: "at most" or "at least".
        limit: the bound.
    """

    measure: str
    measured: float | None
    how: str
    limit: float


class Scored(Protocol):
    """A report, as far as a gate is concerned."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def scores(self) -> Mapping[str, float]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Bounds on how far a model may be from its reference; None asks nothing.

    What a gate asks for and nobody measured is a failure, and so is NaN.

    ```python
    from seawall.inference.quality import Gate

    gate = Gate(kl=0.005, top1=0.95)
    print(gate.failures({"kl": 0.0075, "top1": 0.944}))
    #> [Failure(measure='kl', measured=0.0075, how='at most', limit=0.005), Failure(measure='top1', measured=0.944, how='at least', limit=0.95)]
    ```

    Attributes:
        kl: most nats of mean KL divergence.
        kl_p99: most nats at the 99th percentile of tokens.
        top1: smallest fraction of equal first choices.
        perplexity_ratio: most of the candidate's perplexity over the reference's.
        cosine: smallest mean cosine between the vectors of an output.
        sqnr_db: smallest signal-to-noise ratio of an output, in decibels.
    """  # noqa: E501 - a line that is printed

    kl: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    perplexity_ratio: float | None = None
    cosine: float | None = None
    sqnr_db: float | None = None

    def __post_init__(self) -> None:
        limits: dict[str, object] = dict(self.limits)
        for name, limit in limits.items():
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not math.isfinite(limit):
                raise InvalidSettingError(f"{name} must be a finite number or None, got {limit!r}")
            lowest, highest = _RANGES[name]
            if not lowest <= limit <= highest:
                hint = f"; for {limit:g} % write {limit / 100:g}" if name == "top1" and 1 < limit <= 100 else ""
                raise InvalidSettingError(f"{name} must be from {lowest:g} to {highest:g}, got {limit!r}{hint}")

    @property
    def limits(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: limit for name, limit in found.items() if limit is not None}

    def failures(self, scores: Mapping[str, float]) -> list[Failure]:
        """The measures that are out of bounds."""
        found = []
        for name, limit in self.limits.items():
            measured = scores.get(name)
            low = name not in _AT_MOST
            passes = measured is not None and (measured >= limit if low else measured <= limit)
            if not passes:
                found.append(Failure(name, measured, "at least" if low else "at most", limit))
        return found

    def check(self, report: Scored) -> None:
        """Raise QualityGateError where a report is out of bounds."""
        self.check_scores(report.name, report.scores)

    def check_scores(self, name: str, scores: Mapping[str, float], cure: str = _CURE) -> None:
        """`check` for scores that come without their report."""
        if failures := self.failures(scores):
            raise QualityGateError(name, failures, cure)


GATES: Mapping[str, Gate] = {
    "int8": Gate(kl=0.005, top1=0.95),
    "int4-lossless": Gate(kl=0.005, top1=0.95),
    "int4": Gate(kl=0.08, top1=0.82),
    "mixed": Gate(kl=0.08, top1=0.82),
    "fp8-e4m3": Gate(kl=0.06, top1=0.82),
    "fp8-e5m2": Gate(kl=0.20, top1=0.72),
}
"""Bounds for language models on `evaluation_text`, by kind of recipe.

A top-1 of 0.95 is where the arithmetic ends: kernels that round their inputs to 8 bits agree with *themselves* in 0.955
of first choices, read token by token and in pieces (measured: 0.954 to 0.957). The KL bound is below what "int8"
with blocks of 64 reaches (0.0076): int8-block32 keeps it. "int4" and "mixed" are a third above what the best of 4
bits loses (KL 0.060 and top-1 0.851 for int4-awq-gptq), and the 8-bit floats a little above what theirs lose.
"""

OUTPUT_GATES: Mapping[str, Gate] = {
    "int8": Gate(cosine=0.995),
    "int4": Gate(cosine=0.98),
    "fp8-e4m3": Gate(cosine=0.995),
    "fp8-e5m2": Gate(cosine=0.99),
}
"""Bounds for any other model, by kind of recipe."""


def gate_for(recipe: str, *, text: bool = True) -> Gate | None:
    """The gate of a recipe or precision by its name; of its outputs where it is no language model.

    None for "fp32", which has nothing to prove, and for 2 bits, where whoever asks for them sets the bounds.
    """
    gates = GATES if text else OUTPUT_GATES
    if recipe == "int4" and text:
        return gates["int4-lossless"]  # the blocks of a GGUF file, taken over
    kinds = sorted(gates, key=len, reverse=True)
    return next((gates[kind] for kind in kinds if recipe == kind or recipe.startswith(f"{kind}-")), None)
