"""A turn that is taken first and paid for later: given back, or at what the call turned out to cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seawall.core import checks, events
from seawall.core.protocol import Token

if TYPE_CHECKING:
    from seawall.policies.rate_limiter.limiter import RateLimiter


class Reservation:
    """A turn that was taken by `RateLimiter.reserve`: use it, give it back, or say what it really cost. Once.

    Dropped without a word, it has been used.
    """

    __slots__ = ("_at", "_limiter", "_settled", "cost")

    def __init__(self, limiter: RateLimiter, cost: int, at: float) -> None:
        self.cost = cost
        self._limiter = limiter
        self._at = at
        self._settled = False

    def refund(self) -> None:
        """It was not used: whoever waits moves up."""
        self.settle(0)

    def settle(self, actual: int) -> None:
        """It cost `actual`: the rest goes back, and what is missing is charged, so that others wait the longer.

        Nobody may start who could not have started had it cost so much from the beginning, so what comes back late
        may be worth less: a turn held while the bucket overflowed, or from a window that is over, is worth nothing.
        """
        if checks.count("actual", actual, least=0) > 10**12:
            raise ValueError(f"actual must be at most 1e12, got {actual!r}")
        if not self._settle(actual):
            raise RuntimeError("this reservation is settled already; each one ends once")
        events.deliver()

    def _settle(self, actual: int) -> bool:
        with self._limiter._lock:
            if self._settled:
                return False
            self._settled = True
            self._limiter._settle(self._at, self.cost, actual)
            return True

    def __del__(self) -> None:
        if not self._settled:
            self._settle(self.cost)

    def __repr__(self) -> str:
        return f"<Reservation of {self.cost} at {self._limiter!r}>"


class Reserving:
    """The limiter as a guard whose token is a reservation."""

    def __init__(self, limiter: RateLimiter, cost: int) -> None:
        self._limiter = limiter
        self._cost = limiter.check_cost(checks.count("cost", cost))

    def enter(self, now: float) -> Token:
        """Take a turn, or queue for one, or raise `RateLimitedError`."""
        return self._limiter._ask(now, self._cost, reserving=True)

    def exit(self, token: Token, now: float, exc: BaseException | None) -> None:
        """Interrupted before the caller could have it: give it back."""
        assert isinstance(token, Reservation)
        token._settle(0)
