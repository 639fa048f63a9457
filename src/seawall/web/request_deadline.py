"""The deadline of one request: what its headers say, or the application's own limit, whichever is sooner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from seawall.core import ambient
from seawall.core.protocol import Guard, SharedExpiry, Token
from seawall.policies.deadline import Deadline, DeadlinePassedError


class Limited(Protocol):
    """A request that knows how long its client waits."""

    seconds: float


class RequestDeadline:
    """Chooses the deadline of each request, the one argument of the guarded function; `policy` counts them all."""

    issues_deadlines = True

    def __init__(self, policy: Deadline) -> None:
        self.policy = policy

    def guard_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Guard:
        """The deadline of this request."""
        request: Limited = args[0]
        return Seconds(self.policy, request.seconds)


class Seconds:
    """`Deadline` with seconds of its own. A request whose client waits no more does not begin."""

    __slots__ = ("policy", "seconds")
    issues_deadlines = True

    def __init__(self, policy: Deadline, seconds: float) -> None:
        self.policy = policy
        self.seconds = seconds

    def enter(self, now: float) -> SharedExpiry:
        """The deadline of one request, or `DeadlinePassedError`."""
        if self.seconds <= 0 or ambient.deadline.get() <= now:
            raise self.policy._refused(DeadlinePassedError(self.policy.name), now)
        return SharedExpiry(self.seconds, now + self.seconds)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """The request ended."""
        self.policy.exit(token, now, exc)
