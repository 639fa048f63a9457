"""OpenAI's API over engines and embedders, as one ASGI application."""

from __future__ import annotations

from seawall.web.openai.body import Limits
from seawall.web.openai.errors import OpenAIAnswers, RequestError
from seawall.web.openai.router import OpenAIRouter

__all__ = ["Limits", "OpenAIAnswers", "OpenAIRouter", "RequestError"]
