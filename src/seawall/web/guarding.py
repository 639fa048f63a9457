"""Guards around what is no function: a route, an answer that streams, a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from seawall.core.decorate import Policy, rows
from seawall.core.gate import Row
from seawall.core.protocol import Around, AroundPerCall, Guard, GuardPerCall, Token
from seawall.core.scope import Scope


class Guards:
    """Checked guards, outermost first, that choose by a request where they choose per call."""

    def __init__(self, policies: Iterable[Policy]) -> None:
        self.policies = checked(policies)
        self._rows: list[Row] = [part for part in rows(self.policies) if isinstance(part, Row)]

    def scope(self, request: object) -> Scope:
        """Guard one block of one request."""
        return Scope(*[row.for_call((request,), {}) for row in self._rows])


class HeldGuards:
    """Checked guards, outermost first, that one place enters and another leaves: none of them may set a deadline."""

    def __init__(self, policies: Iterable[Policy]) -> None:
        guards = checked(policies)
        for guard in guards:
            if getattr(guard, "issues_deadlines", False):
                raise TypeError(f"{type(guard).__name__} can't hold until an answer is sent: give a timeout instead")
        self.members = guards
        self._row = Row(guards)  # type: ignore[arg-type]

    async def enter(self, request: object) -> Held:
        """Let one request in; waits where a guard says so."""
        held = Held(self._row.for_call((request,), {}))
        await held.row.enter(held.tokens)
        return held

    def enter_sync(self, request: object) -> Held:
        """`enter` for plain functions."""
        held = Held(self._row.for_call((request,), {}))
        held.row.enter_sync(held.tokens)
        return held


_NOBODY = Row(())


class Held:
    """Guards that a call has entered, and leaves once. One that is dropped counts as cancelled."""

    __slots__ = ("__weakref__", "row", "tokens")

    def __init__(self, row: Row) -> None:
        self.row = row
        self.tokens: list[Token] = []

    def leave(self, exc: BaseException | None = None, result: object = None) -> BaseException | None:
        """The call ended with `exc`, or well with `result`; what to raise, as the guards see it."""
        tokens, self.tokens = self.tokens, []
        row, self.row = self.row, _NOBODY  # whose policies per key nobody holds any longer
        return row.leave(tokens, exc, result) if tokens else exc

    def fail(self, exc: BaseException) -> None:
        """The call ended with `exc`: raise what a guard puts in its place, return where it stays as it is."""
        outcome = self.leave(exc)
        try:
            if outcome is not None and outcome is not exc:
                raise outcome from exc
        finally:
            del outcome, exc  # or this frame, its traceback and the error would be a cycle

    def __del__(self) -> None:
        if self.tokens:
            self.leave(asyncio.CancelledError())


def checked(policies: Iterable[Policy]) -> tuple[Policy, ...]:
    """The guards; TypeError for what is none, a policy that runs the call itself included."""
    if not isinstance(policies, Iterable):
        raise TypeError(f"policies must be several guards, got {policies!r}: put it into a list")
    found = tuple(policies)
    for policy in found:
        if isinstance(policy, (Around, AroundPerCall)):
            raise TypeError(
                f"{type(policy).__name__} runs calls anew or not at all, which a request's answer can't take: "
                "put it on the function that does the work"
            )
        if isinstance(policy, type) or not isinstance(policy, (Guard, GuardPerCall)):
            raise TypeError(f"policies must be guards such as Bulkhead(...), got {policy!r}")
    return found
