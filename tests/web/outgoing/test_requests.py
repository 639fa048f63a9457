"""The adapter of requests, against a real server that fails on purpose."""

from __future__ import annotations

import contextlib
import gc

import pytest
import requests

from seawall import BulkheadFullError, CircuitOpenError, Deadline, DeadlinePassedError, use_clock
from seawall.web.outgoing import HostPolicies, host_policies
from seawall.web.outgoing.requests import SeawallAdapter
from tests.web.outgoing.faulty import serving
from tests.web.outgoing.test_httpx import at, quick


@contextlib.contextmanager
def session(policies):
    with requests.Session() as calls:
        calls.mount("http://", SeawallAdapter(policies=policies))
        yield calls


@pytest.mark.parametrize("fault", ["status 503", "status 429", "reset", "half"])
def test_a_call_that_may_be_repeated_is_until_it_is_served(fault):
    with session(quick()) as calls, serving(fault, fault) as server:
        response = calls.get(server.url)
        assert (response.status_code, response.content) == (200, b"ok")
        assert len(server.seen) == 3


def test_a_call_that_changes_something_is_made_once_unless_it_has_a_key():
    with session(quick()) as calls, serving("status 503", "status 503", "ok") as server:
        assert calls.post(server.url, data=b"x").status_code == 503
        assert calls.post(server.url, data=b"pay", headers={"Idempotency-Key": "1"}).status_code == 200
        assert [body for *_, body in server.seen] == [b"x", b"pay", b"pay"]


def test_a_body_that_can_not_be_sent_again_is_sent_once(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with session(quick()) as calls, serving("status 503") as server, (tmp_path / "file").open("rb") as file:
        assert calls.put(server.url, data=file).status_code == 503
        assert [body for *_, body in server.seen] == [b"content"]


def test_the_last_answer_is_the_callers_with_its_body():
    with session(quick(attempts=2)) as calls, serving("status 503", "status 503") as server:
        response = calls.get(server.url)
        assert (response.status_code, response.content) == (503, b"not now")


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_retried_costs_no_second_connection(stream):
    with session(quick()) as calls, serving("status 503", "status 429") as server:
        assert calls.get(server.url, stream=stream).content == b"ok"
        assert (len(server.seen), server.connections) == (3, 1)


def test_a_dead_hosts_breaker_opens_and_no_other():
    policies = quick(attempts=1)
    with session(policies) as calls, serving() as alive, serving(*["reset"] * 30) as dead:
        with pytest.raises(CircuitOpenError):
            while True:
                with pytest.raises(requests.ConnectionError):
                    calls.get(dead.url)
        assert calls.get(alive.url).status_code == 200
        assert len(dead.seen) == at(policies, dead.host, "breaker").minimum_calls


@pytest.mark.parametrize("how", ["read", "close", "leave"])
def test_a_streams_place_is_held_until_it_is_read_or_closed(how):
    policies = quick(max_concurrent=1, max_queued=0)
    with session(policies) as calls, serving("stream") as server:
        response = calls.get(server.url, stream=True)
        pieces = response.iter_content(5)
        assert next(pieces) == b"first"
        with pytest.raises(BulkheadFullError):
            calls.get(server.url)
        server.go_on.set()
        if how == "read":
            assert b"".join(pieces) == b"second"
        elif how == "close":
            response.close()
        del response, pieces
        gc.collect()
        assert at(policies, server.host, "bulkhead").snapshot().active == 0
        assert calls.get(server.url).status_code == 200


def test_a_stream_that_breaks_off_counts_against_its_host():
    policies = quick()
    with session(policies) as calls, serving("half") as server:
        response = calls.get(server.url, stream=True)
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            response.content  # noqa: B018 - reads
        assert at(policies, server.host, "breaker").snapshot().failures == 1
        assert at(policies, server.host, "bulkhead").snapshot().active == 0


def test_a_retried_stream_gives_its_place_to_the_next_attempt():
    policies = quick(max_concurrent=1, max_queued=0)
    with session(policies) as calls, serving("stream 503", "ok") as server:
        server.go_on.set()
        assert calls.get(server.url, stream=True).content == b"ok"
        assert at(policies, server.host, "bulkhead").snapshot().active == 0


def test_hosts_hear_how_long_their_caller_waits_and_sockets_take_no_longer():
    with session(quick(timeout=0.1, deadline=8.0)) as calls, serving("wait") as server:
        assert calls.get(server.url).content == b"ok"
        first, second = (int(headers["x-envoy-expected-rq-timeout-ms"]) for _, _, headers, _ in server.seen)
        assert 7000 < second < first <= 8000


def test_a_call_whose_deadline_has_passed_is_not_made():
    now = [0.0]
    with session(HostPolicies()) as calls, serving() as server:
        with use_clock(lambda: now[0]), Deadline("outer", 5.0).scope():
            now[0] = 6.0
            with pytest.raises(DeadlinePassedError):
                calls.get(server.url)
        assert server.seen == []


def test_redirects_cookies_and_history_work_as_ever():
    with session(quick()) as calls, serving() as target, serving() as server:
        server.script = [f"redirect {target.url}/"]
        response = calls.get(server.url)
        assert (response.content, len(response.history)) == (b"ok", 1)


def test_a_hedge_is_refused():
    with pytest.raises(TypeError, match="event loop"):
        SeawallAdapter(policies=host_policies(hedge_after=0.1))
