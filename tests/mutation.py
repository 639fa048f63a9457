"""Changes one thing in the source at a time and looks whether a test notices: the mutation score.

    python -m tests.mutation --sample 600 --seed 1 --report mutation.json
    python -m tests.mutation --again mutation.json     tries those that no test noticed once more
    python -m tests.mutation src/seawall/core/gate.py --sample 0     every mutant of a file

The changes are mutmut's, and statements left out, conditions turned round, results forgotten. mutmut itself sends each
function through a trampoline, which tests of frames, tracebacks and allocations notice; so a mutant is a whole module
here, handed to the import system in a process of its own. It meets the tests that run through its function, those
through its very line first, until one fails or hangs.

Not changed: annotations, docstrings, the text of errors, `__repr__` and `__str__`, decorators, and a module's own
assignments other than plain values. A mutant meets tests of `ENOUGH` seconds and none above `SLOW`, so some survivors
would be noticed by the whole suite.
"""

import argparse
import contextlib
import importlib.machinery
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import libcst as cst
import libcst.matchers as m
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("src/seawall/core", "src/seawall/policies", "src/seawall/slo")
TESTS = ("tests/core", "tests/policies", "tests/telemetry", "tests/testing", "tests/configuration", "tests/presets")
OPTIONS = ["-q", "-p", "no:cacheprovider", "--tb", "no", "--assert", "plain"]  # rewriting would import past us
ENOUGH = 8.0  # seconds of tests that a mutant meets at most, as they take when watched
SLOW = 1.0
HANGS = "8"  # seconds after which a test has noticed


class Mutant(NamedTuple):
    """One change: where, in which function's lines, what stood there and stands there now, and the whole new text."""

    file: str
    line: int
    first: int
    last: int
    before: str
    after: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}: {self.before} -> {self.after}"


# What to change


def left_out(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    statement = node.body[0]
    calls = isinstance(statement, cst.Expr) and isinstance(statement.value, cst.Call | cst.Await)
    if len(node.body) == 1 and (calls or isinstance(statement, cst.AugAssign | cst.Del | cst.Raise)):
        yield node.with_changes(body=[cst.Pass()])


def turned_round(node: cst.If | cst.While | cst.IfExp) -> Iterator[cst.CSTNode]:
    if not isinstance(node.test, cst.UnaryOperation | cst.Comparison):  # mutmut turns those
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def forgotten(node: cst.Return) -> Iterator[cst.CSTNode]:
    if node.value is not None and not m.matches(node.value, m.Name("None")):
        yield node.with_changes(value=cst.Name("None"), whitespace_after_return=cst.SimpleWhitespace(" "))


OPERATORS: list[tuple[type, Callable[[Any], Iterable[cst.CSTNode]]]] = [
    *mutation_operators,
    (cst.SimpleStatementLine, left_out),
    (cst.If, turned_round),
    (cst.While, turned_round),
    (cst.IfExp, turned_round),
    (cst.Return, forgotten),
]
UNCHANGED = cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom | cst.Assert
TYPES = m.Call(func=m.Name("TypeVar") | m.Name("ParamSpec") | m.Name("isinstance") | m.Name("len"))
SHOWN = {"__repr__", "__str__"}
TEXT = m.SimpleString() | m.FormattedString() | m.ConcatenatedString()
PLAIN = m.Integer() | m.Float() | m.Name("True") | m.Name("False") | m.UnaryOperation()


def _is_plain(value: cst.BaseExpression | None) -> bool:
    return value is not None and m.matches(value, PLAIN)


class Finder(cst.CSTVisitor):
    """Finds every change of a module."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, tuple[int, int, int]]] = []
        self._functions: list[tuple[int, int]] = []
        self._raising = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, UNCHANGED) or m.matches(node, TYPES | m.If(test=m.Name("TYPE_CHECKING"))):
            return False
        if isinstance(node, cst.FunctionDef):
            overload = any(m.matches(one.decorator, m.Name("overload")) for one in node.decorators)
            if overload or node.name.value in SHOWN:
                return False
            where = self.get_metadata(PositionProvider, node)
            self._functions.append((where.start.line, where.end.line))
        elif isinstance(node, cst.Raise):
            self._raising += 1
        elif isinstance(node, cst.Assign | cst.AnnAssign) and not self._functions and not _is_plain(node.value):
            return False
        if not m.matches(node, m.Call(func=m.Name("cast"))):
            self._change(node)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef) and original_node.name.value not in SHOWN:
            if not any(m.matches(one.decorator, m.Name("overload")) for one in original_node.decorators):
                self._functions.pop()
        elif isinstance(original_node, cst.Raise):
            self._raising -= 1

    def _change(self, node: cst.CSTNode) -> None:
        where = self.get_metadata(PositionProvider, node, None)
        if where is None:
            return
        if self._raising and (
            m.matches(node, TEXT)
            or (isinstance(node, cst.Call) and any(m.matches(arg.value, TEXT) for arg in node.args))
        ):
            return
        line = where.start.line
        first, last = self._functions[0] if self._functions else (line, line)
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                self.found.extend((node, changed, (line, first, last)) for changed in operator(node))


class Replace(cst.CSTTransformer):
    def __init__(self, old: cst.CSTNode, new: cst.CSTNode) -> None:
        self.old, self.new = old, new

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> Any:
        return self.new if original_node is self.old else updated_node


class Mutants:
    """All of one file, made one by one: a module of two hundred lines has four hundred."""

    def __init__(self, file: str) -> None:
        wrapper = MetadataWrapper(cst.parse_module(Path(ROOT, file).read_text()))
        finder = Finder()
        wrapper.visit(finder)
        self.file, self._module, self._found = file, wrapper.module, finder.found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Mutant | None:
        """None for one that is no Python."""
        old, new, at = self._found[number]
        text = self._module.visit(Replace(old, new)).code
        try:
            compile(text, self.file, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return None
        before, after = (" ".join(self._module.code_for_node(node).split())[:160] for node in (old, new))
        return Mutant(self.file, *at, before, after, text)

    def sample(self, size: int, rng: random.Random) -> list[Mutant]:
        """`size` different ones, or as many as there are."""
        chosen: dict[str, Mutant] = {}
        for number in rng.sample(range(len(self)), len(self)):
            if len(chosen) >= size:
                break
            mutant = self[number]
            if mutant is not None:
                chosen.setdefault(mutant.name, mutant)
        return list(chosen.values())


# Which tests


class Watch:
    """Notes which lines each test runs through, how long it takes, and whether it fails when watched."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        began = time.perf_counter()
        done = yield
        self.seconds.setdefault(item.nodeid, time.perf_counter() - began)
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.seconds[report.nodeid] = math.inf


class Only:
    """Runs these tests, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: place for place, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((one for one in items if one.nodeid in self.order), key=lambda one: self.order[one.nodeid])


class Tests:
    """All tests: what each takes and which lines it runs through."""

    def __init__(self, seconds: dict[str, float], lines: dict[str, dict[str, list[str]]]) -> None:
        self.seconds = seconds
        self.lines = {file: {int(line): set(tests) for line, tests in of.items()} for file, of in lines.items()}

    def for_mutant(self, mutant: Mutant) -> list[str]:
        """The tests that it meets."""
        lines = self.lines.get(mutant.file, {})
        everywhere = mutant.first == mutant.last  # a value of the module's
        near: set[str] = set()
        for line, tests in lines.items():
            if everywhere or mutant.first <= line <= mutant.last:
                near |= tests
        own = f"/test_{Path(mutant.file).stem}.py"
        near |= {test for test in self.seconds if own in test}  # what runs in a child is not seen to run
        if mutant.file.endswith("unrolled.py"):  # makes a frame once, for whichever test comes first
            near |= {test for test in self.seconds if test.startswith("tests/core/")}
        there = lines.get(mutant.line, set())
        quick = [test for test in sorted(near) if self.seconds.get(test, SLOW) < SLOW]
        chosen, left = [], ENOUGH
        for test in sorted(quick, key=lambda test: (test not in there, own not in test, self.seconds[test])):
            chosen.append(test)
            left -= self.seconds[test]
            if left < 0:
                break
        return chosen


def forked(work: Callable[[], int], limit: float) -> int | None:
    """The exit code of `work` in a process of its own, silent; None where it does not end in time."""
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        code = 70
        with contextlib.suppress(BaseException):  # a mutant may raise anything
            code = work()
        os._exit(code)
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def watched(files: list[str]) -> Tests:
    """One run of all tests."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "notes.json")

        def work() -> int:
            import coverage

            watching = coverage.Coverage(
                include=[str(ROOT / file) for file in files], data_file=None, config_file=False
            )
            watch = Watch(watching)
            with watching.collect():
                pytest.main([*OPTIONS, *TESTS], plugins=[watch])
            data = watching.get_data()
            lines = {str(Path(file).relative_to(ROOT)): data.contexts_by_lineno(file) for file in data.measured_files()}
            notes.write_text(json.dumps({"seconds": watch.seconds, "lines": lines}))
            return 0

        if forked(work, 1800) != 0:
            sys.exit("the tests could not be watched; do they run at all?")
        return Tests(**json.loads(notes.read_text()))


def verdict(mutant: Mutant, tests: Tests) -> str:
    """killed, timeout, survived or untested."""
    chosen = tests.for_mutant(mutant)
    if not chosen:
        return "untested"
    path = str(ROOT / mutant.file)

    def work() -> int:
        loader = importlib.machinery.SourceFileLoader
        ordinary = loader.get_code

        def get_code(self: Any, name: str) -> Any:
            return compile(mutant.text, path, "exec", dont_inherit=True) if self.path == path else ordinary(self, name)

        loader.get_code = get_code  # type: ignore[method-assign]
        files = sorted({test.partition("::")[0] for test in chosen})
        return int(pytest.main([*OPTIONS, "-x", "--timeout", HANGS, *files], plugins=[Only(chosen)]))

    code = forked(work, 15 + 3 * sum(tests.seconds[test] for test in chosen))
    if code in {pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED}:
        sys.exit(f"the tests were changed meanwhile: pytest ended with {code} on {mutant.name}")
    return {None: "timeout", 0: "survived"}.get(code, "killed")


def begin() -> None:
    """What every process has from this one: few examples, the same ones each time, and the packages that we need."""
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile(
        "mutation", derandomize=True, deadline=None, max_examples=30, database=None, phases=phases
    )
    hypothesis.settings.load_profile("mutation")
    for package in ("anyio.from_thread", "opentelemetry.trace", "pytest_asyncio", "sybil", "tenacity", "trio.testing"):
        importlib.import_module(package)
    assert "seawall" not in sys.modules


def tell(verdicts: dict[str, str]) -> None:
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for name, said in verdicts.items():
        file = name.partition(":")[0]
        for group in (file, str(Path(*Path(file).parts[:3])), "all"):
            groups[group][said] += 1
    for group, counts in sorted(groups.items()):
        noticed, tried = counts["killed"] + counts["timeout"], counts.total()
        print(f"{group:60} {noticed:5} of {tried:5} {100 * noticed / tried:6.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, help="files and folders to change")
    parser.add_argument("--sample", type=int, default=600, help="how many mutants; each file has its share; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="where to write every verdict")
    parser.add_argument(
        "--again", type=Path, help="a report, of the same source and seed, whose survivors to try again"
    )
    given = parser.parse_args()
    os.chdir(ROOT)
    begin()
    found = {
        path for part in given.parts for path in (Path(part).rglob("*.py") if Path(part).is_dir() else [Path(part)])
    }
    all_of = [Mutants(str(path)) for path in sorted(found)]
    count = sum(map(len, all_of))
    rng = random.Random(given.seed)
    share = given.sample / count if given.sample else 1
    mutants = [one for of in all_of for one in of.sample(max(5, round(share * len(of))), rng)]
    rng.shuffle(mutants)
    verdicts: dict[str, str] = json.loads(given.again.read_text()) if given.again else {}
    mutants = [one for one in mutants if verdicts.get(one.name) not in {"killed", "timeout"}]
    print(f"{count} mutants, of which {len(mutants)} are tried", flush=True)
    tests = watched([of.file for of in all_of])
    for mutant in mutants:
        said = verdicts[mutant.name] = verdict(mutant, tests)
        if said in {"survived", "untested"}:
            print(f"{said}: {mutant.name}", flush=True)
        if given.report:
            given.report.write_text(json.dumps(verdicts, indent=1))
    tell(verdicts)


if __name__ == "__main__":
    main()
