"""What every framework must do with one line of seawall, on its real server."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

from tests.web.applications import Scene, aiohttp, django_asgi, django_wsgi, fastapi, flask, litestar, starlette
from tests.web.servers import (
    empties,
    get,
    opened,
    raw,
)

ASYNC = (fastapi, starlette, litestar, django_asgi, aiohttp)
ALL = (*ASYNC, flask, django_wsgi)


@pytest.fixture(params=ALL, ids=lambda serve: serve.__name__)
def serve(request):
    return request.param


@pytest.fixture(params=ASYNC, ids=lambda serve: serve.__name__)
def serve_async(request):
    return request.param


@pytest.fixture
def scene():
    scene = Scene()
    yield scene
    scene.go_on.set()
    assert scene.hall.snapshot().active == 0
    assert scene.reports.snapshot().active == 0


@contextmanager
def full(places):
    """All places of a bulkhead are taken."""
    with places.costing(places.limit).scope():
        yield


def problem(answered):
    status, headers, body = answered
    assert headers["content-type"] == "application/problem+json"
    assert int(headers["content-length"]) == len(body)
    return status, json.loads(body)["code"]


def test_answers_of_the_application_pass_and_its_server_errors_alone_are_failures(serve, scene):
    with serve(scene, mounted=False) as port:
        assert get(port, "/plain")[0] == 200
        assert get(port, "/report")[2].strip(b'"') == b"ok"
        assert get(port, "/missing")[0] == 404
        assert scene.front.snapshot().failures == 0
        assert get(port, "/broken")[0] == 500
    assert scene.front.snapshot().failures == 1


@pytest.mark.parametrize("mounted", [False, True])
def test_what_a_policy_of_the_application_or_of_a_route_refuses_is_a_problem_and_no_failure(serve, scene, mounted):
    prefix = "/sub" if mounted else ""
    with serve(scene, mounted) as port:
        with full(scene.hall):
            assert problem(get(port, f"{prefix}/plain")) == (503, "overloaded")
        with full(scene.reports):
            assert problem(get(port, f"{prefix}/stream")) == (503, "overloaded")
            status, headers, body = get(port, f"{prefix}/report")
            assert (status, json.loads(body)["violated-policies"]) == (503, ["reports"])
            assert int(headers["retry-after"]) >= 1
        assert get(port, f"{prefix}/report")[0] == 200
    assert scene.front.snapshot().failures == 0


def test_probes_pass_when_the_application_is_full(serve, scene):
    with serve(scene, mounted=False) as port, full(scene.hall):
        assert get(port, "/plain")[0] == 503
        assert get(port, "/livez")[0] == 404  # there is none here, but nobody refused


def test_a_handler_sees_the_deadline_and_does_not_begin_when_it_has_passed(serve, scene):
    with serve(scene, mounted=False) as port:
        get(port, "/plain")
        get(port, "/plain", grpc_timeout="5S")
        late = get(port, "/plain", x_request_deadline="5")
    assert scene.seconds == pytest.approx([20.0, 5.0], abs=2.0)
    assert problem(late) == (504, "deadline_exceeded")
    assert late[1]["x-should-retry"] == "false"


ABSURD = ("-5", "NaN", "1e309", "9" * 4000, "1:2", "", "\x80", "99999999999S")


def test_an_absurd_deadline_has_passed_or_is_none(serve, scene):
    with serve(scene, mounted=False) as port:
        for name in ("grpc-timeout", "x-envoy-expected-rq-timeout-ms", "x-request-deadline"):
            found = [get(port, "/plain", **{name: value})[0] for value in ABSURD]
            assert found == [200 if name == "grpc-timeout" else 504] + [200] * 7


def test_a_route_holds_its_place_until_its_stream_is_read(serve, scene):
    with serve(scene, mounted=False) as port:
        with opened(port, "/stream") as answer:
            assert answer.read(5) == b"first"
            assert scene.reports.snapshot().active == 1
            assert problem(get(port, "/report")) == (503, "overloaded")
            scene.go_on.set()
            assert answer.read() == b"second"
        empties(scene.reports)  # the client may read its last piece before the server is done
        assert get(port, "/report")[0] == 200


def test_a_handler_is_cancelled_when_its_clients_time_is_over(serve_async, scene):
    with serve_async(scene, mounted=False) as port:
        assert problem(get(port, "/slow", grpc_timeout="60m")) == (504, "deadline_exceeded")
        assert scene.left.wait(10)
        assert scene.hall.snapshot().active == 0
        assert get(port, "/plain")[0] == 200


def test_a_handler_is_cancelled_when_its_client_leaves_which_is_no_failure(serve_async, scene):
    with serve_async(scene, mounted=False) as port:
        with raw(port, "GET /slow HTTP/1.1", "host: x", ""):
            assert scene.entered.wait(10)
            assert scene.hall.snapshot().active == 1
        assert scene.left.wait(10)
        assert get(port, "/plain")[0] == 200
    assert scene.front.snapshot().failures == 0


def test_a_client_that_leaves_a_stream_midway_gives_its_place_back(serve, scene):
    with serve(scene, mounted=False) as port:
        with opened(port, "/stream") as answer:
            assert answer.read(5) == b"first"
        scene.go_on.set()
    assert scene.front.snapshot().failures == 0
