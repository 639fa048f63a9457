"""A Django project in one file behind policies.

`python examples/web_django.py [PORT]`, then `curl localhost:8000/report/7`.
Several workers, asynchronous: `uvicorn --app-dir examples web_django:app --workers 4`; with threads:
`gunicorn --chdir examples web_django:wsgi --workers 4 --threads 8`.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import django
import uvicorn
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse, StreamingHttpResponse
from django.urls import path

from seawall import Bulkhead, CircuitBreaker, KeyedRateLimiter, LoadShedder, time_left
from seawall.web import Health

per_client = KeyedRateLimiter("per client", rate=50, burst=100, key=lambda request: request.META["REMOTE_ADDR"])
reports = Bulkhead("reports", max_concurrent=4, max_queued=16)
database = CircuitBreaker("database")
health = Health(critical=[database])

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    MIDDLEWARE=["seawall.web.django.SeawallMiddleware"],
    SEAWALL={"policies": [LoadShedder("front"), per_client], "timeout": 10.0},
)
django.setup()

from seawall.web.django import guarded  # noqa: E402 - Django's own imports want its settings first


@database
async def rows(number: int) -> list[str]:
    await asyncio.sleep(0.01)  # a query
    return [f"row {row} of report {number}" for row in range(3)]


@reports
async def report(request: HttpRequest, number: int) -> JsonResponse:
    return JsonResponse({"rows": await rows(number), "seconds_left": round(time_left(), 3)})


@guarded(reports)  # holds its place until the last piece is sent
async def stream(request: HttpRequest, number: int) -> StreamingHttpResponse:
    async def events() -> AsyncIterator[str]:
        for row in await rows(number):
            yield f"data: {row}\n\n"

    return StreamingHttpResponse(events(), content_type="text/event-stream", headers={"cache-control": "no-store"})


async def livez(request: HttpRequest) -> JsonResponse:
    status, content = health.live()
    return JsonResponse(content, status=status)


async def readyz(request: HttpRequest) -> JsonResponse:
    status, content = health.ready()
    return JsonResponse(content, status=status)


urlpatterns = [
    path("report/<int:number>", report),
    path("stream/<int:number>", stream),
    path("livez", livez),
    path("readyz", readyz),
]
app = get_asgi_application()
wsgi = get_wsgi_application()

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if sys.argv[1:] else 8000, lifespan="off")
