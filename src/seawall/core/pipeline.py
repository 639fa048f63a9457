"""Several policies as one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from seawall.core import checks
from seawall.core.decorate import Policy, check_policy, decorate, rows
from seawall.core.gate import Row
from seawall.core.policy import admit
from seawall.core.protocol import Guard
from seawall.core.scope import Permit, Scope

P = ParamSpec("P")
T = TypeVar("T")


class Pipeline:
    """Policies around a call, outermost first, as stacked decorators read from top to bottom.

    `Pipeline(a, b, c)(fn)` and `@a @b @c` are the same, and cost the same. It can guard any number of functions;
    they share its policies' state.

    Args:
        policies: guards and arounds, outermost first.
        name: labels the spans of its calls; each function's own name unless told.

    Examples:
        >>> from seawall import Bulkhead, CircuitBreaker
        >>> guard = Pipeline(CircuitBreaker("payments"), Bulkhead("payments", max_concurrent=8))
        >>> guard.call_sync(len, "four")
        4
    """

    def __init__(self, *policies: Policy, name: str | None = None) -> None:
        for policy in policies:
            check_policy(policy)
        self.policies = policies
        self.name = name if name is None else checks.name("Pipeline", name)

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """`fn` behind this pipeline."""
        return decorate(fn, self.policies, self.name)

    async def call(self, fn: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `fn` once behind this pipeline. To call it often, decorate it once: that is cheaper."""
        return await decorate(fn, self.policies, self.name)(*args, **kwargs)

    def call_sync(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the plain function `fn` once behind this pipeline."""
        return decorate(fn, self.policies, self.name)(*args, **kwargs)

    def scope(self) -> Scope:
        """Guard one block. TypeError if a policy needs to run the call itself."""
        return Scope(*self._rows())

    def admit(self) -> Permit:
        """Let one call in by hand, without waiting, and say later how it ended."""
        return admit(tuple(guard for row in self._rows() for guard in row.guards))

    def _rows(self) -> list[Row]:
        found = []
        for part in rows(self.policies):
            if not isinstance(part, Row):
                raise TypeError(f"{type(part).__name__} runs the call itself, so it can't guard a block")
            if part.per_call:
                culprit = next(member for member in part.members if not isinstance(member, Guard))
                raise TypeError(f"{type(culprit).__name__} chooses by a call's arguments, which a block has not")
            found.append(part)
        return found

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(repr, self.policies))})"
