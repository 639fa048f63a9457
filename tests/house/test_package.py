"""The package as a guest: light to import, exact in what it offers, and tidy."""

import ast
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import dev
import seawall

ROOT = Path(__file__).resolve().parent.parent.parent

IMPORT = """
import json, logging, sys, threading, warnings
written, connected = [], []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        written.append(str(arguments[0]))
    if event.startswith("socket."):
        connected.append(event)

filters = list(warnings.filters)
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import seawall
print(json.dumps({
    "modules": sorted(sys.modules),
    "threads": threading.active_count(),
    "written": written,
    "connected": connected,
    "handlers": len(logging.getLogger().handlers) + len(logging.getLogger("seawall").handlers),
    "filters changed": filters != warnings.filters,
    "policies": len(list(seawall.live())),
}))
"""


@pytest.fixture(scope="module")
def imported():
    """What a fresh interpreter looks like after `import seawall`."""
    command = [sys.executable, "-W", "error", "-c", IMPORT]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


HEAVY = ["google", "gguf", "jinja2", "numpy", "onnx", "onnx_ir", "onnxruntime", "opentelemetry.sdk"]
HEAVY += ["prometheus_client", "redis", "rich", "starlette", "tenacity", "tokenizers", "trio", "uvicorn"]


@pytest.mark.parametrize("name", HEAVY)
def test_importing_loads_no_optional_or_heavy_package(imported, name):
    assert name not in imported["modules"]


def test_importing_loads_neither_inference_nor_readers(imported):
    parts = ("cli", "engine", "inference", "ops", "telemetry", "testing", "web")
    loaded = [name for name in imported["modules"] if name.startswith(tuple(f"seawall.{p}" for p in parts))]

    assert [] == loaded


def test_importing_changes_nothing_in_the_process(imported):
    assert 1 == imported["threads"]
    assert [] == imported["written"]
    assert [] == imported["connected"]
    assert 0 == imported["handlers"]
    assert 0 == imported["policies"]
    assert not imported["filters changed"]


def test_every_public_name_is_listed_and_exists():
    listed = set(seawall.__all__)
    present = {
        name
        for name, value in vars(seawall).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and name not in ("TYPE_CHECKING", "annotations", "import_module")
    }

    assert len(listed) == len(seawall.__all__)
    assert present | set(seawall._HOME_OF) <= listed
    assert [] == [name for name in sorted(listed) if not hasattr(seawall, name)]
    assert listed <= set(dir(seawall))


def test_what_is_imported_on_first_use_is_what_type_checkers_see():
    source = Path(seawall.__file__).read_text(encoding="utf-8")
    checked = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in checked.body for name in node.names}

    assert seen == seawall._HOME_OF


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'seawall' has no attribute 'braker'"):
        seawall.braker  # noqa: B018


def test_the_list_of_public_names_is_sorted():
    def kind(name):  # constants, classes, functions: the order ruff keeps
        return (not name.isupper(), name[0].islower(), name)

    assert sorted(seawall.__all__, key=kind) == list(seawall.__all__)


def test_the_modules_import_along_the_arrows():
    done = subprocess.run(
        [sys.executable, "-c", dev.LINT_IMPORTS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == done.returncode, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


FORBIDDEN = {
    "a path of somebody's machine": re.compile(r"/(?:root|work|Users)/|/home/(?!me\b|you\b|app\b)\w"),
    "a host of a package registry": re.compile(r"files\.pythonhosted|(?:^|[^.\w])(?:test\.)?pypi\.org/simple"),
    "unfinished work": re.compile(r"\b(?:TODO|FIXME|XXX)\b"),
}


def committed():
    """Text files that git tracks or would."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path != Path(__file__).resolve():
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_nothing_unfit_is_committed():
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {what}: {match[0]!r}"
        for name, text in committed()
        for what, pattern in FORBIDDEN.items()
        for match in pattern.finditer(text)
    ]

    assert [] == found
