"""Which HTTP answer an error of a policy deserves. Pure: an exception in; status, headers and a problem out.

Problems are RFC 9457 documents. `RateLimit` and `RateLimit-Policy` follow draft-ietf-httpapi-ratelimit-headers-11.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import NamedTuple, TypeAlias

from seawall.core.errors import CallTimeoutError, Rejected
from seawall.core.places import BulkheadFullError
from seawall.policies.circuit_breaker import CircuitOpenError
from seawall.policies.deadline import DeadlinePassedError
from seawall.policies.load_shedder import LoadShedError
from seawall.policies.rate_limiter import RateLimitedError
from seawall.web.bodies import BodyTooLargeError

_PROBLEMS = "https://iana.org/assignments/http-problem-types#"
QUOTA_EXCEEDED = f"{_PROBLEMS}quota-exceeded"
REDUCED_CAPACITY = f"{_PROBLEMS}temporary-reduced-capacity"
JITTER = 0.25  # share added to Retry-After at random, so that those who were refused together don't return together
_STATUSES = frozenset(status.value for status in HTTPStatus)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client hears instead of a result.

    Attributes:
        status: of HTTP.
        code: a word for programs, such as "circuit_open".
        detail: a sentence for people.
        type: URI of the problem's type.
        policy: name of the policy that refused, or None.
        retry_after: seconds after which a new call has a chance. None says nothing; nobody waits for a 504.
        should_retry: what `x-should-retry` says to clients that know it, or None to say nothing.
        headers: further ones.
    """

    status: int
    code: str
    detail: str
    type: str = "about:blank"
    policy: str | None = None
    retry_after: float | None = None
    should_retry: bool | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The status in words."""
        return phrase(self.status)

    def problem(self) -> bytes:
        """The body: a problem document of RFC 9457."""
        content: dict[str, object] = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.policy is not None and self.type != "about:blank":
            content["violated-policies"] = [self.policy]
        return json.dumps(content).encode()


class Reply(NamedTuple):
    """An answer as it is sent. The headers' names are lower case, and hold the body's length."""

    status: int
    headers: dict[str, str]
    body: bytes


Write: TypeAlias = "Callable[[Exception], Answer]"
Mapped: TypeAlias = "int | Write"


class Answers:
    """The answers to errors, by the most special class that is known; anything else is none of our business.

    Args:
        extra: further ones, or others than the usual: a status, or a function of the exception that gives an `Answer`.
        unknown_wait: Retry-After of a refusal where nobody knows when there will be room, seconds.
        longest_wait: the most that Retry-After says, seconds. Many clients give up above 120.
        rng: for the jitter of Retry-After; give a seeded one to repeat a run.

    Examples:
        >>> answer = Answers().answer_to(CircuitOpenError("payments", retry_after=3.0))
        >>> answer.status, answer.code
        (503, 'circuit_open')
    """

    def __init__(
        self,
        extra: Mapping[type[Exception], Mapped] | None = None,
        *,
        unknown_wait: float = 1.0,
        longest_wait: float = 120.0,
        rng: random.Random | None = None,
    ) -> None:
        if not 0 < unknown_wait <= longest_wait < math.inf:
            raise ValueError(
                f"unknown_wait must be above 0 and at most longest_wait, got {unknown_wait!r} and {longest_wait!r}"
            )
        if not isinstance(extra, Mapping | None):
            raise TypeError(f"answers must be a mapping of classes of exceptions, got {extra!r}")
        self._known: dict[type[Exception], Write] = dict(_USUAL)
        for kind, mapped in (extra or {}).items():
            self._known[kind] = _checked(kind, mapped)
        self.unknown_wait = unknown_wait
        self.longest_wait = longest_wait
        self._rng = rng or random.Random()

    @property
    def kinds(self) -> tuple[type[Exception], ...]:
        """The classes of exceptions that have an answer; their subclasses have it too."""
        return tuple(self._known)

    def answer_to(self, error: BaseException) -> Answer | None:
        """The answer to an error, or None where the application has to see to it."""
        for kind in type(error).__mro__:
            write = self._known.get(kind)
            if write is not None and isinstance(error, Exception):
                answer = write(error)
                if not isinstance(answer, Answer):
                    raise TypeError(f"the answer to {kind.__name__} must be an Answer, its function gave {answer!r}")
                if isinstance(error, Rejected) and answer.retry_after is None and answer.should_retry is not False:
                    answer = replace(answer, retry_after=self.unknown_wait)
                return answer
        return None

    def reply(self, answer: Answer) -> Reply:
        """What to send for an answer."""
        body = answer.problem()
        return Reply(answer.status, {**self.headers(answer), "content-length": str(len(body))}, body)

    def headers(self, answer: Answer) -> dict[str, str]:
        """All headers of an answer but its length."""
        headers = {"content-type": "application/problem+json", "cache-control": "no-store", **answer.headers}
        if answer.retry_after is not None:
            headers["retry-after"] = str(self.wait(answer.retry_after))
        if answer.should_retry is not None:
            headers["x-should-retry"] = "true" if answer.should_retry else "false"
        return headers

    def wait(self, seconds: float) -> int:
        """Whole seconds for Retry-After: never earlier than `seconds` but for the cap, and jittered."""
        jittered = seconds * (1 + JITTER * self._rng.random())
        return max(1, math.ceil(min(jittered, self.longest_wait)))


def _checked(kind: object, mapped: Mapped) -> Write:
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise TypeError(f"answers are given to classes of exceptions, got {kind!r}")
    if callable(mapped):
        return mapped
    if type(mapped) is not int or not 400 <= mapped <= 599:
        raise ValueError(f"the answer to {kind.__name__} must be a function or a status of 400 to 599, got {mapped!r}")
    return lambda error: Answer(mapped, "error", phrase(mapped), retry_after=_retry_after(error))


def phrase(status: int) -> str:
    """A status in words."""
    return HTTPStatus(status).phrase if status in _STATUSES else "Error"


def _retry_after(error: Exception) -> float | None:
    seconds = getattr(error, "retry_after", None)
    return seconds if isinstance(seconds, (int, float)) and 0 <= seconds < math.inf else None


def _reduced(code: str) -> Write:
    def write(error: Exception) -> Answer:
        policy = getattr(error, "policy", None)
        return Answer(503, code, str(error), REDUCED_CAPACITY, policy, _retry_after(error))

    return write


def _limited(error: Exception) -> Answer:
    assert isinstance(error, RateLimitedError)
    wait = _retry_after(error)
    headers = {}
    if error.rate is not None and error.per is not None:
        quota, window = whole_quota(error.rate, error.per)
        headers["ratelimit-policy"] = f"{sf_string(error.policy)};q={quota};w={window}"
        if wait is not None:
            headers["ratelimit"] = f"{sf_string(error.policy)};r=0;t={max(1, math.ceil(wait))}"
    never = None if wait is not None else False  # it costs more than the limit, now and ever
    return Answer(429, "rate_limit_exceeded", str(error), QUOTA_EXCEEDED, error.policy, wait, never, headers)


def _late(error: Exception) -> Answer:
    return Answer(504, "deadline_exceeded", str(error))


def _past(error: Exception) -> Answer:
    return Answer(504, "deadline_exceeded", str(error), should_retry=False)


def _too_large(error: Exception) -> Answer:
    return Answer(413, "body_too_large", str(error), should_retry=False)


def whole_quota(rate: float, per: float) -> tuple[int, int]:
    """A rate as whole calls per whole seconds, which is all that the header can say: never more than the rate.

    Examples:
        >>> whole_quota(10, 1), whole_quota(0.5, 1), whole_quota(100, 0.5)
        ((10, 1), (1, 2), (200, 1))
    """
    window = max(1, math.ceil(per), math.ceil(per / rate))
    return max(1, math.floor(rate * window / per)), window


def sf_string(text: str) -> str:
    """A string of Structured Fields (RFC 9651): printable ASCII in quotes.

    Examples:
        >>> sf_string("per tenant\N{BULLET}")
        '"per tenant?"'
    """
    printable = "".join(letter if " " <= letter <= "~" else "?" for letter in text)
    return '"' + printable.replace("\\", "\\\\").replace('"', '\\"') + '"'


_USUAL: Mapping[type[Exception], Write] = {
    RateLimitedError: _limited,
    CircuitOpenError: _reduced("circuit_open"),
    BulkheadFullError: _reduced("overloaded"),
    LoadShedError: _reduced("overloaded"),
    Rejected: _reduced("overloaded"),
    DeadlinePassedError: _past,
    CallTimeoutError: _late,
    BodyTooLargeError: _too_large,
}
