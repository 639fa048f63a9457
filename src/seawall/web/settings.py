"""What the middlewares of all protocols have in common: their settings, and what a request is behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from seawall.core import checks
from seawall.core.ambient import Priority
from seawall.core.decorate import Policy
from seawall.core.pipeline import Pipeline
from seawall.policies.deadline import Deadline
from seawall.web.answers import Answers, Mapped
from seawall.web.guarding import checked
from seawall.web.intake import seconds_left
from seawall.web.request_deadline import RequestDeadline

P = ParamSpec("P")
T = TypeVar("T")
LONGEST = 1e9  # seconds: a deadline that never comes
PROBES = ("/livez", "/readyz")


class FailedResponseError(Exception):
    """The application answered with a server error: what the policies around it are told. Nobody else sees it."""


class Settings:
    """Checked settings of a middleware."""

    def __init__(
        self,
        *,
        policies: Iterable[Policy] = (),
        timeout: float | None = None,
        trust_deadlines: bool = True,
        priority: Callable[[Any], Priority] | None = None,
        answers: Answers | Mapping[type[Exception], Mapped] | None = None,
        failures_from: int = 500,
        exempt: Iterable[str] = PROBES,
        name: str = "http.server",
    ) -> None:
        self.policies = checked(policies)
        self.timeout = None if timeout is None else checks.seconds("timeout", timeout)
        if priority is not None:
            checks.function("priority", priority)
        self.trust_deadlines = trust_deadlines
        self.priority = priority
        self.answers = answers if isinstance(answers, Answers) else Answers(answers)
        self.inherits_answers = answers is None  # from a middleware around this one, if there is any
        if type(failures_from) is not int or not 400 <= failures_from <= 600:
            raise ValueError(f"failures_from must be a status from 400 to 600, got {failures_from!r}")
        self.failures_from = failures_from
        if isinstance(exempt, str):
            raise TypeError(f"exempt must hold paths, got the string {exempt!r}")
        self.exempt = frozenset(exempt)
        for path in self.exempt:
            if not str(path).startswith("/"):
                raise ValueError(f"exempt must hold paths, which begin with '/', got {path!r}")
        self.name = checks.name("middleware", name)
        self.deadline = Deadline(name, LONGEST if self.timeout is None else self.timeout)

    def guarded(self, run: Callable[P, T]) -> Callable[P, T]:
        """`run`, whose one argument is a request, behind the policies."""
        return Pipeline(*self.policies, name=self.name)(run)

    def timed(self, run: Callable[P, T]) -> Callable[P, T]:
        """The same, in the time that the request says in `seconds`."""
        return Pipeline(RequestDeadline(self.deadline), *self.policies, name=self.name)(run)

    def seconds(self, found: Iterable[tuple[str, str]]) -> float | None:
        """Seconds for a request with these deadline headers, or None for all the time in the world."""
        said = seconds_left(found, time.time()) if self.trust_deadlines else None
        return self.timeout if said is None else min(said, self.timeout or LONGEST)
