"""How alike two models of any kind answer: output by output, over inputs that come one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from seawall.inference.errors import (
    IncomparableModelsError,
    InvalidSettingError,
    NoQualityDataError,
    NotFiniteError,
)
from seawall.inference.quantize.measures import Errors, ErrorSums, checked_logits, divergence, log_probabilities
from seawall.inference.runtime.backend import Backend

Array = np.ndarray[Any, Any]
Progress = Callable[[str, float], None]
Inputs = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class OutputScores:
    """How alike two models are in one output.

    Attributes:
        name: the output.
        values: how many numbers were compared.
        errors: mean squared, mean absolute and largest difference, and signal to noise.
        cosine: mean cosine between the vectors on the last axis.
        worst_cosine: the smallest.
        kl: mean KL divergence in nats, where the output was said to hold logits; else None, as the next two.
        kl_max: its largest value.
        top1: fraction of equal first choices.
    """

    name: str
    values: int
    errors: Errors
    cosine: float
    worst_cosine: float
    kl: float | None = None
    kl_max: float | None = None
    top1: float | None = None


def compare_outputs(
    reference: Backend,
    candidate: Backend,
    data: Iterable[Inputs],
    *,
    logits: Collection[str] = (),
) -> tuple[OutputScores, ...]:
    """Run two models on the same inputs, and compare each of their outputs.

    Only sums stay in memory. Outputs named in `logits` are compared as predictions as well: nothing but the one who
    knows the model can tell that numbers are logits.

    Raises:
        IncomparableModelsError: other outputs, other shapes, or outputs that are no numbers.
        NoQualityDataError: no inputs.
        NotFiniteError: NaN or infinity in an output; `tensor` says which.
        ModelError: what `Backend.run_sync` raises.
    """
    names = [port.name for port in reference.outputs]
    if names != (others := [port.name for port in candidate.outputs]):
        raise IncomparableModelsError(
            f"the reference gives {', '.join(names)} and the candidate {', '.join(others)}: compare models of the "
            "same outputs, in the same order"
        )
    if isinstance(logits, str):
        raise InvalidSettingError(f"logits must be a list of names of outputs, got a single str: [{logits!r}]")
    if unknown := set(logits) - set(names):
        raise InvalidSettingError(f"logits names {', '.join(sorted(unknown))}, but the outputs are {', '.join(names)}")
    sums = {name: _OutputSums(name, logits=name in logits) for name in names}
    answered = False
    for inputs in data:
        first, second = reference.run_sync(inputs), candidate.run_sync(inputs)
        for name, output in sums.items():
            output.add(first[name], second[name])
        answered = True
    if not answered:
        raise NoQualityDataError("no inputs were given: there is nothing to compare the models on")
    return tuple(output.scores() for output in sums.values())


class _OutputSums:
    """Sums over one output."""

    def __init__(self, name: str, *, logits: bool) -> None:
        self._name = name
        self._logits = logits
        self._errors = ErrorSums()
        self._vectors = self._same = 0
        self._cosines = self._nats = self._most_nats = 0.0
        self._worst = 1.0

    def add(self, first: Array, second: Array) -> None:
        """Count one run of both."""
        if first.dtype.kind not in "fiub" or second.dtype.kind not in "fiub":
            raise IncomparableModelsError(f"output {self._name!r} holds {first.dtype}, which is no number to compare")
        if first.shape != second.shape:
            raise IncomparableModelsError(
                f"output {self._name!r} is {list(first.shape)} in the reference, {list(second.shape)} in the candidate"
            )
        try:
            self._errors.add(first, second)
        except NotFiniteError as error:
            which = "candidate's" if np.isfinite(first.astype(np.float64)).all() else "reference's"
            raise NotFiniteError(error.count, error.index, f"the {which} {self._name}") from None
        rows = [_rows(array) for array in (first, second)]
        cosines = _cosines(*rows)
        self._vectors += len(cosines)
        if len(cosines):
            self._cosines += float(cosines.sum())
            self._worst = min(self._worst, float(cosines.min()))
        if self._logits and len(cosines):
            p, q = (log_probabilities(logits) for logits in checked_logits(*rows))
            nats = divergence(p, q)
            self._nats += float(nats.sum())
            self._most_nats = max(self._most_nats, float(nats.max()))
            self._same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())

    def scores(self) -> OutputScores:
        """The whole."""
        vectors = max(self._vectors, 1)
        return OutputScores(
            self._name,
            self._errors.count,
            self._errors.errors(),
            self._cosines / vectors if self._vectors else 1.0,
            self._worst,
            *((self._nats / vectors, self._most_nats, self._same / vectors) if self._logits else ()),
        )


def _rows(array: Array) -> Array:
    """[vectors, size] in float64."""
    values = array.astype(np.float64)
    return values.reshape(-1, values.shape[-1]) if values.ndim and values.size else values.reshape(-1, 1)


def _cosines(first: Array, second: Array) -> Array:
    """Cosines of pairs of vectors; 1 where both are zero, 0 where one is."""
    norms = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    product = norms[0] * norms[1]
    cosines = np.where(product > 0, (first * second).sum(axis=1) / np.where(product > 0, product, 1), 0.0)
    cosines[(norms[0] == 0) & (norms[1] == 0)] = 1.0
    clipped: Array = np.clip(cosines, -1.0, 1.0)
    return clipped
