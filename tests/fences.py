"""Runs the python fences of README, docs and docstrings, top-level `await` included.

Lines that start with `#>` state what the fence prints; a fence without them must merely run. Fences of one
file share their names, as a reader who types along would have them. A fence that cannot run here says why in
a comment just above it, and such fences are few (tests/house counts them):

    <!-- not run: needs a GPU -->
"""

import ast
import asyncio
import contextlib
import functools
import gc
import inspect
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.parsers.rest import DocTestParser

ROOT = Path(__file__).resolve().parent.parent
INFO = re.compile(r"(?:python|py)(?:[ \t{][^\n]*)?$\n", re.MULTILINE)
NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>\S.*?)\s*-->\s*\Z", re.DOTALL)
EXPECTED = re.compile(r"^[ \t]*#>(?: (?P<line>.*))?$", re.MULTILINE)


class Docstrings(PythonDocStringDocument):
    """The docstrings of a file, whose fences import what they use, as a reader must."""

    def __init__(self, text: str, path: str) -> None:
        super().__init__(text, path)
        self.pop_evaluator(self.import_document)


class PythonFences:
    """A Sybil parser for python fences."""

    def __init__(self) -> None:
        self._lexer = RawFencedCodeBlockLexer(INFO)

    def __call__(self, document: Document) -> Iterator[Region]:
        """Find the fences of a document."""
        for region in self._lexer(document):
            region.parsed = region.lexemes["source"]
            excuse = NOT_RUN.search(document.text[: region.start].rstrip())
            region.evaluator = _skipper(excuse["reason"]) if excuse else run
            yield region


def _skipper(reason: str) -> Any:
    def skip(_: Example) -> NoReturn:
        pytest.skip(f"not run: {reason}")

    skip.reason = reason  # type: ignore[attr-defined]
    return skip


def run(example: Example) -> str | None:
    """Run one fence and compare what it prints; a text is how it failed."""
    source = str(example.parsed)
    padding = "\n" * (example.line + example.parsed.line_offset)  # so tracebacks name the document's lines
    code = compile(padding + source, example.path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    example.namespace.setdefault("__name__", "__main__")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(_awaited(code, example.namespace))
        else:
            exec(code, example.namespace)
    expected = [match["line"] or "" for match in EXPECTED.finditer(source)]
    actual = [line.rstrip() for line in printed.getvalue().splitlines()]
    if expected and [line.rstrip() for line in expected] != actual:
        return "\n".join(["the fence prints something else", "expected:", *expected, "printed:", *actual])
    return None


async def _awaited(code: Any, namespace: dict[str, Any]) -> None:
    await eval(code, namespace)


def fence_finders(root: Path = ROOT) -> list[Sybil]:
    """What to look through for fences: README.md, the docs and the docstrings of the package."""
    finder = functools.partial(Sybil, [PythonFences()], setup=share_trials, teardown=forget)
    return [
        finder(path=str(root), filenames=["README.md"], excludes=["*/*"]),
        finder(path=str(root / "docs"), patterns=["*.md"]),
        finder(path=str(root / "src"), patterns=["*.py"], document_types={".py": Docstrings}),
    ]


def doctest_finder(root: Path = ROOT) -> Sybil:
    """The `>>>` lines of docstrings, which run inside their module."""
    return Sybil([DocTestParser()], path=str(root / "src"), patterns=["*.py"], teardown=forget)


def share_trials(_: dict[str, Any]) -> None:
    """Decoders of one model share the trial of its exactness, which takes most of the time to load an engine."""
    from seawall.inference import Decoder

    tried = Decoder.exactness

    def exactness(decoder: Decoder) -> Any:
        key = decoder.folder, decoder.kv, decoder.context, decoder.threads
        if key in trials and decoder._exactness is None and decoder._session is not None:
            decoder._exactness = trials[key]
        trials[key] = tried(decoder)
        return trials[key]

    patched.setattr(Decoder, "exactness", exactness)


trials: dict[Any, Any] = {}
patched = pytest.MonkeyPatch()


def forget(namespace: dict[str, Any]) -> None:
    """Drop what a file made, so that its policies are not alive, and not exported, in the next one."""
    patched.undo()
    namespace.clear()
    gc.collect()


def fences(root: Path = ROOT) -> Iterable[Example]:
    """Every fence of the tree."""
    paths = [root / "README.md", *sorted(root.glob("docs/**/*.md")), *sorted(root.glob("src/**/*.py"))]
    for sybil in fence_finders(root):
        for path in paths:
            if path.exists() and sybil.should_parse(path):
                yield from sybil.parse(path).examples()


def is_excused(example: Example) -> bool:
    """Whether a comment above this fence says why it does not run."""
    return hasattr(example.region.evaluator, "reason")
