"""Calls that cost more than one: a view of a policy through which every call takes several places or turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar

from seawall.core import checks
from seawall.core.decorate import decorate
from seawall.core.gate import Row
from seawall.core.protocol import Token
from seawall.core.scope import Permit, Scope

P = ParamSpec("P")
T = TypeVar("T")
Cost = int | Callable[..., int]


class Costly(Protocol):
    """A policy whose calls may cost more than one."""

    name: str

    def check_cost(self, cost: int) -> int:
        """`cost`, or ValueError if no call could ever pay it."""

    def enter_at(self, now: float, cost: int) -> Token:
        """`enter` for a call that costs `cost`."""

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """The call ended."""


class AtCost:
    """`policy`, at a fixed cost a call. Decorates functions, and guards blocks through `scope()`."""

    def __init__(self, policy: Costly, cost: int) -> None:
        self.policy = policy
        self.cost = policy.check_cost(checks.count("cost", cost))
        self.judges = bool(getattr(policy, "judges", False))

    def enter(self, now: float) -> Token:
        """Let the call in, at its cost."""
        return self.policy.enter_at(now, self.cost)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """The call ended."""
        self.policy.exit(token, now, exc)

    def judge(self, token: Token, result: object, exc: BaseException | None) -> None:
        """Let the policy look at the outcome."""
        self.policy.judge(token, result, exc)  # type: ignore[attr-defined]

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """`fn` behind the policy, each call at this cost."""
        return decorate(fn, (self,))

    def scope(self) -> Scope:
        """Guard one block at this cost."""
        return Scope(Row((self,)))

    def admit(self) -> Permit:
        """Let one call in by hand at this cost."""
        return Permit(Row((self,)))

    def __repr__(self) -> str:
        return f"<{self.policy!r} at {self.cost} a call>"


class CostPerCall:
    """`policy`, at a cost that a function reckons from a call's arguments."""

    def __init__(self, policy: Costly, cost: Callable[..., int]) -> None:
        self.policy = policy
        self._cost = cost
        self.judges = bool(getattr(policy, "judges", False))

    def guard_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AtCost:
        """The policy at the cost of the call with these arguments."""
        return AtCost(self.policy, self._cost(*args, **kwargs))

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """`fn` behind the policy, each call at its own cost."""
        return decorate(fn, (self,))

    def __repr__(self) -> str:
        return f"<{self.policy!r} at a cost per call>"


def costing(policy: Costly, cost: Cost) -> AtCost | CostPerCall:
    """A view of `policy` at `cost`: a number, or a function of the call's arguments."""
    return CostPerCall(policy, cost) if callable(cost) else AtCost(policy, cost)
