#!/usr/bin/env python3
"""One door for developers: builds .venv as needed and runs a command in it.

python3 dev.py demo                                  see a model survive faults, in your terminal
python3 dev.py test [pytest arguments]               every test, fences of the docs included
python3 dev.py check                                 ruff, mypy, pyright, import arrows, strict docs
python3 dev.py bench [NAME] [--json FILE] [--peers]  measure; --peers builds the competitors' environment
python3 dev.py docs [serve]                          build the site, or serve it while you write
python3 dev.py gpu-check [--json FILE]               check the backend on a CUDA device, where there is one

Standard library only, Python 3.11 or later, no root. A system Python is left alone (PEP 668): all goes to
.venv, which may be deleted at any time. A command installs only what it needs, and only when pyproject.toml
or constraints.txt changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
MODEL = "smollm2-135m"
TEST_MODELS = ("all-minilm-l6-v2", "magika")
SHARED_PEERS = {"speculation": "decode"}  # they are the same, and compile for minutes
BENCHES_WITHOUT_MODEL = frozenset({"adaptive", "backend", "overhead", "quantize_arrays", "soak_permits", "telemetry"})


class Needs(NamedTuple):
    """What a command installs: extras of the package, dependency groups, requirement files."""

    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


NEEDS: Mapping[str, Needs] = {
    "demo": Needs(extras=("cli", "cpu", "otel", "prometheus")),
    "test": Needs(extras=("all",), groups=("test",)),
    "check": Needs(extras=("all",), groups=("check",)),
    "bench": Needs(extras=("cli", "cpu", "otel", "prometheus", "structured", "web"), groups=("bench",)),
    "docs": Needs(groups=("docs",)),
    "gpu-check": Needs(extras=("cli", "gpu"), files=("benchmarks/peers-requirements/gpu.txt",)),
}


class StepFailedError(Exception):
    """A step failed; the message says what to do."""


class Environment:
    """A virtual environment that remembers, per set of needs, for which settings it was last installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")

    def ensure(self, needs: Needs) -> None:
        """Install `needs` unless that was done for the very same settings; costs milliseconds then."""
        mark = self.folder / ".installed" / digest("needs", *map(repr, needs))
        settings = fingerprint(needs, self.folder)
        if self._is_current(mark, settings):
            return
        with only_one(self.folder.with_name(self.folder.name + ".lock")):
            if self._is_current(mark, settings):  # another process did it while this one waited
                return
            self._create()
            self._install(needs)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(settings)

    def run(self, *arguments: str) -> int:
        """Run this environment's Python with the terminal attached, and give its exit code."""
        command = [str(self.python), *arguments]
        return subprocess.run(command, check=False, cwd=ROOT, env=self._variables()).returncode

    def _is_current(self, mark: Path, settings: str) -> bool:
        return self.python.exists() and mark.exists() and mark.read_text() == settings

    def _create(self) -> None:
        if not self._answers("pass"):
            say(f"creating {shown(self.folder)} with Python {sys.version.split()[0]}")
            step(
                [sys.executable, "-m", "venv", "--clear", "--without-pip", str(self.folder)],
                "the venv module is missing or the disk is full; on Debian: apt install python3-venv",
            )
        if not self._answers("import pip; assert tuple(map(int, pip.__version__.split('.')[:2])) >= (25, 1)"):
            self._install_pip()

    def _install_pip(self) -> None:
        """Get a pip that knows dependency groups, from whichever pip there is."""
        if self._answers("import pip"):
            pip = [str(self.python), "-m", "pip"]
        elif importlib.util.find_spec("pip"):
            pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        elif importlib.util.find_spec("ensurepip"):
            step([str(self.python), "-m", "ensurepip"], "on Debian: apt install python3-pip")
            pip = [str(self.python), "-m", "pip"]
        else:
            raise StepFailedError(
                f"{sys.executable} has neither pip nor ensurepip. On Debian and Ubuntu one of these helps: "
                "apt install python3-pip, or apt install python3-venv. Or start dev.py with another Python."
            )
        step([*pip, "install", "--quiet", "pip>=25.1", "-c", str(ROOT / "constraints.txt")], OFFLINE)

    def _install(self, needs: Needs) -> None:
        wanted = [*needs.extras, *needs.groups, *map(os.path.basename, needs.files)] or ["the package"]
        say(f"installing into {shown(self.folder)}: {', '.join(wanted)}")
        arguments = ["install", "--quiet", "-c", str(ROOT / "constraints.txt")]
        arguments += ["--editable", f"{ROOT}[{','.join(needs.extras)}]" if needs.extras else str(ROOT)]
        for group in needs.groups:
            arguments += ["--group", f"{ROOT / 'pyproject.toml'}:{group}"]
        for file in needs.files:
            arguments += ["-r", str(ROOT / file)]
        step([str(self.python), "-m", "pip", *arguments], OFFLINE, env=self._variables())

    def _answers(self, code: str) -> bool:
        try:
            command = [str(self.python), "-c", code]
            return subprocess.run(command, check=False, capture_output=True).returncode == 0
        except OSError:
            return False

    def _variables(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.bin), os.environ.get("PATH", os.defpath)])
        extra = {"PATH": path, "VIRTUAL_ENV": str(self.folder), "PIP_USER": "0", "NO_MKDOCS_2_WARNING": "1"}
        return {**os.environ, **extra}


OFFLINE = (
    "pip could not install. Offline, or behind a proxy or a private index? Give pip its usual settings "
    "(PIP_INDEX_URL, PIP_PROXY, PIP_CERT or a pip.conf) and run the same command again"
)


def fingerprint(needs: Needs, folder: Path) -> str:
    """Changes when an install would: other settings, other pins, another Python, a moved checkout."""
    files = ["pyproject.toml", "constraints.txt", *needs.files]
    return digest(str(folder), sys.version, *((ROOT / file).read_text() for file in files))


def digest(*texts: str) -> str:
    """A short name for these texts, in this order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Let one process at a time change an environment. The kernel frees the lock of a killed process."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def step(command: Sequence[str], advice: str, env: Mapping[str, str] | None = None) -> None:
    """Run a step that must succeed."""
    if (code := subprocess.run(command, check=False, cwd=ROOT, env=env).returncode) != 0:
        raise StepFailedError(f"exit {code} from: {shlex.join(command)}\n{advice}.")


def shown(path: Path) -> str:
    """The path as a person would type it from the repository."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def say(text: str) -> None:
    """Tell what happens, ahead of the output of what happens."""
    print(f"dev.py: {text}", flush=True)


def ready(command: str) -> Environment:
    """The environment with all that `command` needs."""
    environment = Environment(ROOT / ".venv")
    environment.ensure(NEEDS[command])
    return environment


def add_model(environment: Environment) -> None:
    """Fetch and convert the bundled model; a moment's work when it is there already."""
    if environment.run("-m", "seawall", "models", "add", MODEL) != 0:
        raise StepFailedError(f"the model {MODEL} could not be added; the lines above say why")


def add_test_models(environment: Environment) -> None:
    """Fetch the smaller models that tests use; where one cannot be had its tests are skipped, and say so."""
    for name in TEST_MODELS:
        if environment.run("-m", "seawall", "models", "add", name) != 0:
            say(f"the model {name} could not be added; the tests that use it are skipped")


def demo(arguments: Sequence[str]) -> int:
    """Stream an answer from the real model, then inject faults."""
    environment = ready("demo")
    add_model(environment)
    return environment.run("examples/demo.py", *arguments)


def test(arguments: Sequence[str]) -> int:
    """Run the tests; all arguments go to pytest."""
    environment = ready("test")
    add_model(environment)
    add_test_models(environment)
    return environment.run("-m", "pytest", *arguments)


LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
CHECKS: Mapping[str, tuple[str, ...]] = {
    "ruff check": ("-m", "ruff", "check", "."),
    "ruff format": ("-m", "ruff", "format", "--check", "."),
    "mypy --strict": ("-m", "mypy"),
    "pyright": ("-m", "pyright"),
    "import arrows": ("-c", LINT_IMPORTS),
    "mkdocs build --strict": ("-m", "mkdocs", "build", "--strict", "--site-dir", ".cache/site"),
    "zensical build --strict": ("-m", "zensical", "build", "--strict"),
}


def check(arguments: Sequence[str]) -> int:
    """Run every static check, all of them even when one fails."""
    refuse(arguments)
    environment = ready("check")
    failed = []
    for name, command in CHECKS.items():
        say(name)
        if environment.run(*command) != 0:
            failed.append(name)
    say(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def bench(arguments: Sequence[str]) -> int:
    """Run one benchmark, or all of them one after the other."""
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    parser = argparse.ArgumentParser(prog="dev.py bench")
    parser.add_argument("name", nargs="?", choices=names, metavar="NAME", help=f"one of: {', '.join(names)}")
    parser.add_argument("--json", metavar="FILE", help="also write figures and raw samples here; needs NAME")
    parser.add_argument("--peers", action="store_true", help="measure the competitors in the same run")
    options = parser.parse_args(arguments)
    if options.json and not options.name:
        parser.error("--json needs the NAME of one benchmark")
    chosen = [options.name] if options.name else names
    codes = [bench_one(name, options.json, peers=options.peers) for name in chosen]
    return max(codes, default=0)


def bench_one(name: str, json: str | None, *, peers: bool) -> int:
    """Run one benchmark, with its peers in an environment of its own beside the product."""
    group = SHARED_PEERS.get(name, name)
    requirements = f"benchmarks/peers-requirements/{group}.txt"
    if peers and (ROOT / requirements).exists():
        environment = Environment(ROOT / "benchmarks" / ".peers" / group)
        environment.ensure(NEEDS["bench"]._replace(files=(requirements,)))
    else:
        environment = ready("bench")
        peers = False
    if name not in BENCHES_WITHOUT_MODEL:
        add_model(environment)
    options = [*(["--json", str(Path(json).absolute())] if json else []), *(["--peers"] if peers else [])]
    return environment.run(f"benchmarks/{name}.py", *options)


def docs(arguments: Sequence[str]) -> int:
    """Build the site into site/, or serve it."""
    if list(arguments) == ["serve"]:
        return ready("docs").run("-m", "mkdocs", "serve")
    refuse(arguments)
    return ready("docs").run("-m", "mkdocs", "build", "--strict")


def gpu_check(arguments: Sequence[str]) -> int:
    """Check the backend on a CUDA device, in an environment of its own; nothing is installed where there is none."""
    script = ROOT / "benchmarks" / "_gpu_check.py"
    bare = [sys.executable, str(script)]
    if subprocess.run([*bare, "--find"], check=False).returncode != 0:
        return subprocess.run([*bare, *arguments], check=False, stdout=subprocess.DEVNULL).returncode
    environment = Environment(ROOT / "benchmarks" / ".peers" / "gpu")
    environment.ensure(NEEDS["gpu-check"])
    return environment.run(str(script), *arguments)


def refuse(arguments: Sequence[str]) -> None:
    """Say so when a command gets arguments it does not know."""
    if arguments:
        raise StepFailedError(f"unknown arguments: {shlex.join(arguments)}\nSee python3 dev.py --help.")


COMMANDS = {"demo": demo, "test": test, "check": check, "bench": bench, "docs": docs, "gpu-check": gpu_check}


def main(arguments: Sequence[str]) -> int:
    """Run a command; 2 means dev.py itself could not."""
    if sys.version_info < (3, 11):  # noqa: UP036  # whoever starts this may have an older one
        say(f"seawall needs Python 3.11 or later, this is {sys.version.split()[0]}")
        return 2
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except StepFailedError as error:
        say(f"{arguments[0]} stopped: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
