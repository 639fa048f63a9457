"""FastAPI: policies around one route, as a dependency.

    @app.get("/report", dependencies=[Depends(guarded(reports))])

The application as a whole is behind `app.add_middleware(SeawallMiddleware, ...)`, which also answers for what a route's
policies refuse. A policy that runs calls anew (retry, hedge, fallback) is a decorator below the route instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from seawall.core.decorate import Policy
from seawall.web.guarding import Guards


def guarded(*policies: Policy) -> Callable[[HTTPConnection], AsyncIterator[None]]:
    """A dependency that holds guards, outermost first, until the answer is sent, its stream included.

    The key of a policy per key is given the request. What a client did wrong (an `HTTPException` below 500, an
    argument that does not fit) is no failure; other exceptions are.

    Examples:
        >>> from fastapi import Depends, FastAPI
        >>> from seawall import Bulkhead
        >>> app = FastAPI()
        >>> @app.get("/report", dependencies=[Depends(guarded(Bulkhead("reports", max_concurrent=2)))])
        ... async def report() -> str: ...
    """
    guards = Guards(policies)

    async def dependency(request: HTTPConnection) -> AsyncIterator[None]:
        answer: Exception | None = None
        async with guards.scope(request):
            try:
                yield
            except HTTPException as error:
                if error.status_code >= 500:
                    raise
                answer = error
            except RequestValidationError as error:
                answer = error
        if answer is not None:
            raise answer

    return dependency
