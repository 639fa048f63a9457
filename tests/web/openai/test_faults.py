"""Clients that leave, stall, lie and overload, on a real server: each ends cleanly and nothing of it stays."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from seawall import Bulkhead, CircuitBreaker
from seawall.web.openai import Limits, OpenAIRouter
from tests.web.openai.conftest import post
from tests.web.openai.scripted import ScriptedEngine, eventually, served

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}


def connected(port):
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def head(length, *lines):
    told = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json", *lines]
    return "\r\n".join([*told, f"content-length: {length}", "", ""]).encode()


def request_of(**settings):
    body = json.dumps({**CHAT, **settings}).encode()
    return head(len(body)) + body


def answer_of(connection):
    with connection.makefile("rb") as file:
        return int(file.readline().split()[1])


@pytest.fixture
def stuck():
    """An engine that has said one word, and never says another."""
    go_on = threading.Event()
    yield ScriptedEngine(words=("The ", go_on, "end"))
    go_on.set()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_hangs_up_ends_its_answer_and_counts_as_no_failure(serve, stuck, stream):
    breaker, places = CircuitBreaker("front"), Bulkhead("front", max_concurrent=1)
    port = serve(stuck, policies=[breaker, places]).port
    connection = connected(port)
    connection.sendall(request_of(stream=stream))
    eventually(lambda: stuck.running == 1)
    if stream:
        connection.recv(1)
    connection.close()

    assert stuck.stopped.wait(60)
    eventually(lambda: places.snapshot().active == 0)
    assert (0, 0) == (breaker.snapshot().failures, stuck.running)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/chat/comp",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n",
        head(100),
        head(100) + b'{"model": ',
        request_of(),
        request_of(stream=True),
    ],
    ids=["connect", "request line", "headers", "no body", "half a body", "request", "stream"],
)
def test_a_client_may_leave_at_any_moment(serve, stuck, sent):
    breaker, places = CircuitBreaker("front"), Bulkhead("front", max_concurrent=1)
    client = serve(stuck, policies=[breaker, places])
    with connected(client.port) as connection:
        connection.sendall(sent)
        if b"\r\n\r\n" in sent:
            eventually(lambda: places.snapshot().active == 1)

    eventually(lambda: places.snapshot().active == 0 and stuck.running == 0)
    assert (0, 0) == tuple(breaker.counters()[outcome] for outcome in ("success", "failure"))
    stuck.words = ("Still ", "here.")
    assert "Still here." == client.chat.completions.create(**CHAT).choices[0].message.content


def test_the_official_client_may_close_a_stream(serve, stuck):
    with serve(stuck).chat.completions.create(**CHAT, stream=True) as stream:
        assert "assistant" == next(iter(stream)).choices[0].delta.role

    assert stuck.stopped.wait(60)


def test_the_official_clients_own_timeout_ends_the_answer(serve, stuck):
    with pytest.raises(openai.APITimeoutError):
        serve(stuck, client={"timeout": 0.2}).chat.completions.create(**CHAT)

    assert stuck.stopped.wait(60)


def test_a_client_that_reads_nothing_is_given_up(serve):
    endless = ScriptedEngine(words=("word " * 2000,) * 4000)
    client = serve(endless, limits=Limits(write_seconds=0.2))
    connection = connected(client.port)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(request_of(stream=True))
    eventually(lambda: endless.running == 1)

    assert endless.stopped.wait(60)
    assert endless.running == 0
    connection.close()


def test_a_slow_client_that_reads_at_all_gets_everything(serve):
    engine = ScriptedEngine(words=("word ",) * 50)
    with connected(serve(engine, limits=Limits(write_seconds=0.2)).port) as connection:
        connection.sendall(request_of(stream=True))
        raw = b""
        while b"[DONE]" not in raw:
            raw += connection.recv(64)

    assert 50 == raw.count(b'"content":"word "')


def test_a_body_that_does_not_come_is_not_waited_for(serve, scripted):
    port = serve(scripted, limits=Limits(body_seconds=0.1)).port
    with connected(port) as connection:
        connection.sendall(head(100) + b'{"model": ')
        assert 408 == answer_of(connection)

    assert [] == scripted.asked


@pytest.mark.parametrize("size", [2_000, 10_000, 1 << 20])
def test_a_body_that_is_too_large_is_refused_and_the_refusal_arrives(serve, scripted, size):
    client = serve(scripted, limits=Limits(body=1_000))
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "x" * size}])

    assert (413, "request_too_large") == (caught.value.status_code, caught.value.code)
    assert [] == scripted.asked


def test_a_body_of_unknown_length_is_bounded_too(serve, scripted):
    port = serve(scripted, limits=Limits(body=1_000)).port
    start = head(0).replace(b"content-length: 0", b"transfer-encoding: chunked")
    with connected(port) as connection:
        connection.sendall(start + b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n")
        assert 413 == answer_of(connection)


@pytest.mark.parametrize(
    ("kind", "extra", "status"),
    [
        ("text/plain", {}, 415),
        ("application/x-www-form-urlencoded", {}, 415),
        ("", {}, 415),
        ("application/json; charset=utf-8", {}, 200),
        ("application/json", {"content_encoding": "gzip"}, 415),
    ],
)
def test_only_plain_json_is_read(serve, scripted, kind, extra, status):
    assert status == post(serve(scripted).port, "/v1/chat/completions", CHAT, content_type=kind, **extra)[0]


DEADLINES = ["grpc-timeout", "x-envoy-expected-rq-timeout-ms", "x-request-deadline"]
ABUSE = ["", "NaN", "nan", "inf", "-inf", "1e999", "9" * 5000, "0x10", "1;DROP", "\xff\xfe", "-", "1 m", "²"]


@pytest.mark.parametrize("name", DEADLINES)
@pytest.mark.parametrize("value", ABUSE, ids=range(len(ABUSE)))
def test_a_deadline_that_is_nonsense_is_no_reason_to_refuse(serve, scripted, name, value):
    port = serve(scripted).port
    with connected(port) as connection:
        body = json.dumps(CHAT).encode()
        connection.sendall(head(len(body)).replace(b"host: x", f"host: x\r\n{name}: ".encode() + value.encode()) + body)
        assert 200 == answer_of(connection)


@pytest.mark.parametrize(
    ("name", "value"),
    [("grpc-timeout", "0S"), ("x-envoy-expected-rq-timeout-ms", "-5"), ("x-request-deadline", "-1")],
)
def test_a_deadline_in_the_past_is_answered_before_any_work(serve, scripted, name, value):
    status, headers, _ = post(serve(scripted).port, "/v1/chat/completions", CHAT, **{name: value})

    assert (504, "false") == (status, headers["x-should-retry"])
    assert [] == scripted.asked


@pytest.mark.parametrize(
    "header",
    ["x-request-id: " + "a" * 10_000, "authorization: " + "b" * 10_000, "authorization: Bearer", "authorization: \xff"],
    ids=["long id", "long key", "no key", "no text"],
)
def test_odd_headers_do_no_harm(serve, scripted, header):
    body = json.dumps(CHAT).encode()
    with connected(serve(scripted).port) as connection:
        connection.sendall(head(len(body)).replace(b"host: x", b"host: x\r\n" + header.encode()) + body)
        assert 200 == answer_of(connection)


def test_headers_beyond_the_servers_own_limit_are_its_400(serve, scripted):
    port = serve(scripted).port
    with connected(port) as connection:
        connection.sendall(head(2).replace(b"host: x", b"host: x\r\nx-a: " + b"a" * 200_000) + b"{}")
        assert 400 == answer_of(connection)


def test_what_is_overloaded_refuses_quickly_and_serves_those_it_took(serve, stuck):
    go_on = stuck.words[1]
    places = Bulkhead("front", max_concurrent=2, max_queued=0)
    port = serve(stuck, policies=[places]).port
    with ThreadPoolExecutor(10) as pool:
        calls = [pool.submit(post, port, "/v1/chat/completions", CHAT) for _ in range(10)]
        eventually(lambda: sum(call.done() for call in calls) == 8)
        go_on.set()
        answers = [call.result() for call in calls]

    refused = [(headers, json.loads(body)["error"]) for status, headers, body in answers if status == 503]
    assert [200, 200] == [status for status, _, _ in answers if status != 503]
    assert 8 == len(refused)
    assert all(int(headers["retry-after"]) >= 1 and error["code"] == "overloaded" for headers, error in refused)


def test_a_server_that_drains_asks_clients_to_go_elsewhere(serve, scripted):
    router = OpenAIRouter(scripted)
    with served(router) as port:
        assert "connection" not in post(port, "/v1/models", b"", method="GET")[1]
        router.draining = True
        assert "close" == post(port, "/v1/models", b"", method="GET")[1]["connection"]
