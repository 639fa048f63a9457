"""An error that a framework catches itself, before it reaches the middleware, gets the same answer all the same.

The middleware hangs its exchange under `KEY` in the ASGI scope, the WSGI environ or the request, and is told of the
error: its policies hear what was raised, not only that a status of 503 went by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from seawall.web.answers import Answers, Reply
from seawall.web.settings import Settings

KEY = "seawall"
_usual = Answers()


class Exchange(Protocol):
    """A request as its middleware sees it."""

    settings: Settings
    error: Exception | None


def answers_for(settings: Settings, around: Exchange | None) -> Answers:
    """A middleware's own answers; or, where it was given none, those of the middleware around it."""
    return settings.answers if around is None or not settings.inherits_answers else around.settings.answers


def answer_caught(holder: Mapping[str, Any], error: Exception, answers: Answers | None = None) -> Reply | None:
    """What to send for an error that was caught in the request of `holder`; None where it has no answer.

    The answers are those of the middleware unless told.

    Examples:
        >>> from seawall import BulkheadFullError
        >>> answer_caught({}, BulkheadFullError("reports")).status
        503
    """
    exchange: Exchange | None = holder.get(KEY)
    if answers is None:
        answers = _usual if exchange is None else exchange.settings.answers
    answer = answers.answer_to(error)
    if answer is None:
        return None
    if exchange is not None:
        exchange.error = error
    return answers.reply(answer)
