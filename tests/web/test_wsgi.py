"""The WSGI middleware, driven as a server drives it (PEP 3333)."""

from __future__ import annotations

import gc
import json
import time
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from seawall import (
    Bulkhead,
    BulkheadFullError,
    CircuitBreaker,
    KeyedRateLimiter,
    Priority,
    Rejected,
    Retry,
    State,
    bulkhead,
    time_left,
)
from seawall.core.ambient import current_priority
from seawall.web import SeawallWSGIMiddleware
from seawall.web.caught import answer_caught


class Server:
    """Calls an application once, and checks both sides against the specification."""

    def __init__(self, app, **headers):
        self.environ = {f"HTTP_{name.upper()}": value for name, value in headers.items()}
        setup_testing_defaults(self.environ)
        self.environ["QUERY_STRING"] = ""
        self.status = None
        self.sent = b""
        self.app = app

    def start_response(self, status, headers, exc_info=None):
        if self.status is not None and exc_info is None:
            raise AssertionError("started twice")
        if exc_info is not None and self.sent:
            raise exc_info[1]
        self.status, self.headers = int(status[:3]), dict(headers)
        return lambda data: None

    def run(self, pieces=None):
        body = validator(self.app)(self.environ, self.start_response)
        try:
            for number, piece in enumerate(body):
                self.sent += piece
                if number + 1 == pieces:
                    break
        finally:
            body.close()
        return self


def answering(status="200 OK", *pieces):
    def app(environ, start_response):
        start_response(status, [("content-type", "text/plain")])
        return list(pieces or [b"ok"])

    return app


def test_an_answer_passes_as_it_is():
    done = Server(SeawallWSGIMiddleware(answering("201 Created", b"ma", b"de"))).run()
    assert (done.status, done.sent) == (201, b"made")


def test_a_refusal_is_a_problem_document():
    full = Bulkhead("front", max_concurrent=1)
    with full.scope():
        done = Server(SeawallWSGIMiddleware(answering(), policies=[full])).run()
    assert done.status == 503
    assert int(done.headers["retry-after"]) >= 1
    assert json.loads(done.sent)["violated-policies"] == ["front"]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_refusal_by_the_applications_own_policies_is_answered_too(lazy):
    full = Bulkhead("inner", max_concurrent=1)
    work = full(lambda: b"done")

    def app(environ, start_response):
        start_response("200 OK", [("content-type", "text/plain")])
        return (work() for _ in range(1)) if lazy else [work()]

    with full.scope():
        assert Server(SeawallWSGIMiddleware(app)).run().status == 503


def test_policies_hold_until_the_last_piece_is_sent():
    places = Bulkhead("front", max_concurrent=1)
    seen = []

    def app(environ, start_response):
        start_response("200 OK", [("content-type", "text/plain")])
        for piece in (b"a", b"b"):
            seen.append(places.snapshot().active)
            yield piece

    assert Server(SeawallWSGIMiddleware(app, policies=[places])).run().sent == b"ab"
    assert seen == [1, 1]
    assert places.snapshot().active == 0


def test_a_client_that_leaves_midway_gives_its_place_back_and_is_no_failure():
    front = CircuitBreaker("front")
    places = Bulkhead("places", max_concurrent=1)
    closed = []

    def app(environ, start_response):
        start_response("200 OK", [("content-type", "text/plain")])
        try:
            while True:
                yield b"x"
        finally:
            closed.append(True)

    Server(SeawallWSGIMiddleware(app, policies=[front, places])).run(pieces=2)
    assert closed == [True]
    assert places.snapshot().active == 0
    assert front.snapshot().failures == 0


def test_server_errors_open_a_breaker():
    front = CircuitBreaker("front", minimum_calls=2)
    failing = SeawallWSGIMiddleware(answering("500 Internal Server Error", b"oh"), policies=[front])
    for _ in range(2):
        done = Server(failing).run()
        assert (done.status, done.sent) == (500, b"oh")
    assert front.state is State.OPEN
    assert Server(failing).run().status == 503


def test_the_applications_own_errors_reach_the_server():
    def app(environ, start_response):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Server(SeawallWSGIMiddleware(app)).run()


def test_an_error_after_the_first_piece_reaches_the_server():
    def app(environ, start_response):
        start_response("200 OK", [("content-type", "text/plain")])
        yield b"a"
        raise Rejected("late")

    begun = Server(SeawallWSGIMiddleware(app))
    with pytest.raises(Rejected):
        begun.run()
    assert (begun.status, begun.sent) == (200, b"a")


def test_the_application_sees_the_deadline_in_every_piece_and_nobody_after_it():
    left = []

    def app(environ, start_response):
        start_response("200 OK", [("content-type", "text/plain")])
        for piece in (b"a", b"b"):
            left.append(time_left())
            yield piece

    Server(SeawallWSGIMiddleware(app, timeout=5.0), grpc_timeout="2S").run()
    assert left == [pytest.approx(2.0, abs=0.5)] * 2
    assert time_left() == float("inf")


def test_no_work_is_done_for_a_client_that_waits_no_more():
    late = Server(SeawallWSGIMiddleware(answering()), x_request_deadline=str(int(time.time()) - 5)).run()
    assert late.status == 504
    assert late.headers["x-should-retry"] == "false"


def test_the_application_tells_the_priority_of_a_request():
    seen = []

    def app(environ, start_response):
        seen.append(current_priority.get())
        return answering()(environ, start_response)

    Server(SeawallWSGIMiddleware(app, priority=lambda environ: Priority.HIGH)).run()
    assert seen == [Priority.HIGH]
    assert current_priority.get() is Priority.NORMAL


def test_a_limiter_per_client_is_asked_by_the_request():
    per_client = KeyedRateLimiter("per client", rate=1, burst=1, key=lambda exchange: exchange.environ["HTTP_X_USER"])
    app = SeawallWSGIMiddleware(answering(), policies=[per_client])
    assert [Server(app, x_user=user).run().status for user in ("a", "a", "b")] == [200, 429, 200]


def test_an_empty_answer_is_one_too():
    done = Server(SeawallWSGIMiddleware(answering("200 OK", b""))).run()
    assert (done.status, done.sent) == (200, b"")


def test_a_policy_that_runs_calls_again_is_refused_where_it_is_given():
    with pytest.raises(TypeError, match="put it on the function"):
        SeawallWSGIMiddleware(answering(), policies=[Retry("again", on=OSError)])


@pytest.mark.parametrize("setting", [{"failures_from": 200}, {"timeout": 0}, {"timeout": -1.0}, {"name": ""}])
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=r"failures_from|timeout|name"):
        SeawallWSGIMiddleware(answering(), **setting)


def test_a_decorated_view_is_answered_for():
    @bulkhead(max_concurrent=1)
    def view():
        return view()

    def app(environ, start_response):
        view()
        return []

    assert Server(SeawallWSGIMiddleware(app)).run().status == 503


@pytest.mark.parametrize("pieces", [0, 1, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_an_error_that_a_framework_answers_itself_is_a_refusal_to_the_policies_around(pieces, nested):
    front = CircuitBreaker("front")

    def framework(environ, start_response):
        reply = answer_caught(environ, BulkheadFullError("reports"))
        start_response(f"{reply.status} Busy", [("content-type", "text/plain")])
        return [b"x"] * pieces

    app = SeawallWSGIMiddleware(framework, name="inner") if nested else framework
    done = Server(SeawallWSGIMiddleware(app, policies=[front])).run()
    assert (done.status, done.sent) == (503, b"x" * pieces)
    assert front.snapshot().failures == 0


def test_what_an_inner_middleware_answers_is_a_refusal_to_the_policies_around():
    front, full = CircuitBreaker("front"), Bulkhead("inner", max_concurrent=1)
    inner = SeawallWSGIMiddleware(answering(), policies=[full])
    with full.scope():
        assert Server(SeawallWSGIMiddleware(inner, policies=[front])).run().status == 503
    assert front.snapshot().failures == 0


def test_a_request_is_no_cycle():
    seen = []

    class Tell:
        def __del__(self):
            seen.append("gone")

    app = SeawallWSGIMiddleware(answering(), policies=[Bulkhead("b", max_concurrent=1)])
    done = Server(app)
    done.environ["x.tell"] = Tell()
    gc.disable()
    try:
        done.run()
        del done
        assert seen == ["gone"]
    finally:
        gc.enable()


def test_an_error_of_the_applications_own_passes_two_middlewares_as_it_is():
    def app(environ, start_response):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Server(SeawallWSGIMiddleware(SeawallWSGIMiddleware(app))).run()


def test_exempt_paths_meet_no_policy():
    full = Bulkhead("front", max_concurrent=1)
    with full.scope():
        assert Server(SeawallWSGIMiddleware(answering(), policies=[full], exempt=["/"])).run().status == 200
