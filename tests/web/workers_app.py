"""What `test_workers.py` serves, as an ASGI and a WSGI application."""

import asyncio
import json
import os
import time

from seawall import Bulkhead
from seawall.web import SeawallMiddleware, SeawallWSGIMiddleware

hall = Bulkhead("hall", max_concurrent=8)
full = Bulkhead("full", max_concurrent=1)
places = full.scope().__enter__()  # taken for good
JSON = "application/json"


def facts():
    return json.dumps({"pid": os.getpid(), "active": hall.snapshot().active}).encode()


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    if scope["path"] == "/full":
        async with full.scope():
            pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", JSON.encode())]})
    if scope["path"] == "/slow":
        await send({"type": "http.response.body", "body": f"pid {os.getpid()} ".encode(), "more_body": True})
        await asyncio.sleep(60)
    await send({"type": "http.response.body", "body": facts()})


def application_of_threads(environ, start_response):
    if environ["PATH_INFO"] == "/full":
        with full.scope():
            pass
    start_response("200 OK", [("content-type", JSON)])
    if environ["PATH_INFO"] == "/slow":
        yield f"pid {os.getpid()} ".encode()
        time.sleep(60)
    yield facts()


app = SeawallMiddleware(application, policies=[hall])
wsgi = SeawallWSGIMiddleware(application_of_threads, policies=[hall])
