"""The cache folder: where it is, and how files get into it whole or not at all.

A folder is built under a temporary name beside its final place and renamed when complete, by whoever
holds the lock. Its `manifest.json` lists size and SHA-256 of every file; a folder that does not match
its manifest is rebuilt, never trusted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from seawall.inference.errors import ModelCacheError

try:
    import fcntl
except ImportError:  # pragma: no cover - no flock on Windows: concurrent builders repeat each other's work
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
_TEMPORARY = ".partial-"
_MANIFEST_LIMIT = 1 << 20


def cache_folder(override: str | os.PathLike[str] | None = None) -> Path:
    """The folder for model files: `override`, else `$SEAWALL_CACHE`, else the user's XDG cache folder."""
    xdg = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = override or os.environ.get("SEAWALL_CACHE") or Path(xdg) / "seawall"
    try:
        return Path(named).expanduser()
    except RuntimeError as error:  # a container's user without a home folder
        raise ModelCacheError(named, OSError(errno.ENOENT, "this user has no home folder")) from error


@contextlib.contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a ModelCacheError about `path`."""
    try:
        yield
    except ModelCacheError:
        raise
    except OSError as error:
        raise ModelCacheError(path, error) from error


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of one target among all processes and threads of the machine.

    The kernel releases it when the holder dies, so there is no stale lock to clean up.
    """
    with cache_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = (target.parent / f".{target.name}.lock").open("ab")
    with handle:
        if fcntl is not None:
            with cache_errors(target.parent):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def publishing(target: Path, needed_bytes: int) -> Iterator[Path]:
    """Give an empty folder to fill; it takes the place of `target` when the block ends without an error.

    Call it with the target locked. What a killed builder left behind is removed first, and whatever goes
    wrong, the half-filled folder is removed again.
    """
    with cache_errors(target.parent):
        remove_leftovers(target)
        check_space(target.parent, needed_bytes)
        folder = _temporary_folder(target)
    try:
        with cache_errors(target.parent):
            yield folder
            _replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary_folder(target: Path) -> Path:
    """Unlike tempfile's, it gets the user's umask: an image built as root is run as somebody else."""
    folder = target.parent / f"{_TEMPORARY}{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def remove_leftovers(target: Path) -> None:
    """Remove what builders of `target` that were killed left behind; call it with the target locked."""
    for leftover in target.parent.glob(f"{_TEMPORARY}{target.name}-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _replace(folder: Path, target: Path) -> None:
    if os.path.lexists(target):
        # A folder cannot be renamed over another, so the old one steps aside for a moment. A reader that
        # looks in this gap finds nothing, waits for the lock, and then finds the new one.
        aside = _temporary_folder(target)
        try:
            target.rename(aside / "old")
            folder.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        folder.rename(target)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise `ENOSPC` before the work instead of after half of it."""
    if shutil.disk_usage(folder).free < needed_bytes:
        raise OSError(errno.ENOSPC, f"No space left on device ({needed_bytes >> 20} MiB needed)")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Describe every file of a finished folder, beside `facts`; the facts themselves are digested too."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    content = {"facts": facts, "files": files}
    sealed = {**content, "seal": seal(content)}
    (folder / MANIFEST).write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def seal(content: dict[str, Any]) -> str:
    """A digest of plain data; it finds damage and edits by hand."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_verified(folder: Path) -> dict[str, Any] | None:
    """The facts of a folder whose every file matches its manifest; None for anything else.

    About 0.1 s for 180 MB. It finds damage, not malice: whoever may write to the cache may write a
    matching manifest as well.
    """
    try:
        with (folder / MANIFEST).open("rb") as file:
            manifest = json.loads(file.read(_MANIFEST_LIMIT))
        content = {"facts": manifest["facts"], "files": manifest["files"]}
        if manifest["seal"] != seal(content) or not isinstance(manifest["facts"], dict):
            return None
        for name, expected in manifest["files"].items():
            path = folder / Path(name).name
            if path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
                return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    facts: dict[str, Any] = manifest["facts"]
    return facts


def rewrite_facts(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any] | None:
    """Put `change(facts)` in the place of a verified folder's facts, sealed anew; None where it does not verify.

    The files stay as they are. Readers find the old manifest or the new one, never half of one.
    """
    if (facts := read_verified(folder)) is None:
        return None
    facts = change(facts)
    with cache_errors(folder):
        with (folder / MANIFEST).open("rb") as file:
            content = {"facts": facts, "files": json.loads(file.read(_MANIFEST_LIMIT))["files"]}
        sealed = json.dumps({**content, "seal": seal(content)}, indent=1)
        if len(sealed.encode()) > _MANIFEST_LIMIT:
            raise OSError(errno.EFBIG, "its manifest would be larger than 1 MiB")
        temporary = folder / f"{_TEMPORARY}{MANIFEST}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            temporary.write_text(sealed, encoding="utf-8")
            temporary.replace(folder / MANIFEST)
        finally:
            temporary.unlink(missing_ok=True)
    return facts


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a folder's manifest, unverified; empty where there is none, or none that can be read."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            facts = json.loads(file.read(_MANIFEST_LIMIT))["facts"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
