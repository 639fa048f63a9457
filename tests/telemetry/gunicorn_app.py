"""An application with `/metrics` for a real gunicorn: each call is guarded, and says which worker served it."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry

from seawall import Bulkhead
from seawall.telemetry import install
from seawall.web import Metrics

registry = CollectorRegistry()
install(registry=registry)  # its folder is in $PROMETHEUS_MULTIPROC_DIR
metrics = Metrics(registry).wsgi
places = Bulkhead("shop", max_concurrent=5)


def app(environ, start_response):
    if environ["PATH_INFO"] == "/metrics":
        return metrics(environ, start_response)
    with places.scope():
        body = str(os.getpid()).encode()
    start_response("200 OK", [("content-type", "text/plain"), ("content-length", str(len(body)))])
    return [body]
