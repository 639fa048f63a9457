"""Everything that can be said about whether two models are the same, as one record and one table."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from seawall.inference.errors import InvalidSettingError, NoQualityDataError, QualityError
from seawall.inference.generate.decoder import Decoder
from seawall.inference.models.cache import MANIFEST
from seawall.inference.quantize.measures import Errors
from seawall.inference.quantize.source import Source
from seawall.inference.runtime.backend import Backend

from .costs import Costs, file_bytes, fresh_costs, paces, run_times
from .manifest import folder_digest, versions
from .outputs import Inputs, OutputScores, Progress, compare_outputs
from .text import WINDOW, Texts, TextScores, compare_texts, encoded
from .weights import WeightScores, compare_weights

_WORST = 5  # weights that a table shows


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Which model it was.

    Attributes:
        name: its name.
        precision: how its weights are stored, or "" where nothing says.
        digest: SHA-256 over its files, "" for a model that was loaded from memory.
    """

    name: str
    precision: str
    digest: str


@dataclass(frozen=True, slots=True)
class QualityReport:
    """How a candidate compares with its reference; `str()` of it is a table.

    Attributes:
        reference: the model that says what is right.
        candidate: the model that is measured.
        data_digest: SHA-256 of what they were compared on.
        compared: tokens, or batches of inputs, that they were compared on.
        text: how alike they predict, for language models.
        outputs: how alike they answer, for any other.
        weights: what each weight lost, where that was asked for.
        reference_costs: what the reference costs.
        costs: what the candidate costs.
        versions: of the packages that the numbers depend on.
    """

    reference: ModelFacts
    candidate: ModelFacts
    data_digest: str
    compared: int
    text: TextScores | None = None
    outputs: tuple[OutputScores, ...] = ()
    weights: tuple[WeightScores, ...] = ()
    reference_costs: Costs = field(default_factory=Costs)
    costs: Costs = field(default_factory=Costs)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The candidate's name and precision."""
        return f"{self.candidate.name} {self.candidate.precision}".strip()

    @property
    def scores(self) -> dict[str, float]:
        """What a `Gate` looks at. Of several outputs the worst counts."""
        if self.text is not None:
            text = self.text
            return {"kl": text.kl, "kl_p99": text.kl_p99, "top1": text.top1, "perplexity_ratio": text.perplexity_ratio}
        scores = {
            "cosine": min((output.cosine for output in self.outputs), default=math.nan),
            "sqnr_db": min((output.errors.sqnr_db for output in self.outputs), default=math.nan),
        }
        logits = [output for output in self.outputs if output.kl is not None and output.top1 is not None]
        if logits:
            scores["kl"] = max(output.kl for output in logits if output.kl is not None)
            scores["top1"] = min(output.top1 for output in logits if output.top1 is not None)
        return scores

    def to_json(self) -> str:
        """Everything, as JSON; infinity as the string "inf"."""
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> QualityReport:
        """The report that `to_json` wrote; QualityError for anything else."""
        try:
            found = json.loads(text)
            scores = found["text"]
            return cls(
                reference=ModelFacts(**found["reference"]),
                candidate=ModelFacts(**found["candidate"]),
                data_digest=str(found["data_digest"]),
                compared=int(found["compared"]),
                text=None if scores is None else TextScores(**_floats(scores)),
                outputs=tuple(OutputScores(**_with_errors(each)) for each in found["outputs"]),
                weights=tuple(
                    WeightScores(**{**_with_errors(each), "shape": tuple(each["shape"])}) for each in found["weights"]
                ),
                reference_costs=Costs(**found["reference_costs"]),
                costs=Costs(**found["costs"]),
                versions=dict(found["versions"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise QualityError(f"this is no quality report: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        rows = [("", self.reference.precision or "reference", self.candidate.precision or "candidate")]
        rows += [("model", self.reference.name, self.candidate.name)]
        rows += list(_text_rows(self.text)) + list(_output_rows(self.outputs)) + list(_weight_rows(self.weights))
        rows += list(_cost_rows(self.reference_costs, self.costs))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            f"{label:<{widths[0]}}  {first:>{widths[1]}}  {second:>{widths[2]}}".rstrip()
            for label, first, second in rows
        )


@overload
def quality_report(
    reference: Decoder,
    candidate: Decoder,
    data: Texts,
    *,
    weights: bool = ...,
    speed: bool = ...,
    memory: bool = ...,
    window: int = ...,
    progress: Progress | None = ...,
) -> QualityReport: ...
@overload
def quality_report(
    reference: Backend,
    candidate: Backend,
    data: Iterable[Inputs],
    *,
    weights: bool = ...,
    speed: bool = ...,
    memory: bool = ...,
    logits: Collection[str] = ...,
    progress: Progress | None = ...,
) -> QualityReport: ...
def quality_report(
    reference: Decoder | Backend,
    candidate: Decoder | Backend,
    data: Any,
    *,
    weights: bool = False,
    speed: bool = False,
    memory: bool = False,
    window: int = WINDOW,
    logits: Collection[str] = (),
    progress: Progress | None = None,
) -> QualityReport:
    """Measure a candidate beside its reference.

    Two decoders are compared by what they predict on texts (`compare_texts`), two backends by what they answer to
    inputs (`compare_outputs`). Memory stays bounded, however much data there is: no logits or outputs are kept.

    Args:
        reference: the model that says what is right, usually in float.
        candidate: the model that is measured.
        data: texts or lists of tokens for decoders; inputs by name, one mapping a batch, for backends.
        weights: read both models' files too, and compare every weight. Takes seconds.
        speed: time both, taking turns. Takes seconds, and means little on a busy machine.
        memory: load both once more, each in a fresh process, for load time and memory.
        window: for decoders, most tokens that are read in one go.
        logits: for backends, outputs that hold logits.
        progress: called with what is being done and how much of it, 0 to 1.

    Raises:
        IncomparableModelsError: they have different vocabularies, tokens or outputs, or are of different kinds.
        NoQualityDataError: there is nothing to compare them on.
        NotFiniteError: NaN among what a model answers; `tensor` says where.
        ModelError: what running a model raises.
    """
    if isinstance(reference, Decoder) and isinstance(candidate, Decoder):
        if logits:
            raise InvalidSettingError("logits goes with backends: what a decoder gives are logits")
        texts = [data] if isinstance(data, str) else list(data)
        text = compare_texts(reference, candidate, texts, window=window, progress=progress)
        parts: dict[str, Any] = {"text": text, "compared": text.tokens, "data_digest": _texts_digest(texts)}
        timed = _decoder_costs(reference, candidate, texts) if speed else ({}, {})
    elif isinstance(reference, Backend) and isinstance(candidate, Backend):
        digest = _Digest()
        outputs = compare_outputs(reference, candidate, digest.passing(data, progress), logits=logits)
        parts = {"outputs": outputs, "compared": digest.batches, "data_digest": digest.hexdigest()}
        timed = _backend_costs(reference, candidate, digest.last) if speed else ({}, {})
    else:
        raise InvalidSettingError(
            "reference and candidate must be two Decoders or two Backends, got "
            f"{type(reference).__name__} and {type(candidate).__name__}"
        )
    paths = _path(reference), _path(candidate)
    costs = [
        Costs(**measured, **_file_costs(path, text=isinstance(reference, Decoder), memory=memory))
        for path, measured in zip(paths, timed, strict=True)
    ]
    if weights:
        if paths[0] is None or paths[1] is None:
            raise InvalidSettingError("weights are read from files, and a model that was loaded from bytes has none")
        parts["weights"] = compare_weights(paths[0], paths[1], progress=progress)
    return QualityReport(
        _facts(reference, paths[0]), _facts(candidate, paths[1]),
        reference_costs=costs[0], costs=costs[1], versions=versions(), **parts,
    )  # fmt: skip


class _Digest:
    """Hashes inputs as they pass."""

    def __init__(self) -> None:
        self.batches = 0
        self.last: Inputs = {}
        self._hash = hashlib.sha256()

    def passing(self, data: Iterable[Inputs], progress: Progress | None) -> Iterator[Inputs]:
        for inputs in data:
            if not isinstance(inputs, Mapping):
                raise InvalidSettingError(
                    f"data must be a list of inputs by name, one mapping a batch, got {type(inputs).__name__} in it"
                )
            for name in sorted(inputs):
                array = np.asarray(inputs[name])
                self._hash.update(f"{name} {array.dtype} {array.shape}".encode())
                self._hash.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
            self.batches += 1
            self.last = inputs
            yield inputs
            if progress is not None and isinstance(data, Sized):
                progress("comparing", self.batches / len(data))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _texts_digest(texts: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text if isinstance(text, str) else [int(token) for token in text]).encode() + b"\n")
    return digest.hexdigest()


def _path(model: Decoder | Backend) -> Path | None:
    """Where it was loaded from: a folder, an .onnx file, or None for bytes."""
    if isinstance(model, Decoder):
        return model.folder
    file = model.path
    if file is None:
        return None
    return file.parent if (file.parent / MANIFEST).is_file() else file


def _facts(model: Decoder | Backend, path: Path | None) -> ModelFacts:
    if path is None:
        return ModelFacts(model.name, "", "")
    if not path.is_dir():
        return ModelFacts(model.name, "", Source(path).digest())
    if isinstance(model, Decoder):
        return ModelFacts(model.name, model.precision, folder_digest(path))
    facts = Source(path).facts
    return ModelFacts(str(facts.get("model", model.name)), str(facts.get("precision", "")), folder_digest(path))


def _file_costs(path: Path | None, *, text: bool, memory: bool) -> dict[str, Any]:
    if path is None:
        return {}
    costs: dict[str, Any] = {"file_bytes": file_bytes(path)}
    if memory:
        costs["load_s"], costs["rss_bytes"] = fresh_costs(path, text=text)
    return costs


def _decoder_costs(reference: Decoder, candidate: Decoder, texts: Sequence[Any]) -> list[dict[str, Any]]:
    pieces = (encoded(reference, text) if isinstance(text, str) else list(text) for text in texts)
    tokens = list(itertools.islice(itertools.chain.from_iterable(pieces), reference.context))
    return [{"decode_tok_s": decode, "prefill_tok_s": read} for decode, read in paces(reference, candidate, tokens)]


def _backend_costs(reference: Backend, candidate: Backend, inputs: Inputs) -> list[dict[str, Any]]:
    if not inputs:
        raise NoQualityDataError("no inputs were given: there is nothing to time the models on")
    return [{"run_s": seconds} for seconds in run_times(reference, candidate, inputs)]


def _text_rows(text: TextScores | None) -> Iterator[tuple[str, str, str]]:
    if text is not None:
        yield "KL divergence, nats", "0", f"{text.kl:.5f} ± {text.kl_error:.5f}"
        yield "  99th percentile", "0", f"{text.kl_p99:.4f}"
        yield "  largest", "0", f"{text.kl_max:.4f}"
        yield "same first choice", "100 %", f"{text.top1:.2%}".replace("%", " %")
        yield "perplexity", f"{text.reference_perplexity:.3f}", f"{text.perplexity:.3f}"
        yield "  ratio", "1", f"{text.perplexity_ratio:.4f}"
        yield "tokens compared", "", f"{text.tokens:,}"


def _output_rows(outputs: tuple[OutputScores, ...]) -> Iterator[tuple[str, str, str]]:
    for output in outputs:
        yield f"output {output.name}", "", ""
        yield "  mean, worst cosine", "1, 1", f"{output.cosine:.5f}, {output.worst_cosine:.5f}"
        yield from _error_rows(output.errors)
        if output.kl is not None and output.kl_max is not None and output.top1 is not None:
            yield "  KL divergence, largest", "0, 0", f"{output.kl:.5f}, {output.kl_max:.4f}"
            yield "  same first choice", "100 %", f"{output.top1:.2%}".replace("%", " %")


def _error_rows(errors: Errors) -> Iterator[tuple[str, str, str]]:
    yield "  signal to noise", "", f"{errors.sqnr_db:.1f} dB"
    yield "  mean squared error", "0", f"{errors.mse:.3g}"
    yield "  mean absolute error", "0", f"{errors.mae:.3g}"
    yield "  largest error", "0", f"{errors.max_error:.3g}"


def _weight_rows(weights: tuple[WeightScores, ...]) -> Iterator[tuple[str, str, str]]:
    if not weights:
        return
    yield f"weights ({len(weights)})", "", "signal to noise"
    ordered = sorted(weights, key=lambda weight: weight.errors.sqnr_db)
    middle = ordered[len(ordered) // 2].errors.sqnr_db
    yield "  median", "", f"{middle:.1f} dB"
    for weight in ordered[:_WORST]:
        yield f"  {weight.name}", weight.op_type, f"{weight.errors.sqnr_db:.1f} dB"


def _cost_rows(reference: Costs, candidate: Costs) -> Iterator[tuple[str, str, str]]:
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "file_bytes": ("size", lambda value: f"{value / 1e6:,.1f} MB"),
        "load_s": ("load", lambda value: f"{value:.2f} s"),
        "rss_bytes": ("memory", lambda value: f"{value / 1e6:,.0f} MB"),
        "decode_tok_s": ("decoding", lambda value: f"{value:.1f} tokens/s"),
        "prefill_tok_s": ("reading a prompt", lambda value: f"{value:,.0f} tokens/s"),
        "run_s": ("a run", lambda value: f"{value * 1e3:.3g} ms"),
    }
    for name, (label, form) in shown.items():
        values = [getattr(costs, name) for costs in (reference, candidate)]
        if values != [None, None]:
            first, second = ("" if value is None else form(value) for value in values)
            yield label, first, second


def _plain(value: Any) -> Any:
    """Only what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _floats(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Infinity as a number again."""
    known = ("inf", "-inf", "nan")
    return {name: float(value) if value in known and name != "name" else value for name, value in scores.items()}


def _with_errors(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {**_floats({k: v for k, v in scores.items() if k != "errors" and not isinstance(v, list)}),
            "errors": Errors(**_floats(scores["errors"]))}  # fmt: skip
