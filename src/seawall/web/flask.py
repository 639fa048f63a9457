"""Flask: one line puts an application behind policies, and answers for those of its views.

    setup(app, policies=[LoadShedder("front")], timeout=10.0)

A view's own policies are decorators below its route: `@app.get("/report")`, then `@reports`. On an answer that streams
they belong on its generator, which then holds them to its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from flask import request

from seawall.web.caught import answer_caught
from seawall.web.options import Options
from seawall.web.wsgi import SeawallWSGIMiddleware

if TYPE_CHECKING:
    from typing import Unpack

    from flask import Flask

Answered: TypeAlias = tuple[bytes, int, dict[str, str]]


def setup(app: Flask, **options: Unpack[Options]) -> SeawallWSGIMiddleware:
    """Put `app` behind a `SeawallWSGIMiddleware` with these settings, and return it.

    Flask turns what a view raises into a 500 of its own, so the errors that have an answer get handlers; an
    application's own error handlers for them go first, if they are registered later.

    Examples:
        >>> from flask import Flask
        >>> from seawall import LoadShedder
        >>> app = Flask("shop")
        >>> middleware = setup(app, policies=[LoadShedder("front")], timeout=10.0)
    """
    middleware = SeawallWSGIMiddleware(app.wsgi_app, **options)
    app.wsgi_app = middleware  # type: ignore[method-assign]
    answers = middleware.settings.answers

    def answer(error: Exception) -> Answered:
        reply = answer_caught(request.environ, error, answers)
        assert reply is not None  # handlers are registered for what has an answer
        return reply.body, reply.status, reply.headers

    for kind in answers.kinds:
        app.register_error_handler(kind, answer)
    return middleware
