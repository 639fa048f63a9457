"""Metrics over HTTP, for whoever has no `/metrics` yet."""

from __future__ import annotations

import threading
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from seawall import Bulkhead
from seawall.telemetry import install
from seawall.web import Metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def registry():
    places = Bulkhead("metrics", max_concurrent=3)
    registry = CollectorRegistry()
    uninstall = install(registry=registry)
    yield registry
    uninstall()
    assert places.limit == 3


def limit_in(families):
    return {
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "seawall_bulkhead_limit" and sample.labels["policy_name"] == "metrics"
    }


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("accept", "parse", "kind"),
    [
        ("", plain, "text/plain"),
        ("*/*", plain, "text/plain"),
        (OPENMETRICS, openmetrics, "application/openmetrics-text"),
        ("application/openmetrics-text; version=x", plain, "text/plain"),
        ("application/openmetrics-text; version=99.1; escaping=x", openmetrics, "application/openmetrics-text"),
        ("\xff,;;=", plain, "text/plain"),
    ],
)
async def test_a_scraper_gets_the_format_it_accepts(registry, client, accept, parse, kind):
    request = client(Metrics(registry).asgi)
    request.scope["headers"] = [(b"accept", accept.encode("latin-1"))]
    done = await request.finish()
    assert (done.status, limit_in(parse(done.body.decode()))) == (200, {3.0})
    assert done.headers["content-type"].startswith(kind)
    assert done.headers["content-length"] == str(len(done.body))


@pytest.mark.asyncio
async def test_nothing_but_reading_is_allowed_and_a_head_has_no_body(registry, client):
    for method, status in (("POST", 405), ("DELETE", 405), ("HEAD", 200)):
        request = client(Metrics(registry).asgi)
        request.scope["method"] = method
        done = await request.finish()
        assert (done.status, done.body) == (status, b"")


@pytest.mark.asyncio
async def test_the_event_loop_does_not_read_the_numbers_itself(client):
    threads = []

    class Slow:
        def collect(self):
            threads.append(threading.current_thread())
            return []

    registry = CollectorRegistry()
    registry.register(Slow())
    threads.clear()
    await client(Metrics(registry).asgi).finish()
    assert threads[0] is not threading.current_thread()


def test_it_is_a_wsgi_application_too(registry):
    environ = {"HTTP_ACCEPT": OPENMETRICS, "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    said = []
    body = validator(Metrics(registry).wsgi)(environ, lambda *args: said.append(args) or (lambda data: None))
    assert limit_in(openmetrics(b"".join(body).decode())) == {3.0}
    body.close()
    assert said[0][0] == "200 OK"


def test_what_is_no_registry_is_refused():
    with pytest.raises(TypeError, match="registry must be a CollectorRegistry, got 3"):
        Metrics(3)
