"""Which policies stand between an application and the hosts it calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable

from seawall.core import checks, registry
from seawall.core.decorate import Policy
from seawall.core.pipeline import Pipeline
from seawall.policies.bulkhead import Bulkhead
from seawall.policies.circuit_breaker import CircuitBreaker
from seawall.policies.deadline import Deadline, DeadlinePassedError, time_left
from seawall.policies.hedge import Hedge, Quantile
from seawall.policies.keyed import Keyed, KeyedAround
from seawall.policies.retry import Retry
from seawall.policies.retry_budget import RetryBudget
from seawall.policies.timeout import Timeout
from seawall.presets import retry_after_of, status_of
from seawall.web.guarding import HeldGuards
from seawall.web.outgoing.call import by_host
from seawall.web.outgoing.faults import NOT_NOW, is_fault


class HedgePerHost(KeyedAround):
    """A `Hedge` for each host, whose delay may be a `Quantile` of that host's own latencies.

    Examples:
        >>> hedges = HedgePerHost("partners.hedge", lambda host: Hedge(host, delay=Quantile(0.95, initial=0.2)))
    """

    needs_event_loop = True  # as hedges do

    def __init__(self, name: str, factory: Callable[[str], Hedge], *, max_keys: int = 1024) -> None:
        super().__init__(name, factory, key=by_host, max_keys=max_keys)

    def _make(self, key: Hashable) -> object:
        with registry.unlisted():
            hedge = self.factory(key)
        return _one_of(f"what the factory of {self.name!r} makes", hedge, Hedge)  # type: ignore[arg-type]


class HostPolicies:
    """The policies of outgoing calls, for the transports and adapters of HTTP clients; several may share one.

    From the outside in: the deadline, the retry, the hedge, and around each attempt the guards and its timeout. Guards
    hold until an answer's body is closed. The retry sees calls that are repeatable, the hedge those that are safe
    (see `OutgoingCall`); others are made once.

    Args:
        name: labels spans and metrics.
        guards: around each attempt, outermost first: `Keyed` by `by_host` for one per host, or one for all hosts.
        retry: for repeatable calls: a `Retry`, or a `KeyedAround` that makes them.
        hedge: for safe calls, on an event loop: a `Hedge` for all hosts, or a `HedgePerHost`.
        timeout: seconds of one attempt until its answer begins.
        deadline: seconds of all attempts, pauses and waits until the answer begins.
        hand_on: whether to tell hosts how long their caller waits, in the headers of `deadline_headers`.

    Examples:
        >>> policies = HostPolicies("partners", deadline=3.0, guards=[
        ...     Keyed("partners.bulkhead", lambda host: Bulkhead(host, max_concurrent=8), key=by_host),
        ... ])
    """

    def __init__(
        self,
        name: str = "http.client",
        *,
        guards: Iterable[Policy] = (),
        retry: Retry | KeyedAround | None = None,
        hedge: Hedge | HedgePerHost | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
        hand_on: bool = True,
    ) -> None:
        self.name = checks.name("HostPolicies", name)
        self.guards = HeldGuards(guards)
        self.retry = _one_of("retry", retry, Retry, KeyedAround)
        self.hedge = _one_of("hedge", hedge, Hedge, HedgePerHost)
        self.timeout = None if timeout is None else Timeout(name, timeout)
        self.deadline = None if deadline is None else Deadline(name, deadline)
        self.hand_on = hand_on

    def refuse_hedge(self) -> None:
        """TypeError where a client without an event loop was given a hedge."""
        if self.hedge is not None:
            raise TypeError(f"a hedge needs an event loop: give {self.name!r} none, or use an asynchronous client")

    def seconds_left(self) -> float:
        """What the sockets of an attempt that nothing can cancel may take, or `DeadlinePassedError`."""
        left = time_left()
        if left <= 0:
            raise DeadlinePassedError(self.name)
        return min(left, math.inf if self.timeout is None else self.timeout.after)

    def outermost(self) -> Pipeline:
        """What is around all attempts of a call."""
        return Pipeline(*([] if self.deadline is None else [self.deadline]), name=self.name)


def host_policies(
    name: str = "http.client",
    *,
    attempts: int = 3,
    timeout: float = 5.0,
    deadline: float = 15.0,
    max_concurrent: int = 32,
    max_queued: int = 64,
    hedge_after: float | Quantile | None = None,
    failed: Callable[[int], bool] = lambda status: status >= 500,
    max_hosts: int = 1024,
) -> HostPolicies:
    """Policies for calls to any number of hosts, each with a retry budget, a bulkhead and a breaker of its own.

    Args:
        name: labels spans and metrics, which add up all hosts.
        attempts: how often a repeatable call is made at most. Answers 429, 502, 503 and 504 are retried as well as
            errors on the way; a `Retry-After` is believed.
        timeout: seconds of one attempt until its answer begins.
        deadline: seconds of all attempts, pauses and waits until the answer begins.
        max_concurrent: attempts at one host at once, answers that are still being read included.
        max_queued: attempts that may wait for a place.
        hedge_after: seconds, or a `Quantile` of the latencies, after which a safe call is made a second time while the
            first is still under way; never unless told. On an event loop only.
        failed: which statuses count against a host's breaker.
        max_hosts: hosts with policies kept; the least recently used go first.

    Examples:
        >>> policies = host_policies("partners", timeout=2.0, deadline=6.0)
    """

    def retry(host: str) -> Retry:
        return Retry(
            host,
            on=is_fault,
            on_result=lambda answer: status_of(answer) in NOT_NOW,
            attempts=attempts,
            retry_after=retry_after_of,
            budget=RetryBudget(host),
        )

    def hedge(host: str) -> Hedge:
        assert hedge_after is not None
        return Hedge(host, delay=hedge_after, acceptable=lambda answer: (status_of(answer) or 0) not in NOT_NOW)

    def bulkhead(host: str) -> Bulkhead:
        return Bulkhead(host, max_concurrent=max_concurrent, max_queued=max_queued, max_wait=timeout)

    def breaker(host: str) -> CircuitBreaker:
        return CircuitBreaker(host, on=is_fault, on_result=lambda answer: failed(status_of(answer) or 0))

    checks.function("failed", failed)
    return HostPolicies(
        name,
        retry=KeyedAround(f"{name}.retry", retry, key=by_host, max_keys=max_hosts),
        hedge=None if hedge_after is None else HedgePerHost(f"{name}.hedge", hedge, max_keys=max_hosts),
        guards=[
            Keyed(f"{name}.bulkhead", bulkhead, key=by_host, max_keys=max_hosts),
            Keyed(f"{name}.breaker", breaker, key=by_host, max_keys=max_hosts),
        ],
        timeout=timeout,
        deadline=deadline,
    )


def _one_of(setting: str, given: Policy | None, *kinds: type[Policy]) -> Policy | None:
    if given is not None and not isinstance(given, kinds):
        names = " or a ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{setting} must be a {names}, got {given!r}")
    return given
