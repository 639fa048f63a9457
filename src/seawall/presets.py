"""Ready-made pipelines for the two things most services call: somebody's HTTP API, and a model."""

from __future__ import annotations

import time
from datetime import UTC
from email.utils import parsedate_to_datetime

from seawall.core.errors import CallTimeoutError
from seawall.core.pipeline import Pipeline
from seawall.policies.bulkhead import Bulkhead
from seawall.policies.circuit_breaker import CircuitBreaker
from seawall.policies.deadline import Deadline
from seawall.policies.retry import Budget, Retry
from seawall.policies.retry_budget import RetryBudget
from seawall.policies.timeout import Timeout
from seawall.slo.objective import SLO

_COME_BACK = frozenset({429, 502, 503, 504})  # the request was not served, and a later one may be


def http_client(
    name: str,
    *,
    on: type[BaseException] | tuple[type[BaseException], ...] = (ConnectionError, TimeoutError),
    attempts: int = 3,
    timeout: float | None = 5.0,
    deadline: float = 15.0,
    max_concurrent: int = 32,
    max_queued: int = 64,
    budget: Budget | None = None,
) -> Pipeline:
    """For calls to a flaky HTTP service: deadline, retry with a budget, bulkhead, breaker, timeout.

    Responses that say "not now" (429, 502, 503, 504) are retried too, and any 5xx counts against the breaker, whether
    the client returns or raises them; a `Retry-After` is believed. It reads `status_code` or `status` and `headers`, so
    httpx, requests and aiohttp need no adapter. Give it only calls that are safe to repeat, or `attempts=1`. A plain
    function can't be cancelled: guard it with `timeout=None`, and let its client time out.

    Args:
        name: of the pipeline and its policies.
        on: what the client raises for a passing fault, such as `httpx.TransportError`.
        attempts: how often a call is made at most.
        timeout: seconds of one attempt; None leaves that to the client.
        deadline: seconds of all attempts, pauses and waits together.
        max_concurrent: attempts in flight at once.
        max_queued: attempts that may wait for a place.
        budget: to share with other callers of the same service; one of its own unless told.

    Examples:
        >>> print(*(type(policy).__name__ for policy in http_client("bank").policies))
        Deadline Retry Bulkhead CircuitBreaker Timeout
    """
    classes = on if isinstance(on, tuple) else (on,)
    return Pipeline(
        Deadline(name, deadline),
        Retry(
            name,
            on=lambda error: isinstance(error, (*classes, CallTimeoutError)) or status_of(error) in _COME_BACK,
            on_result=lambda response: status_of(response) in _COME_BACK,
            attempts=attempts,
            retry_after=retry_after_of,
            budget=RetryBudget(name) if budget is None else budget,
        ),
        Bulkhead(name, max_concurrent=max_concurrent, max_queued=max_queued, max_wait=timeout or deadline),
        CircuitBreaker(
            name,
            on=lambda error: isinstance(error, (*classes, CallTimeoutError)) or (status_of(error) or 0) >= 500,
            on_result=lambda response: (status_of(response) or 0) >= 500,
        ),
        *(() if timeout is None else (Timeout(name, timeout),)),
        name=name,
    )


def model(
    name: str,
    *,
    target: float = 0.99,
    max_concurrent: int = 4,
    max_queued: int = 32,
    max_wait: float = 30.0,
    timeout: float = 30.0,
    ignore: type[BaseException] | tuple[type[BaseException], ...] = ValueError,
) -> Pipeline:
    """For a model, remote or in the process, whole answers and streams: SLO, bulkhead, breaker, timeout.

    No retry: a model that is slow or full gets slower by being asked twice. On a stream the timeout holds for each
    piece, and the place is held until the last.

    Args:
        name: of the pipeline and its policies.
        target: share of answers that must be good.
        max_concurrent: answers in progress at once.
        max_queued: calls that may wait.
        max_wait: seconds they may wait.
        timeout: seconds of one answer, or of one piece of a stream.
        ignore: what says nothing about the model, such as a prompt that is too long.

    Examples:
        >>> print(*(type(policy).__name__ for policy in model("smollm2").policies))
        SLO Bulkhead CircuitBreaker Timeout
    """
    return Pipeline(
        SLO(name, target=target, ignore=ignore),
        Bulkhead(name, max_concurrent=max_concurrent, max_queued=max_queued, max_wait=max_wait),
        CircuitBreaker(name, minimum_calls=5, ignore=ignore),
        Timeout(name, timeout),
        name=name,
    )


def status_of(outcome: object) -> int | None:
    """The HTTP status of a response, or of the response that an error carries; None where there is none.

    Examples:
        >>> from types import SimpleNamespace
        >>> status_of(SimpleNamespace(status_code=503)), status_of(OSError())
        (503, None)
    """
    for holder in (outcome, getattr(outcome, "response", None)):
        for attribute in ("status_code", "status"):
            status = getattr(holder, attribute, None)
            if isinstance(status, int) and not isinstance(status, bool):
                return int(status)
    return None


def retry_after_of(outcome: object) -> float | None:
    """The seconds that a response's `Retry-After` names, as a number or a date; None without a readable one.

    Examples:
        >>> from types import SimpleNamespace
        >>> retry_after_of(SimpleNamespace(headers={"Retry-After": "7"}))
        7.0
    """
    for holder in (outcome, getattr(outcome, "response", None)):
        headers = getattr(holder, "headers", None)
        get = getattr(headers, "get", None)
        value = (get("retry-after") or get("Retry-After")) if callable(get) else None
        if isinstance(value, str):
            return _seconds(value.strip())
    return None


def _seconds(value: str) -> float | None:
    if value.isascii() and value.isdigit():  # delta-seconds of RFC 9110, 10.2.3
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:  # "-0000", or no zone at all, as in asctime's: HTTP knows only UTC
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - time.time())  # the date is the wall clock's
    except (ValueError, TypeError, OverflowError):
        return None
