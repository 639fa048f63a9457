"""`seawall quantize`, `report` and `verify`: a smaller model, the proof that it is still the same, and its check."""

from __future__ import annotations

import argparse
import contextlib
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seawall.cli.progress import Progress
from seawall.inference.errors import InvalidSettingError

if TYPE_CHECKING:
    from seawall.inference import Backend, Decoder
    from seawall.inference.quality import Gate, QualityReport

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    Model = Decoder | Backend

_MODEL = "a folder, an .onnx or .gguf file, or NAME or NAME:PRECISION of a known model"
_CONTEXT = 2048  # tokens
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def add_parsers(commands: Commands) -> None:
    """Add the three commands."""
    quantize = commands.add_parser("quantize", help="make a model smaller, measure it, and record its scores")
    quantize.add_argument("model", help=f"what to quantize: {_MODEL}, in float")
    quantize.add_argument("target", type=Path, help="a folder that does not exist yet")
    quantize.add_argument("--recipe", required=True, help="a name that `quantize_model` knows, or mixed")
    quantize.add_argument("--calibration", nargs="+", type=Path, metavar="FILE", help="texts, or .npz files of inputs")
    quantize.add_argument("--budget", type=size, metavar="SIZE", help="with mixed: most bytes of weights, as in 85MB")
    quantize.add_argument("--no-report", action="store_true", help="do not measure what became of it")
    _add_data(quantize)
    quantize.set_defaults(run=_quantize)

    report = commands.add_parser("report", help="measure a model beside its reference")
    report.add_argument("candidate", help=f"what is measured: {_MODEL}")
    report.add_argument("--reference", required=True, metavar="MODEL", help="what is right: as the candidate, in float")
    report.add_argument("--quick", action="store_true", help="answers alone: no weights, speed, load time and memory")
    report.add_argument("--json", type=Path, metavar="FILE", help="write the report here as well")
    report.add_argument("--record", action="store_true", help="write scores and gate into the candidate's manifest")
    _add_data(report)
    report.set_defaults(run=_report)

    verify = commands.add_parser("verify", help="check a folder's digests, seal, recorded scores and versions")
    verify.add_argument("folder", type=Path)
    verify.add_argument("--strict", action="store_true", help="fail where nothing was recorded, or with other versions")
    verify.set_defaults(run=_verify)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="what language models read (default: a text of ours)")
    parser.add_argument(
        "--inputs", nargs="+", type=Path, metavar="FILE", help=".npz files: for other models, a batch each"
    )
    parser.add_argument("--logits", nargs="+", default=(), metavar="OUTPUT", help="outputs that hold logits")
    parser.add_argument(
        "--gate", type=_gate, metavar="BOUNDS", help="as in kl=0.005,top1=0.95; or none (default: the recipe's)"
    )


def _quantize(options: argparse.Namespace) -> int:
    from seawall.inference.quantize import quantize_model

    calibration = [_calibration(path) for path in options.calibration or ()]
    with Progress() as progress:
        source = _folder_of(options.model, "fp32", progress)
        made = quantize_model(
            source,
            options.target,
            recipe=options.recipe,
            calibration=calibration or None,
            budget=options.budget,
            progress=progress,
        )
        sys.stdout.write(f"{made.folder}: {len(made.weights)} weights, {made.bytes / 1e6:.1f} MB\n")
        if options.no_report or not (_is_decoder(made.folder) or options.inputs):
            return 0
        with _opened(source) as reference, _opened(made.folder) as candidate:
            report = _measured(reference, candidate, options, progress, full=False)
    sys.stdout.write(f"\n{report}\n\n")
    return _record(made.folder, report, _gate_of(options, report))


def _report(options: argparse.Namespace) -> int:
    with Progress() as progress:
        paths = _folder_of(options.reference, "fp32", progress), _folder_of(options.candidate, None, progress)
        with _opened(paths[0]) as reference, _opened(paths[1]) as candidate:
            report = _measured(reference, candidate, options, progress, full=not options.quick)
    if options.json:
        options.json.write_text(report.to_json() + "\n", encoding="utf-8")
    sys.stdout.write(f"{report}\n\n")
    gate = _gate_of(options, report)
    if options.record:
        return _record(paths[1], report, gate)
    failures = gate.failures(report.scores) if gate else []
    for failure in failures:
        sys.stdout.write(f"gate: {_told(failure)}\n")
    if gate and not failures:
        sys.stdout.write(f"gate: passes {_shown(gate)}\n")
    return 1 if failures and options.gate is not None else 0


def _verify(options: argparse.Namespace) -> int:
    from seawall.inference.quality import verify

    found = verify(options.folder)
    for line in (*(f"note: {note}" for note in found.notes), *(f"FAILED: {problem}" for problem in found.problems)):
        sys.stdout.write(f"{line}\n")
    doubtful = [note for note in found.notes if note.startswith(("no quality", "measured with"))]
    failed = bool(found.problems) or (options.strict and bool(doubtful))
    sys.stdout.write(f"{options.folder}: {'FAILED' if failed else 'verified'}\n")
    return int(failed)


def _record(folder: Path, report: QualityReport, gate: Gate | None) -> int:
    from seawall.inference.quality import record

    failures = record(folder, report, gate)
    for failure in failures:
        sys.stdout.write(f"gate: {_told(failure)}\n")
    if failures:
        sys.stderr.write(f"seawall: {folder} fails its gate, which is recorded: it does not load unless asked to\n")
        return 1
    sys.stdout.write(f"recorded in {folder}: passes {_shown(gate) if gate else 'no gate, none was asked'}\n")
    return 0


def _measured(
    reference: Model, candidate: Model, options: argparse.Namespace, progress: Progress, *, full: bool
) -> QualityReport:
    from seawall.inference import Backend, Decoder
    from seawall.inference.quality import evaluation_text, quality_report

    costs = {"weights": full, "speed": full, "memory": full}
    if isinstance(reference, Decoder) and isinstance(candidate, Decoder):
        text = _text(options.text) if options.text else evaluation_text()
        return quality_report(reference, candidate, text, progress=progress, **costs)
    if not (isinstance(reference, Backend) and isinstance(candidate, Backend)):
        raise InvalidSettingError("reference and candidate must both be language models, or both other models")
    if not options.inputs:
        raise InvalidSettingError(
            "these are no language models: give --inputs, .npz files with an array for each input"
        )
    inputs = [_arrays(path) for path in options.inputs]
    return quality_report(reference, candidate, inputs, logits=options.logits, progress=progress, **costs)


def _folder_of(model: str, precision: str | None, progress: Progress) -> Path:
    """The folder, or the .onnx file, that the command line means."""
    from seawall.inference import models

    name, _, given = model.partition(":")
    if name in models.CATALOGUE:
        kind = models.CATALOGUE[name].kind
        wanted = given or (precision if kind == "gguf" else None)
        return models.prepare(name, precision=wanted, progress=progress).folder
    path = Path(model).expanduser()
    if path.is_dir() or path.suffix == ".onnx":
        return path
    return models.prepare(model, precision=precision, progress=progress).folder


def _is_decoder(path: Path) -> bool:
    from seawall.inference.models.cache import read_facts

    return path.is_dir() and "end_tokens" in read_facts(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Model]:
    """The model, although its gate may have failed: who measures has to see the bad ones too."""
    from seawall.inference import Backend, Decoder
    from seawall.inference.models.cache import read_facts

    if _is_decoder(path):
        context = min(_CONTEXT, read_facts(path).get("config", {}).get("context", _CONTEXT))
        with Decoder.load(path, context=context, check_quality=False) as decoder:
            yield decoder
    else:
        with Backend.load(path, check_quality=False) as backend:
            yield backend


def _gate_of(options: argparse.Namespace, report: QualityReport) -> Gate | None:
    from seawall.inference.quality import gate_for

    if options.gate is not None:
        gate: Gate = options.gate
        return gate
    return gate_for(report.candidate.precision, text=report.text is not None)


def _calibration(path: Path) -> Any:
    return _arrays(path) if path.suffix == ".npz" else _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidSettingError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error


def _arrays(path: Path) -> Mapping[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidSettingError(f"{path} is no .npz file of arrays: {error}") from error


def size(text: str) -> int:
    """85MB, 85m or 85000000."""
    number = text.lower().removesuffix("b")
    unit = number[-1:] if number[-1:] in "kmg" else ""
    value = float(number.removesuffix(unit)) * _UNITS[unit]
    if not 0 < value < 1e15:
        raise ValueError(text)
    return int(value)


def _gate(text: str) -> Gate:
    from seawall.inference.quality import Gate

    if text == "none":
        return Gate()
    try:
        return Gate(**{name: float(value) for name, _, value in (part.partition("=") for part in text.split(","))})
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"bounds look like kl=0.005,top1=0.95, got {text!r}") from error


def _told(failure: Any) -> str:
    measured = "was not measured" if failure.measured is None else f"is {failure.measured:.4g}"
    return f"{failure.measure} {measured}, and must be {failure.how} {failure.limit:g}"


def _shown(gate: Gate) -> str:
    return ", ".join(f"{name} {limit:g}" for name, limit in gate.limits.items()) or "an open gate"
