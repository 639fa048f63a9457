"""The same application in each framework, behind one line of seawall, on its real server."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

from aiohttp import web
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.urls import path as django_path
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from flask import Flask, Response, abort
from litestar import Litestar, asgi
from litestar import get as litestar_get
from litestar.exceptions import NotFoundException
from litestar.response import Stream
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from seawall import Bulkhead, CircuitBreaker, time_left
from seawall.web import SeawallMiddleware
from seawall.web import aiohttp as seawall_aiohttp
from seawall.web import django as seawall_django
from seawall.web import fastapi as seawall_fastapi
from seawall.web import flask as seawall_flask
from seawall.web import litestar as seawall_litestar
from tests.web.servers import (
    aiohttp_serves,
    configure_django,
    uvicorn_serves,
    waitress_serves,
)


class Scene:
    """An application of routes plain, report, stream, broken, missing and slow: its policies, and what it noticed."""

    def __init__(self):
        self.front = CircuitBreaker("front", minimum_calls=1000)
        self.hall = Bulkhead("hall", max_concurrent=8)
        self.reports = Bulkhead("reports", max_concurrent=1)
        self.go_on = threading.Event()
        self.entered = threading.Event()
        self.left = threading.Event()
        self.seconds = []
        self.options = {"policies": [self.front, self.hall], "timeout": 20.0}

    def plain(self):
        self.seconds.append(time_left())
        return "ok"

    async def pieces(self):
        yield b"first"
        while not self.go_on.is_set():  # noqa: ASYNC110 - the client is another thread
            await asyncio.sleep(0.001)
        yield b"second"

    def pieces_sync(self):
        yield b"first"
        assert self.go_on.wait(10)
        yield b"second"

    async def slow(self):
        self.entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            self.left.set()
        return "late"


@contextmanager
def fastapi(scene, mounted):
    reports = [Depends(seawall_fastapi.guarded(scene.reports))]
    app = FastAPI()

    @app.get("/plain")
    async def plain():
        return scene.plain()

    @app.get("/report", dependencies=reports)
    async def report():
        return "ok"

    @app.get("/stream", dependencies=reports)
    async def stream():
        return StreamingResponse(scene.pieces())

    @app.get("/broken")
    async def broken():
        raise ValueError("mine")

    @app.get("/missing")
    async def missing():
        raise HTTPException(404)

    @app.get("/slow")
    async def slow():
        return await scene.slow()

    app.add_middleware(SeawallMiddleware, **scene.options)
    if mounted:
        inner, app = app, FastAPI()
        app.mount("/sub", inner)
    with uvicorn_serves(app) as port:
        yield port


@contextmanager
def starlette(scene, mounted):
    reports = [Middleware(SeawallMiddleware, policies=[scene.reports])]

    async def plain(request):
        return PlainTextResponse(scene.plain())

    async def report(request):
        return PlainTextResponse("ok")

    async def stream(request):
        return StreamingResponse(scene.pieces())

    async def broken(request):
        raise ValueError("mine")

    async def missing(request):
        raise HTTPException(404)

    async def slow(request):
        return PlainTextResponse(await scene.slow())

    routes = [Route(f"/{endpoint.__name__}", endpoint) for endpoint in (plain, broken, missing, slow)]
    routes += [Route(f"/{endpoint.__name__}", endpoint, middleware=reports) for endpoint in (report, stream)]
    app = Starlette(routes=routes, middleware=[Middleware(SeawallMiddleware, **scene.options)])
    with uvicorn_serves(Starlette(routes=[Mount("/sub", app)]) if mounted else app) as port:
        yield port


@contextmanager
def litestar(scene, mounted):
    reports = [seawall_litestar.route(scene.reports)]

    @litestar_get("/plain")
    async def plain() -> str:
        return scene.plain()

    @litestar_get("/report")
    @scene.reports
    async def report() -> str:
        return "ok"

    @litestar_get("/stream", middleware=reports)
    async def stream() -> Stream:
        return Stream(scene.pieces())

    @litestar_get("/broken")
    async def broken() -> str:
        raise ValueError("mine")

    @litestar_get("/missing")
    async def missing() -> str:
        raise NotFoundException

    @litestar_get("/slow")
    async def slow() -> str:
        return await scene.slow()

    plugins = [seawall_litestar.SeawallPlugin(**scene.options)]
    app = Litestar([plain, report, stream, broken, missing, slow], plugins=plugins, logging_config=None)
    if mounted:
        app = Litestar([asgi("/sub", is_mount=True, copy_scope=True)(app)], logging_config=None)
    with uvicorn_serves(app) as port:
        yield port


@contextmanager
def flask(scene, mounted):
    app = Flask("shop")

    @app.get("/plain")
    def plain():
        return scene.plain()

    @app.get("/report")
    @scene.reports
    def report():
        return "ok"

    @app.get("/stream")
    def stream():
        return Response(scene.reports(scene.pieces_sync)())

    @app.get("/broken")
    def broken():
        raise ValueError("mine")

    @app.get("/missing")
    def missing():
        abort(404)

    app.logger.disabled = True
    seawall_flask.setup(app, **scene.options)
    if mounted:
        from werkzeug.exceptions import NotFound
        from werkzeug.middleware.dispatcher import DispatcherMiddleware

        app = DispatcherMiddleware(NotFound(), {"/sub": app})
    with waitress_serves(app) as port:
        yield port


def django_urls(scene, prefix, *, asynchronous):
    guarded = seawall_django.guarded(scene.reports)

    def plain(request):
        return HttpResponse(scene.plain())

    @scene.reports
    def report(request):
        return HttpResponse("ok")

    def stream(request):
        return StreamingHttpResponse(scene.pieces() if asynchronous else scene.pieces_sync())

    def broken(request):
        raise ValueError("mine")

    async def slow(request):
        return HttpResponse(await scene.slow())

    def asynchronously(view):
        async def asynchronous_view(request):
            return view(request)

        return asynchronous_view if asynchronous else view

    views = [plain, report, broken, slow] if asynchronous else [plain, report, broken]
    urls = [django_path(f"{prefix}{view.__name__}", view if view is slow else asynchronously(view)) for view in views]
    return (*urls, django_path(f"{prefix}stream", guarded(asynchronously(stream))))


@contextmanager
def django_configured(scene, mounted, *, asynchronous):
    configure_django()
    with override_settings(
        ROOT_URLCONF=django_urls(scene, "sub/" if mounted else "", asynchronous=asynchronous),
        MIDDLEWARE=["seawall.web.django.SeawallMiddleware"],
        SEAWALL=scene.options,
    ):
        yield


@contextmanager
def django_asgi(scene, mounted):
    with (
        django_configured(scene, mounted, asynchronous=True),
        uvicorn_serves(get_asgi_application()) as port,
    ):
        yield port


@contextmanager
def django_wsgi(scene, mounted):
    with (
        django_configured(scene, mounted, asynchronous=False),
        waitress_serves(get_wsgi_application()) as port,
    ):
        yield port


@contextmanager
def aiohttp(scene, mounted):
    async def plain(request):
        return web.Response(text=scene.plain())

    @scene.reports
    async def report(request):
        return web.Response(text="ok")

    @scene.reports
    async def stream(request):
        response = web.StreamResponse()
        await response.prepare(request)
        async for piece in scene.pieces():
            await response.write(piece)
        return response

    async def broken(request):
        raise ValueError("mine")

    async def missing(request):
        raise web.HTTPNotFound

    async def slow(request):
        return web.Response(text=await scene.slow())

    app = web.Application()
    app.add_routes(
        [web.get(f"/{handler.__name__}", handler) for handler in (plain, report, stream, broken, missing, slow)]
    )
    seawall_aiohttp.setup(app, **scene.options)
    if mounted:
        inner, app = app, web.Application()
        app.add_subapp("/sub", inner)
    with aiohttp_serves(app) as port:
        yield port
