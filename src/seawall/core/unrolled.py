"""The hot path: a row's frame, written out for its length and compiled once.

A loop over guards, a token list and a check for deadlines that are not there cost five guards half a
microsecond a call (CPython 3.11). So the frame is generated: `source(Shape(3))` is plain Python
and says all there is to know; everything unusual leaves for `Row`, which loops.
"""

from __future__ import annotations

import functools
import linecache
from bisect import bisect_left
from collections.abc import Callable
from inspect import CO_VARARGS, CO_VARKEYWORDS
from keyword import iskeyword
from types import FunctionType
from typing import Any, NamedTuple

from seawall.core import events, gate, watching
from seawall.core.gate import Row
from seawall.core.locking import lock, release_if_held
from seawall.core.protocol import Rescuer, Wait
from seawall.core.timers import arm, disarm

# Every name of ours begins with an underscore, so that parameters may have theirs. Ctrl-C is handled when a call
# returns or while `_acquire` waits: that stands inside `try`, and what is raised there may find the lock ours or not.
_ASYNC = """
def _make(_fn, _row, _site, _sleeper, _expiring, _defaults):
    {bind}
    async def guarded({parameters}):
        {tokens}_wait = None
        _inside = 0
        _began = None
        _watch = _begin(_site) if _watching.hooked else None
        try:
            {choose}
            try:
                _acquire()
                _clock = _gate.clock
                _began = _now = _clock()
                {enter}
            except _Wait as _found:
                try:
                    _wait = _bed(_found, _sleeper)
                finally:
                    _release()
            except BaseException:
                _release_if_held()
                raise
            else:
                _release()
            if _wait is not None:
                _entered = [{listed}][:_inside]
                _inside = 0
                await _row.enter(_entered, _wait)
                {tokens_from} = _entered
                _inside = {count}
                _now = _clock()
            elif _pending:
                _deliver()
        except BaseException as _exc:
            _row.fail([{listed}][:_inside], _exc, _watch or _late(_site, _began))
            raise
        try:
            {call}
        except BaseException as _exc:
            {disarm}
            _row.fail([{listed}], _exc, _watch or _late(_site, _began))
            raise
        {leave}
        return _result
    return guarded
"""

_LEAVE = """
try:
    {disarm}
    try:
        _acquire()
        _now = _gate.clock()
        {exits}
        if _watching.timing and _watch is None and _site is not None:
            _seconds = _now - _began
            if _seconds <= _site.bounds[0]:  # a call that is slower does not feel a search
                _site.counts[0] += 1
            else:
                _site.counts[_bisect(_site.bounds, _seconds)] += 1
            _site.total += _seconds
    except BaseException:
        _release_if_held()
        raise
    else:
        _release()
    _inside = 0
    if _pending:
        _deliver()
except BaseException as _exc:
    _row.fail([{listed}][:_inside], _exc, _watch or _late(_site, _began))
    raise
if _watch is not None:
    _watch.end(None)
"""

_LEAVE_JUDGED = """
{disarm}
_row.leave_well([{listed}], _watch or _late(_site, _began), _result)
"""

_RESCUE = """
def _make(_fn, _around, _site, _defaults):
    async def guarded({parameters}):
        _watch = _begin(_site) if _watching.hooked or _watching.timing else None
        try:
            if not _around.rescues:
                _result = await _around.around(lambda: _fn({arguments}))
            else:
                try:
                    _result = await _fn({arguments})
                except Exception as _exc:
                    _error = _exc
                else:
                    _error = None
                    _around.passed += 1
                if _error is not None:
                    try:
                        _result = await _around.rescue(_error, lambda: _fn({arguments}))
                    finally:
                        del _error
        except BaseException as _exc:
            _end(_watch, _exc)
            raise
        if _watch is not None:
            _watch.end(None)
        return _result
    return guarded
"""


class Signature(NamedTuple):
    """What stands in a function's `def`, and what passes it all on."""

    parameters: str
    arguments: str


ANY = Signature("*args, **kwargs", "*args, **kwargs")


def signature_of(fn: Callable[..., Any]) -> Signature:
    """The signature of a plain function as it stands in its code, with `_defaults[0]` and so on for default values.

    A frame with the same one is 40 ns cheaper to call than one with `*args`, and a wrong call is refused where it is
    made, as without policies, instead of counting as a failure.
    """
    code = getattr(fn, "__code__", None)
    if type(fn) is not FunctionType or code is None:
        return ANY
    positional = code.co_varnames[: code.co_argcount]
    count = code.co_argcount + code.co_kwonlyargcount
    keyword_only = code.co_varnames[code.co_argcount : count]
    flags = code.co_flags
    stars = list(code.co_varnames[count:][: bool(flags & CO_VARARGS) + bool(flags & CO_VARKEYWORDS)])
    taken = code.co_varnames[: count + len(stars)]
    if any(name.startswith(("_", ".")) or name == "BaseException" or iskeyword(name) for name in taken):
        return ANY
    values = iter(range(len(fn.__defaults__ or ()) + len(fn.__kwdefaults__ or {})))
    first_default = len(positional) - len(fn.__defaults__ or ())
    parameters = [
        name if index < first_default else f"{name}=_defaults[{next(values)}]" for index, name in enumerate(positional)
    ]
    if code.co_posonlyargcount:
        parameters.insert(code.co_posonlyargcount, "/")
    arguments = list(positional)
    if flags & CO_VARARGS:
        star = f"*{stars.pop(0)}"
        parameters.append(star)
        arguments.append(star)
    elif keyword_only:
        parameters.append("*")
    for name in keyword_only:
        parameters.append(f"{name}=_defaults[{next(values)}]" if name in (fn.__kwdefaults__ or {}) else name)
        arguments.append(f"{name}={name}")
    if stars:
        parameters.append(f"**{stars[0]}")
        arguments.append(f"**{stars[0]}")
    return Signature(", ".join(parameters), ", ".join(arguments))


def _defaults_of(fn: Callable[..., Any]) -> tuple[Any, ...]:
    """The default values in the order in which `signature_of` numbers them."""
    code, by_keyword = getattr(fn, "__code__", None), getattr(fn, "__kwdefaults__", None) or {}
    names = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount] if code else ()
    return (*(getattr(fn, "__defaults__", None) or ()), *[by_keyword[name] for name in names if name in by_keyword])


class Shape(NamedTuple):
    """All that the source of a row's frame depends on."""

    length: int  # guards
    timed: bool = False  # the last one issues deadlines
    per_call: bool = False  # they depend on the arguments
    judging: bool = False  # they look at the result
    plain: tuple[int, ...] = ()  # those that only want to know when the call began, see `returns_now`
    signature: Signature = ANY


def source(shape: Shape) -> str:
    """The source of `_make`, which gives the frame of a row of that shape."""
    names = [f"_t{number}" for number in range(shape.length)]
    last = names[-1] if names else ""
    passed_on = f"_fn({shape.signature.arguments})"
    plain = f"_result = await {passed_on}"
    armed = [
        f"if _arm({last}, _now, _clock):",
        f"    {plain}",
        "else:",
        f"    _result = await _expiring({last}, {passed_on})",
    ]
    numbers = range(shape.length)
    bind = [
        "[" + ", ".join(f"_enter{number}" for number in numbers) + "] = _row.enters",
        "[" + ", ".join(f"_exit{number}" for number in reversed(numbers)) + "] = _row.exits",
    ]
    disarm = [f"_disarm({last})" if shape.timed else "pass"]
    listed = [", ".join(names)]
    leave = _fill(
        _LEAVE_JUDGED if shape.judging else _LEAVE,
        listed=listed,
        disarm=disarm,
        exits=[line for n in reversed(numbers) for line in (f"_inside = {n}", f"_exit{n}(_t{n}, _now, None)")],
    )
    return _fill(
        _ASYNC,
        parameters=[shape.signature.parameters],
        bind=["_any_row = _row"] if shape.per_call else bind,
        choose=["_row = _any_row", "_row = _any_row.for_call(args, kwargs)", *bind] if shape.per_call else ["pass"],
        count=[str(shape.length)],
        tokens=["".join(f"{name} = " for name in names)],
        tokens_from=["[" + ", ".join(names) + "]"],
        listed=listed,
        enter=[
            line
            for n in numbers
            for line in (f"_t{n} = _now" if n in shape.plain else f"_t{n} = _enter{n}(_now)", f"_inside = {n + 1}")
        ],
        call=armed if shape.timed else [plain],
        disarm=disarm,
        leave=leave.strip().splitlines(),
    )


def _fill(template: str, **parts: list[str]) -> str:
    """`template` with each `{part}` replaced by its lines, indented like the first."""
    lines = []
    for line in template.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        for name, replacement in parts.items():
            line = line.replace("{" + name + "}", f"\n{indent}".join(replacement))  # noqa: PLW2901
        lines.append(line)
    return "\n".join(lines) + "\n"


def _compiled(text: str, what: str) -> Callable[..., Callable[..., Any]]:
    """The `_make` of a source, which tracebacks can show."""
    filename = f"<seawall {what}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {
        "_Wait": Wait,
        "_acquire": lock.acquire,
        "_arm": arm,
        "_bed": gate.bed,
        "_begin": watching.begin,
        "_bisect": bisect_left,
        "_deliver": events.deliver,
        "_disarm": disarm,
        "_end": watching.end,
        "_gate": gate,
        "_late": watching.late,
        "_pending": events.pending,
        "_release": lock.release,
        "_release_if_held": release_if_held,
        "_watching": watching,
    }
    exec(compile(text, filename, "exec"), scope)  # noqa: S102 - our own text; the names are those of a function
    made: Callable[..., Callable[..., Any]] = scope["_make"]
    return made


@functools.lru_cache(maxsize=512)  # of shapes; frames in use keep theirs
def _maker(shape: Shape) -> Callable[..., Callable[..., Any]]:
    flags = "".join(f", {flag}" for flag in ("timed", "per_call", "judging") if getattr(shape, flag))
    flags += f", plain {' '.join(map(str, shape.plain))}" if shape.plain else ""
    return _compiled(source(shape), f"row of {shape.length}{flags}: {shape.signature.parameters}")


@functools.lru_cache(maxsize=512)
def _rescue_maker(signature: Signature) -> Callable[..., Callable[..., Any]]:
    parts = {"parameters": [signature.parameters], "arguments": [signature.arguments]}
    return _compiled(_fill(_RESCUE, **parts), f"rescue: {signature.parameters}")


def make_frame(
    fn: Callable[..., Any], row: Row, site: watching.Site | None, sleeper: Any, expiring: Any
) -> Callable[..., Any]:
    """`fn`, a coroutine function, behind `row`."""
    signature = ANY if row.per_call else signature_of(fn)
    enters = () if row.judging else row.enters
    plain = tuple(n for n, enter in enumerate(enters) if getattr(enter, "returns_now", False))
    shape = Shape(len(row.members), row.timed, row.per_call, row.judging, plain, signature)
    return _maker(shape)(fn, row, site, sleeper, expiring, _defaults_of(fn))


def make_rescue_frame(fn: Callable[..., Any], around: Rescuer, site: watching.Site | None) -> Callable[..., Any]:
    """`fn`, a coroutine function, behind an around that acts on its failures."""
    return _rescue_maker(signature_of(fn))(fn, around, site, _defaults_of(fn))
