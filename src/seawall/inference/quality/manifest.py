"""Scores in a folder's manifest: written once they are measured, asked at every load.

`facts["quality"]` of a manifest:

    scores      what was measured, by the names of a gate
    gate        the bounds it has to keep
    reference   name, precision and digest of the model that it was compared with
    data        digest of the texts or inputs, and how many tokens or values were compared
    versions    of seawall, onnxruntime and numpy

The manifest is sealed with a digest, which finds edits by hand and damage. It is no signature: whoever may write to
the folder may seal it anew. This module needs the standard library alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seawall.inference.errors import CorruptModelError, InvalidSettingError, QualityGateError
from seawall.inference.models.cache import MANIFEST, read_verified, rewrite_facts, seal, sha256_of

from .gates import Failure, Gate

if TYPE_CHECKING:
    from .report import QualityReport

KEY = "quality"
_PACKAGES = ("seawall", "onnxruntime", "onnxruntime-gpu", "numpy")
_LIMIT = 1 << 20
_CURE = "Quantize it again with a recipe that keeps more, or load it with check_quality=False to serve it all the same"


def check(facts: dict[str, Any], name: str) -> None:
    """Refuse a model whose recorded scores are out of its gate's bounds; nothing recorded refuses nothing.

    Raises:
        QualityGateError: what is out of bounds, and by how much.
        CorruptModelError: what is recorded is no record of quality.
    """
    recorded = recorded_in(facts, name)
    if recorded is not None:
        gate, scores = recorded
        gate.check_scores(name, scores, _CURE)


def check_folder(folder: str | os.PathLike[str], *, quality: bool = True) -> None:
    """`check` for a folder that is loaded as a plain ONNX model, with its seal and the digests of its files.

    A folder without a manifest passes, and so does one with somebody else's. A manifest that cannot be read, a file
    that is not the one that was sealed, and scores that were edited by hand or taken out, the seal too, are a
    CorruptModelError. Takes about 0.1 s for 180 MB. `quality` False leaves the gate out.
    """
    path = Path(folder)
    try:
        with (path / MANIFEST).open("rb") as file:
            manifest = json.loads(file.read(_LIMIT))
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError, RecursionError) as error:  # half written, say: what it forbade is not known any more
        raise CorruptModelError(
            path, f"its {MANIFEST} cannot be read ({error}): make it again, or remove it"
        ) from error
    if not isinstance(manifest, dict) or not {"facts", "files"} <= manifest.keys():
        return  # somebody else's
    facts, files = manifest["facts"], manifest["files"]
    if not isinstance(facts, dict) or manifest.get("seal") != seal({"facts": facts, "files": files}):
        raise CorruptModelError(path, f"its {MANIFEST} was changed after it was sealed: measure the model again")
    if read_verified(path) is None:
        raise CorruptModelError(path, f"{'; '.join(_damage(path))}: make it again")
    if quality:
        check(facts, str(path))


def recorded_in(facts: dict[str, Any], name: str) -> tuple[Gate, dict[str, float]] | None:
    """The gate and the scores of a manifest's facts; None where no quality was recorded."""
    if KEY not in facts:
        return None
    quality = facts[KEY]
    try:
        gate = Gate(**quality["gate"])
        scores = {str(measure): float(value) for measure, value in quality["scores"].items()}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CorruptModelError(name, f"what its manifest records of its quality is unusable ({error})") from error
    return gate, scores


def record(folder: str | os.PathLike[str], report: QualityReport, gate: Gate | None) -> list[Failure]:
    """Write a report's scores and a gate into the manifest of the candidate's folder; gives what is out of bounds.

    The model's own files stay as they are. From now on the folder loads only while it keeps the gate; a gate of None
    records the scores and refuses nothing. Recording again replaces what was recorded.

    Raises:
        InvalidSettingError: the report is about another model than the folder holds.
        CorruptModelError: the folder's files are not those of its manifest.
        ModelCacheError: the folder cannot be written.
    """
    path = Path(folder).expanduser()
    if report.candidate.digest != (found := folder_digest(path)):
        raise InvalidSettingError(
            f"report is about a model of digest {report.candidate.digest[:12]}, and {path} holds {found[:12]}"
        )
    if gate is None:
        gate = Gate()
    elif not isinstance(gate, Gate):
        raise InvalidSettingError(f"gate must be a Gate, or None, got {gate!r}")
    scores = {name: value for name, value in report.scores.items() if math.isfinite(value)}
    quality = {
        "scores": scores,
        "gate": gate.limits,
        "reference": {
            "name": report.reference.name,
            "precision": report.reference.precision,
            "digest": report.reference.digest,
        },
        "data": {"digest": report.data_digest, "compared": report.compared},
        "versions": versions(),
    }
    if rewrite_facts(path, lambda facts: {**facts, KEY: quality}) is None:
        raise CorruptModelError(path, f"its files are not those that its {MANIFEST} lists: make it again")
    return gate.failures(scores)


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        folder: what was looked at.
        problems: why it must not serve, each in a line.
        notes: what is worth knowing, each in a line.
        failures: measures out of the recorded gate's bounds; they are among the problems.
    """

    folder: Path
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing forbids to serve it."""
        return not self.problems


def verify(folder: str | os.PathLike[str]) -> Verification:
    """Look a folder over without loading it: digests of its files, the seal, recorded scores against their gate.

    Versions other than those it was measured with are notes, since the same kernels may still run.
    """
    path = Path(folder).expanduser()
    facts = read_verified(path)
    if facts is None:
        return Verification(path, tuple(_damage(path)), ())
    notes = [f"precision {facts['precision']}"] if isinstance(facts.get("precision"), str) else []
    try:
        recorded = recorded_in(facts, str(path))
    except CorruptModelError as error:
        return Verification(path, (error.why,), tuple(notes))
    if recorded is None:
        return Verification(path, (), (*notes, "no quality was recorded: `seawall report --record` does it"))
    gate, scores = recorded
    failures = gate.failures(scores)
    notes += [f"{name} {value:.4g}" for name, value in scores.items()]
    notes += _other_versions(facts[KEY])
    problems = (str(QualityGateError(str(path), failures, "It does not load")),) if failures else ()
    return Verification(path, problems, tuple(notes), tuple(failures))


def folder_digest(folder: Path) -> str:
    """One digest for all files of a folder but its manifest: which weights these are, whatever is recorded of them."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            files = json.loads(file.read(_LIMIT))["files"]
        return seal({name: files[name]["sha256"] for name in files})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptModelError(folder, f"it has no usable {MANIFEST}") from error


def versions() -> dict[str, str]:
    """Installed versions of what makes the numbers."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _damage(path: Path) -> list[str]:
    """Which files are not what the manifest says."""
    try:
        with (path / MANIFEST).open("rb") as file:
            manifest = json.loads(file.read(_LIMIT))
        files = manifest["files"]
        sealed = manifest.get("seal") == seal({"facts": manifest["facts"], "files": files})
        problems = [] if sealed else [f"{MANIFEST} was changed after it was sealed"]
        for name, expected in files.items():
            file_path = path / Path(name).name
            if not file_path.is_file():
                problems.append(f"{name} is missing")
            elif sha256_of(file_path) != expected["sha256"]:
                problems.append(f"{name} is not the file that was sealed")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [f"it has no usable {MANIFEST}"]
    return problems or [f"{MANIFEST} is not of this library's making"]


def _other_versions(quality: dict[str, Any]) -> list[str]:
    measured, here = quality.get("versions"), versions()
    if not isinstance(measured, dict):
        return []
    return [
        f"measured with {name} {version}, here is {here.get(name, 'none')}: measure again to be sure"
        for name, version in measured.items()
        if name != "seawall" and here.get(name) != version
    ]
