"""Checks of settings: each names the setting, the value it got and the rule it broke."""

from __future__ import annotations

import enum
import inspect
import math
from collections.abc import Iterable
from datetime import timedelta
from typing import Final, TypeVar

F = TypeVar("F")
L = TypeVar("L")


class _Nothing(enum.Enum):
    NOTHING = "nothing"  # None is a value like any other


NOTHING: Final = _Nothing.NOTHING  # a setting that was not given


def seconds(setting: str, value: float | timedelta, *, zero: bool = False, infinite: bool = False) -> float:
    """`value` as float seconds, or an error that says which setting is wrong and why."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    number = _number(setting, value, "a number of seconds or a timedelta")
    if number < 0 or (number == 0 and not zero) or math.isnan(number) or (math.isinf(number) and not infinite):
        least = "0 or more" if zero else "more than 0"
        raise ValueError(f"{setting} must be {least}{'' if infinite else ' and finite'}, got {value!r} s")
    return number


def window(setting: str, value: float | timedelta) -> float:
    """`value` as seconds to look back over: a millisecond or more, for clocks tell no less apart."""
    number = seconds(setting, value)
    if number < 1e-3:
        raise ValueError(f"{setting} must be 0.001 s or more, got {value!r} s")
    return number


def positive(setting: str, value: float) -> float:
    """`value` as a finite float above zero."""
    number = _number(setting, value, "a number")
    if not 0 < number < math.inf:
        raise ValueError(f"{setting} must be more than 0 and finite, got {value!r}")
    return number


def fraction(setting: str, value: float, *, one: bool = True) -> float:
    """`value` as a share in (0, 1], or in (0, 1) where one makes no sense."""
    number = _number(setting, value, "a fraction")
    if not (0 < number < 1 or (one and number == 1)):
        hint = f"; for {value:g} % write {number / 100:g}" if 1 < number <= 100 else ""
        raise ValueError(f"{setting} must be in (0, 1{']' if one else ')'}, got {value!r}{hint}")
    return number


def count(setting: str, value: int, *, least: int = 1) -> int:
    """`value` as a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{setting} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{setting} must be {least} or more, got {value!r}")
    return value


def name(kind: str, value: str) -> str:
    """`value` as the name of a policy: it labels metrics, errors and logs, so it can't be empty."""
    if not isinstance(value, str):
        raise TypeError(f"a {kind}'s name must be a string, got {value!r}; settings are keyword-only")
    if not value or len(value) > 200 or not value.isprintable():
        raise ValueError(f"a {kind}'s name must be 1 to 200 printable characters, got {value[:80]!r}")
    return value


def listeners(value: Iterable[L]) -> tuple[L, ...]:
    """`value` as a tuple of functions of an event."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"listeners must be an iterable of functions, got {value!r}")
    functions = tuple(value)
    for one in functions:
        if not callable(one):
            raise TypeError(f"listeners must be functions of an event, got {one!r}")
    return functions


def function(setting: str, value: F, *, of: str = "") -> F:
    """`value` as a function that is called where nothing can be awaited; `of` says what it is given."""
    if not callable(value):
        raise TypeError(f"{setting} must be a plain function{of and f' of {of}'}, got {value!r}")
    if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(type(value).__call__):
        raise TypeError(
            f"{setting} must be a plain function{of and f' of {of}'}, got {value!r}: its answer would never be awaited"
        )
    return value


def exceptions(
    setting: str, value: type[BaseException] | tuple[type[BaseException], ...]
) -> tuple[type[BaseException], ...]:
    """`value` as a tuple of exception classes."""
    classes: tuple[object, ...] = value if isinstance(value, tuple) else (value,)
    for one in classes:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise TypeError(f"{setting} must be an exception class or a tuple of them, got {one!r}")
    return value if isinstance(value, tuple) else (value,)


def _number(setting: str, value: float, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{setting} must be {wanted}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # an int past 1e308: the caller's rule refuses it
