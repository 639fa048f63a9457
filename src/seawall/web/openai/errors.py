"""What a client hears when it gets no answer, in the shape that OpenAI's clients read. Pure.

`{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`, with the status and the headers of `Answers`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from seawall.engine import (
    DeadlineUnmeetableError,
    DeploymentClosedError,
    EngineClosedError,
    RebuildError,
    ReplicasClosedError,
    SupervisedClosedError,
)
from seawall.inference.errors import (
    BackendClosedError,
    BatchQueueFullError,
    InvalidSettingError,
    ModelError,
    PromptError,
    PromptTooLongError,
    RunDeadlineError,
    RuntimeDeviceError,
    RuntimeExhaustedError,
    TextTooLongError,
)
from seawall.web.answers import JITTER, Answer, Answers, Mapped

INVALID = "invalid_request_error"
_TYPES = {401: INVALID, 429: "rate_limit_exceeded", 503: "server_overloaded", 504: "timeout"}
_SOONEST = 0.5  # s, the clients' own first pause: many are told of the one place that is free next, and few retry twice


class RequestError(Exception):
    """A request that cannot be answered as it is: its client has to send another one.

    Attributes:
        status: of HTTP.
        param: the parameter at fault, as in "messages[0].content", or None.
        code: a word for programs.
        headers: further ones.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = "invalid_value",
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Envelope(Answer):
    """An answer in OpenAI's shape. `param` is the parameter at fault."""

    param: str | None = None

    def error(self) -> dict[str, Any]:
        """The content."""
        kind = _TYPES.get(self.status, INVALID if self.status < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def problem(self) -> bytes:
        """The body."""
        return json.dumps(self.error()).encode()


class OpenAIAnswers(Answers):
    """`Answers` in OpenAI's shape; errors of models and of requests among them, and a plain 500 for all others.

    Examples:
        >>> from seawall.core.places import BulkheadFullError
        >>> answer = OpenAIAnswers().answer_to(BulkheadFullError("engine", retry_after=2.0))
        >>> answer.status, answer.error()["error"]["type"], answer.error()["error"]["code"]
        (503, 'server_overloaded', 'overloaded')
    """

    def __init__(
        self, extra: Mapping[type[Exception], Mapped] | None = None, *, rng: random.Random | None = None
    ) -> None:
        super().__init__({**_OURS, **(extra or {})}, rng=rng)

    def answer_to(self, error: BaseException) -> Envelope | None:
        """The answer to an error; None for what is no `Exception`, such as a cancellation."""
        if not isinstance(error, Exception):
            return None
        found = super().answer_to(error) or Answer(500, "internal_error", "the server failed to answer")
        if isinstance(found, Envelope):
            return found
        return Envelope(**{one.name: getattr(found, one.name) for one in fields(Answer)})

    def headers(self, answer: Answer) -> dict[str, str]:
        """All headers of an answer but its length."""
        headers = super().headers(answer)
        if headers["content-type"] == "application/problem+json":
            headers["content-type"] = "application/json"
        if isinstance(answer, Envelope) and answer.retry_after is not None and answer.retry_after < 1:
            jittered = max(answer.retry_after, _SOONEST) * (1 + JITTER * self._rng.random())
            headers["retry-after-ms"] = str(math.ceil(1000 * jittered))
        return headers


def _request(error: Exception) -> Answer:
    assert isinstance(error, RequestError)
    return Envelope(error.status, error.code or "", str(error), param=error.param, headers=error.headers)


def _invalid(error: Exception) -> Answer:
    return Envelope(400, "invalid_value", str(error))


def _too_long(error: Exception) -> Answer:
    return Envelope(400, "context_length_exceeded", str(error))


def _unavailable(code: str) -> Any:
    def write(error: Exception) -> Answer:
        return Envelope(503, code, "the model cannot answer now", retry_after=1.0)

    return write


def _full(error: Exception) -> Answer:
    assert isinstance(error, BatchQueueFullError)
    return Envelope(503, "overloaded", str(error), retry_after=error.retry_after or 1.0)


def _late(error: Exception) -> Answer:
    return Envelope(504, "deadline_exceeded", str(error))


def _unmeetable(error: Exception) -> Answer:
    assert isinstance(error, DeadlineUnmeetableError)
    if error.retry_after is None:  # not even alone: so little time is never enough
        return Envelope(504, "deadline_exceeded", str(error), should_retry=False)
    return Envelope(503, "overloaded", str(error), retry_after=error.retry_after)


def _failed(error: Exception) -> Answer:
    return Envelope(500, "model_error", f"the model failed: {type(error).__name__}")


_GONE = (
    BackendClosedError,
    DeploymentClosedError,
    EngineClosedError,
    RebuildError,
    ReplicasClosedError,
    RuntimeDeviceError,
    SupervisedClosedError,
)
_OURS: Mapping[type[Exception], Mapped] = {
    RequestError: _request,
    PromptTooLongError: _too_long,
    TextTooLongError: _too_long,
    PromptError: _invalid,
    InvalidSettingError: _invalid,
    RunDeadlineError: _late,
    BatchQueueFullError: _full,
    DeadlineUnmeetableError: _unmeetable,
    RuntimeExhaustedError: _unavailable("exhausted"),
    **dict.fromkeys(_GONE, _unavailable("unavailable")),
    ModelError: _failed,
}
