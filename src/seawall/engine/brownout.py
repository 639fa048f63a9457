"""What an engine can spare while an error budget burns: steps for the ladder of a `BrownOut`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar, cast

from seawall.core import checks
from seawall.slo.steps import Step

T = TypeVar("T")


class Shorter(Step):
    """Answers have `max_tokens` tokens at most while it holds. For who asked for fewer nothing changes.

    Examples:
        >>> from seawall.engine import AnswerSettings
        >>> Shorter(64).adjust(AnswerSettings(max_tokens=256)).max_tokens
        64
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = checks.count("max_tokens", max_tokens)

    def adjust(self, value: T) -> T:
        """The settings of an answer, shortened."""
        settings = cast("Any", value)
        return value if settings.max_tokens <= self.max_tokens else replace(settings, max_tokens=self.max_tokens)

    def __repr__(self) -> str:
        return f"Shorter({self.max_tokens})"
