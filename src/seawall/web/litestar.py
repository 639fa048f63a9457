"""Litestar: one plugin puts an application behind policies, and answers for those of its handlers.

    app = Litestar(handlers, plugins=[SeawallPlugin(policies=[LoadShedder("front")], timeout=10.0)])

A handler's own policies are decorators below its route: `@get("/report")`, then `@reports`. What answers with a stream
has them as `middleware=[route(reports)]`, which holds them until the last piece is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litestar.middleware import DefineMiddleware
from litestar.plugins import InitPlugin
from litestar.response import Response

from seawall.core.decorate import Policy
from seawall.web.answers import Answers
from seawall.web.asgi import SeawallMiddleware
from seawall.web.caught import answer_caught
from seawall.web.options import Options

if TYPE_CHECKING:
    from typing import Unpack

    from litestar import Request
    from litestar.config.app import AppConfig


_ASGI: Any = SeawallMiddleware  # Litestar has narrower types of its own for ASGI


class SeawallPlugin(InitPlugin):
    """Puts the routes of an application behind a `SeawallMiddleware` with these settings.

    Litestar turns what a handler raises into a 500 of its own, so the errors that have an answer get exception
    handlers, unless the application has its own for them.

    Examples:
        >>> from litestar import Litestar
        >>> from seawall import LoadShedder
        >>> app = Litestar([], plugins=[SeawallPlugin(policies=[LoadShedder("front")], timeout=10.0)])
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        answers = options.get("answers")
        self._answers = answers if isinstance(answers, Answers) else Answers(answers)
        self._middleware = DefineMiddleware(_ASGI, **{**options, "answers": self._answers})

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Called by Litestar."""
        app_config.middleware = [self._middleware, *app_config.middleware]
        handlers = dict(app_config.exception_handlers)
        for kind in self._answers.kinds:
            handlers.setdefault(kind, self._answer)
        app_config.exception_handlers = handlers
        return app_config

    def _answer(self, request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        reply = answer_caught(request.scope, error, self._answers)
        assert reply is not None  # handlers are registered for what has an answer
        headers = {name: value for name, value in reply.headers.items() if not name.startswith("content-")}
        media_type = reply.headers["content-type"]
        return Response(reply.body, status_code=reply.status, headers=headers, media_type=media_type)


def route(*policies: Policy) -> DefineMiddleware:
    """Guards around one handler, router or controller, until its answer is sent; for its `middleware`.

    Examples:
        >>> from litestar import get
        >>> from seawall import Bulkhead
        >>> @get("/report", middleware=[route(Bulkhead("reports", max_concurrent=2))])
        ... async def report() -> str: ...
    """
    return DefineMiddleware(_ASGI, policies=policies, trust_deadlines=False)
