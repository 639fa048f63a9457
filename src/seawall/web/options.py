"""The settings of a middleware, as the adapters for frameworks take them and hand them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

from seawall.core.ambient import Priority
from seawall.core.decorate import Policy
from seawall.web.answers import Answers, Mapped


class Options(TypedDict, total=False):
    """What `SeawallMiddleware` explains."""

    policies: Iterable[Policy]
    timeout: float | None
    trust_deadlines: bool
    priority: Callable[[Any], Priority] | None
    answers: Answers | Mapping[type[Exception], Mapped] | None
    failures_from: int
    exempt: Iterable[str]
    name: str
