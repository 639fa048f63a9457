"""Runs a chat template, which is a program out of a model file: in a sandbox, and for a bounded amount of work.

The only module that imports `jinja2`. Its immutable sandbox keeps a template from Python's internals, and from changing
what it is given. It does not keep one from computing for ever, or from a text of a terabyte. So here turns of loops and
calls are counted, every value that is made is weighed, and what could make much of little in one step is bounded
before, or missing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

from seawall.inference.errors import CorruptModelError, MissingExtraError

try:
    from jinja2 import nodes
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer
except ImportError as error:
    raise MissingExtraError(error.name or "jinja2") from error

_LONGEST = 1 << 16  # characters of a template
_WORK = 250_000  # turns, calls and operations of one rendering: some seconds at the very most
_WEIGHT = 1 << 20  # characters and items of one value, besides what the messages bring
_RANGE = 10_000
_WIDEST = 16  # of an indentation
_BITS = 1024  # of a whole number
_SPREADING = frozenset(("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"))
_TO_BYTES = frozenset(("encode", "to_bytes"))  # whose methods spread as well, and no template needs them
_READING = (  # tests that look at all of a value
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lower", "lt",
    "ne", "upper",
)  # fmt: skip
_GLANCING = frozenset(("abs", "attr", "count", "d", "default", "first", "last", "length"))  # filters that do not
# Those that make no more of what they are given; `_own` has others.
_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort",
    "string", "title", "trim", "unique", "upper",
)  # fmt: skip


class WorkLimitError(Exception):
    """A template wanted too much."""


class _Budget:
    """What one rendering may still do, and how much a value may weigh."""

    def __init__(self, weight: int) -> None:
        self.work = _WORK
        self.weight = weight

    def spend(self, work: int) -> None:
        self.work -= work
        if self.work < 0:
            raise WorkLimitError(f"it takes more than {_WORK:,} turns and calls")

    def check(self, weight: int) -> None:
        if weight > self.weight:
            raise WorkLimitError(f"it makes a value of more than {self.weight:,} characters and items")


_budget: ContextVar[_Budget] = ContextVar("seawall_template_budget")


def compiled(source: str, functions: Mapping[str, Callable[..., object]]) -> Callable[[Mapping[str, object]], str]:
    """A function that renders a template with variables; CorruptModelError where it is none.

    What the rendering raises is the template's own, or WorkLimitError.
    """
    if len(source) > _LONGEST:
        raise CorruptModelError("chat template", f"it has {len(source):,} characters, over {_LONGEST:,}")
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False)
    usual = {name: environment.filters[name] for name in _FILTERS}
    environment.filters = {name: _weighed(found, name) for name, found in (usual | _own()).items()}
    tests: dict[str, Any] = environment.tests
    tests |= {name: _weighed(tests[name], name) for name in _READING}
    del environment.globals["lipsum"]
    environment.globals |= {"range": _range, "namespace": _Namespace, **functions}
    try:
        template = environment.from_string(_Counting().visit(environment.parse(source)))
    except Exception as error:  # where it nests too deep, a RecursionError, or a SyntaxError of Python's
        raise CorruptModelError("chat template", str(error) or type(error).__name__) from error

    def render(variables: Mapping[str, object]) -> str:
        budget = _Budget(_WEIGHT + 2 * _weigh(variables, None)[0])
        token = _budget.set(budget)
        pieces, length = list[str](), 0
        try:
            for piece in template.generate(variables):
                length += len(piece)
                budget.check(length)
                pieces.append(piece)
        finally:
            _budget.reset(token)
        return "".join(pieces)

    return render


def _weigh(value: object, most: int | None) -> tuple[int, int]:
    """Characters and items of a value, nested ones included, and steps that took; no further than `most`."""
    weight, steps, left = 0, 0, [value]
    while left and (most is None or weight <= most):
        steps += 1
        one = left.pop()
        if isinstance(one, (str, bytes)):
            weight += len(one)
        elif isinstance(one, Mapping):
            weight += len(one)
            left += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, KeysView, ValuesView, ItemsView)):
            weight += len(one)
            left.extend(one)
        elif isinstance(one, int) and one.bit_length() > _BITS:
            raise WorkLimitError(f"it makes a number of more than {_BITS:,} bits")
    return weight, steps


def _made(value: Any) -> Any:
    """A value that an operation has made, once it is known to weigh little enough."""
    budget = _budget.get()
    weight, steps = _weigh(value, budget.weight)
    budget.spend(1 + (steps >> 3) + (weight >> 10))
    budget.check(weight)
    return value


class _Namespace(Namespace):
    """Namespaces may hold each other: a text of what they hold would be as long as two to the power of their number."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Weighs what operators and calls read and make, and refuses what would spread before it does."""

    intercepted_binops = frozenset(("+", "-", "*", "**", "/", "//", "%"))

    @staticmethod
    def concat(texts: Iterable[str]) -> str:
        """The text of a block."""
        texts = list(texts)
        _budget.get().check(sum(map(len, texts)))
        found: str = _made("".join(texts))
        return found

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, PYI063 - as its base
        """Call what a template calls."""
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        _made((args, kwargs))
        if isinstance(owner, (str, int)) and name in _SPREADING | _TO_BYTES:
            raise WorkLimitError(f"it calls {type(owner).__name__}.{name}")
        if not isinstance(owner, Context):
            _made(owner)  # a method reads all of it
        if isinstance(owner, str) and name in ("replace", "join"):
            return (_replace if name == "replace" else _join_with)(owner, *args, **kwargs)
        return _made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator."""
        if operator == "**" or (operator == "%" and isinstance(left, (str, bytes))):
            raise WorkLimitError(f"it uses {operator}")
        _made((left, right))
        if operator == "*":
            for values, times in ((left, right), (right, left)):
                if isinstance(times, (int, float)) and not isinstance(values, (int, float)):
                    _budget.get().check(_weigh(values, None)[0] * max(1, int(times)))
        return _made(super().call_binop(context, operator, left, right))


class _Counting(NodeTransformer):
    """Has loops counted and literals weighed."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - as its base has it
        """A loop over what is counted first."""
        if node.recursive:
            raise CorruptModelError("chat template", "it has a recursive loop")
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """The texts of a list, joined."""
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """A comparison, both sides weighed."""
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "_literal")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "_literal")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """An item, or a part that is copied."""
        self.generic_visit(node)
        return _filtered(node, "_literal") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        """A list, weighed."""
        self.generic_visit(node)
        return _filtered(node, "_literal")

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        """A tuple, weighed where it is no target."""
        self.generic_visit(node)
        return _filtered(node, "_literal") if node.ctx == "load" else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _weighed(filter_: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(filter_)  # copies what tells jinja2 to pass a context
    def run(*args: Any, **kwargs: Any) -> Any:
        if name not in _GLANCING:
            _made([one for one in args if not isinstance(one, Context)])
        found = filter_(*args, **kwargs)
        return _made(list(found) if isinstance(found, Iterator) else found)

    return run


def _own() -> dict[str, Callable[..., object]]:
    return {
        "_counted": _counted,
        "_literal": lambda value: value,
        "indent": _indent,
        "join": lambda values, by="", attribute=None: _join_with(by, _attributes(values, attribute)),
        "replace": lambda text, old, new, count=-1: _replace(str(text), old, new, count),
        "safe": str,
        "tojson": _tojson,
    }


def _counted(values: Any) -> Any:
    values = values if hasattr(values, "__len__") else list(values)
    _budget.get().spend(len(values))
    return values


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > _RANGE:
        raise WorkLimitError(f"it counts to more than {_RANGE:,}")
    return found


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old) if count < 0 else min(count, text.count(old))
    _budget.get().check(len(text) + found * len(new))
    return text.replace(old, new, count)


def _attributes(values: Iterable[Any], attribute: str | None) -> Iterable[Any]:
    return values if attribute is None else [value[attribute] for value in values]


def _join_with(by: str, values: Iterable[Any]) -> str:
    texts = [str(value) for value in values]
    _budget.get().check(sum(map(len, texts)) + len(by) * len(texts))
    return by.join(texts)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    by = width if isinstance(width, str) else " " * min(int(width), _WIDEST + 1)
    if len(by) > _WIDEST:
        raise WorkLimitError(f"it indents by more than {_WIDEST}")
    lines = str(text).split("\n")
    return "\n".join(by + line if (number or first) and (line or blank) else line for number, line in enumerate(lines))


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """As transformers has it: not escaped for HTML."""
    if indent is not None and not 0 <= indent <= _WIDEST:
        raise WorkLimitError(f"it indents by more than {_WIDEST}")
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)
