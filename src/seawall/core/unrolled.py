"""The hot path: a row's frame, written out for its length and compiled once.

A loop over guards, a token list and a check for deadlines that are not there cost five guards half a
microsecond a call (CPython 3.11). So the frame is generated: `source(3, timed=True)` is plain
Python and says all there is to know; everything unusual leaves for `Row`, which loops.
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable
from typing import Any

from seawall.core import events, gate
from seawall.core.gate import Row
from seawall.core.protocol import Wait
from seawall.core.timers import arm, disarm

# `acquire` stands inside `try`, for Ctrl-C is handled when a call returns: after it the lock is ours to release.
_ASYNC = """
def make(fn, row, name, bed, sleeper, expiring):
    {enters} = row.enters
    {exits} = row.exits
    async def guarded(*args, **kwargs):
        {tokens} = wait = None
        inside = 0
        span = None if gate.tracer is None or name is None else gate.tracer(name)
        try:
            try:
                acquire()
                clock = gate.clock
                now = clock()
                {enter}
            except Wait as found:
                wait = bed(found, sleeper)
            finally:
                release()
            if wait is not None:
                entered = [{listed}][:inside]
                inside = 0
                await row.enter(entered, wait)
                {tokens_from} = entered
                inside = {count}
                now = clock()
            elif pending:
                deliver()
        except BaseException as exc:
            row.fail([{listed}][:inside], exc, span)
            raise
        try:
            {call}
        except BaseException as exc:
            {disarm}
            row.fail([{listed}], exc, span)
            raise
        try:
            {disarm}
            try:
                acquire()
                now = gate.clock()
                {leave}
            finally:
                release()
        except BaseException as exc:
            row.fail([{listed}][:inside], exc, span)
            raise
        if pending:
            deliver()
        if span is not None:
            span(None)
        return result
    return guarded
"""


def source(count: int, *, timed: bool) -> str:
    """The source of `make`, which gives the frame of a row of `count` guards; if `timed`, the last issues deadlines."""
    names = [f"t{index}" for index in range(count)]
    last = names[-1]
    plain = "result = await fn(*args, **kwargs)"
    call = [
        f"if arm({last}, now, clock):",
        f"    {plain}",
        "else:",
        f"    result = await expiring({last}, fn(*args, **kwargs))",
    ]
    return _fill(
        _ASYNC,
        count=[str(count)],
        enters=["".join(f"enter{index}, " for index in range(count))],
        exits=["".join(f"exit{index}, " for index in reversed(range(count)))],
        tokens=[" = ".join(names)],
        tokens_from=["".join(f"{name}, " for name in names)],
        listed=[", ".join(names)],
        enter=[line for index in range(count) for line in (f"t{index} = enter{index}(now)", f"inside = {index + 1}")],
        leave=[
            line
            for index in reversed(range(count))
            for line in (f"inside = {index}", f"exit{index}(t{index}, now, None)")
        ],
        call=call if timed else [plain],
        disarm=[f"disarm({last})" if timed else "pass"],
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


@functools.cache
def _maker(count: int, timed: bool) -> Callable[..., Callable[..., Any]]:
    text = source(count, timed=timed)
    filename = f"<seawall row of {count}{', timed' if timed else ''}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)  # for tracebacks
    scope: dict[str, Any] = {
        "Wait": Wait,
        "acquire": gate.lock.acquire,
        "arm": arm,
        "deliver": events.deliver,
        "disarm": disarm,
        "gate": gate,
        "pending": events.pending,
        "release": gate.lock.release,
    }
    exec(compile(text, filename, "exec"), scope)  # noqa: S102 - our own text, made of numbers
    made: Callable[..., Callable[..., Any]] = scope["make"]
    return made


def make_frame(fn: Callable[..., Any], row: Row, name: str | None, sleeper: Any, expiring: Any) -> Callable[..., Any]:
    """`fn`, a coroutine function, behind `row`, which holds at least one guard and neither chooses nor judges."""
    return _maker(len(row.guards), row.timed)(fn, row, name, gate.bed, sleeper, expiring)
