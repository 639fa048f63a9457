"""One call: what it is remembered by while it runs, and what it counts as when it ends."""

from __future__ import annotations

import enum
from collections.abc import Callable
from datetime import timedelta
from typing import TypeAlias, TypeGuard

from seawall.core import checks, events
from seawall.core.errors import Rejected

Predicate: TypeAlias = Callable[..., bool]
Errors: TypeAlias = type[BaseException] | tuple[type[BaseException], ...] | Predicate
OpenFor: TypeAlias = Callable[..., float | timedelta | None]


class Outcome(enum.Enum):
    """What a call counts as."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEITHER = "neither"  # cancelled, refused further in, abandoned, or ignored


class Call:
    """The token of a call that needs more than the number of its generation."""

    __slots__ = ("began", "generation", "outcome", "seconds")

    def __init__(self, generation: object, began: float) -> None:
        self.generation = generation  # of the state: a call from an earlier one proves nothing
        self.began = began
        self.outcome: Outcome | None = None  # as `judge` found it
        self.seconds: float | None = None  # to open for, as the callee named it


class Probe(Call):
    """The token of a trial call: a slot on lease until `expires`."""

    __slots__ = ("expires",)

    def __init__(self, generation: object, began: float, expires: float) -> None:
        super().__init__(generation, began)
        self.expires = expires


def asks(errors: Errors) -> TypeGuard[Predicate]:
    """Whether `errors` is a predicate: code of the user's, which must not run under the lock."""
    return not isinstance(errors, (type, tuple))


def outcome(exc: BaseException | None, on: Errors, ignore: Errors) -> Outcome:
    """What a call that ended with `exc` counts as, before a predicate is asked."""
    if exc is None:
        return Outcome.SUCCESS
    if isinstance(exc, Rejected) or not isinstance(exc, on if isinstance(on, (type, tuple)) else Exception):
        return Outcome.NEITHER
    return Outcome.NEITHER if isinstance(ignore, (type, tuple)) and isinstance(exc, ignore) else Outcome.FAILURE


def judged(exc: BaseException, on: Errors, ignore: Errors) -> Outcome:
    """What it counts as when the predicates among `on` and `ignore` are asked too: without the lock."""
    found = outcome(exc, on, ignore)
    if found is Outcome.NEITHER:
        return found
    failed = not asks(on) or says(on, exc, otherwise=True)
    ignored = asks(ignore) and says(ignore, exc, otherwise=False)
    return found if failed and not ignored else Outcome.NEITHER


def says(predicate: Predicate, value: object, *, otherwise: bool) -> bool:
    """The answer of a predicate; `otherwise` if it raises, or answers what is neither true nor false."""
    return events.ask(bool, events.ask(predicate, value, otherwise=otherwise), otherwise=otherwise)


def named(open_for: OpenFor, value: object) -> float | None:
    """Seconds that `open_for` reads from `value`; None for none, for those past, and for nonsense, which is logged."""
    return events.ask(_named, open_for, value, otherwise=None)


def _named(open_for: OpenFor, value: object) -> float | None:
    seconds = open_for(value)
    if isinstance(seconds, timedelta):
        seconds = seconds.total_seconds()
    return None if seconds is None or seconds <= 0 else checks.seconds("what open_for returns", seconds)
