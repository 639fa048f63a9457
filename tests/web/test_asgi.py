"""The ASGI middleware, driven message by message."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import pytest

from seawall import (
    Bulkhead,
    BulkheadFullError,
    CircuitBreaker,
    KeyedRateLimiter,
    LoadShedder,
    Priority,
    Rejected,
    Retry,
    State,
    bulkhead,
    time_left,
)
from seawall.core.ambient import current_priority
from seawall.web import SeawallMiddleware

pytestmark = [pytest.mark.asyncio, pytest.mark.virtual_time]


def answering(status=200, body=b"ok"):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


def raising(error):
    async def app(scope, receive, send):
        raise error

    return app


async def forever(scope, receive, send):
    await asyncio.Event().wait()


async def test_an_answer_passes_as_it_is(client):
    done = await client(SeawallMiddleware(answering(201, b"made"))).finish()
    assert (done.status, done.body) == (201, b"made")


async def test_a_refusal_is_a_problem_document(client):
    full = Bulkhead("front", max_concurrent=1)
    with full.scope():
        done = await client(SeawallMiddleware(answering(), policies=[full])).finish()
    assert done.status == 503
    assert int(done.headers["retry-after"]) >= 1
    assert done.headers["content-type"] == "application/problem+json"
    assert int(done.headers["content-length"]) == len(done.body)
    assert json.loads(done.body)["violated-policies"] == ["front"]


async def test_a_refusal_by_the_applications_own_policies_is_answered_too(client):
    @bulkhead(max_concurrent=1)
    async def work():
        await asyncio.sleep(1)

    async def app(scope, receive, send):
        await asyncio.gather(work(), work())

    done = await client(SeawallMiddleware(app)).finish()
    assert done.status == 503


async def test_the_applications_own_errors_reach_the_server(client):
    with pytest.raises(ZeroDivisionError):
        await client(SeawallMiddleware(raising(ZeroDivisionError()))).finish()


async def test_an_error_after_the_answer_began_reaches_the_server_which_cuts_the_connection(client):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise Rejected("late")

    started = client(SeawallMiddleware(app))
    with pytest.raises(Rejected):
        await started.finish()
    assert [message["type"] for message in started.messages] == ["http.response.start"]


async def test_server_errors_open_a_breaker_and_client_errors_do_not(client):
    front = CircuitBreaker("front", minimum_calls=2)
    bad = SeawallMiddleware(answering(404), policies=[front])
    for _ in range(3):
        assert (await client(bad).finish()).status == 404
    assert front.state is State.CLOSED
    failing = SeawallMiddleware(answering(500, b"oh"), policies=[front])
    for _ in range(3):
        done = await client(failing).finish()
        assert (done.status, done.body) == (500, b"oh")
    assert front.state is State.OPEN
    assert (await client(failing).finish()).status == 503


async def test_a_policy_that_runs_calls_again_is_refused_where_it_is_given():
    with pytest.raises(TypeError, match="put it on the function"):
        SeawallMiddleware(answering(), policies=[Retry("again", on=OSError)])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"policies": Bulkhead("one", max_concurrent=1)}, "policies must be several guards.*put it into a list"),
        ({"policies": ["one"]}, "policies must be guards.*'one'"),
        ({"policies": [Bulkhead]}, "policies must be guards"),
        ({"exempt": "/livez"}, "exempt must hold paths"),
        ({"exempt": ["livez"]}, "exempt must hold paths.*'livez'"),
        ({"answers": 503}, "answers must be a mapping.*503"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_settings_that_are_none_are_refused_where_they_are_given(settings, reason):
    with pytest.raises((TypeError, ValueError), match=reason):
        SeawallMiddleware(answering(), **settings)


async def test_an_answer_that_is_none_is_told_to_whoever_wrote_it(client):
    app = SeawallMiddleware(raising(BulkheadFullError("reports")), answers={BulkheadFullError: lambda error: 503})
    with pytest.raises(TypeError, match="answer to BulkheadFullError must be an Answer, its function gave 503"):
        await client(app).finish()


async def test_a_priority_that_can_not_be_told_leaves_nothing_behind(client):
    request = client(SeawallMiddleware(answering(), priority=lambda scope: "high"))
    with pytest.raises(ValueError, match="'high'"):
        await request.finish()
    assert "seawall" not in request.scope


async def test_a_limiter_per_client_is_asked_by_the_request(client):
    per_client = KeyedRateLimiter(
        "per client", rate=1, burst=1, key=lambda exchange: dict(exchange.scope["headers"]).get(b"authorization")
    )
    app = SeawallMiddleware(answering(), policies=[per_client])
    assert (await client(app, headers=[("authorization", "a")]).finish()).status == 200
    refused = await client(app, headers=[("authorization", "a")]).finish()
    assert refused.status == 429
    assert refused.headers["ratelimit-policy"] == '"per client";q=1;w=1'
    assert (await client(app, headers=[("authorization", "b")]).finish()).status == 200


async def test_a_request_is_over_in_the_time_its_client_waits(client):
    left = []

    async def app(scope, receive, send):
        left.append(time_left())
        await asyncio.sleep(100)

    done = await client(SeawallMiddleware(app, timeout=5.0), headers=[("grpc-timeout", "2S")]).finish()
    assert left == [pytest.approx(2.0)]
    assert asyncio.get_running_loop().time() == pytest.approx(2.0)
    assert done.status == 504
    assert json.loads(done.body)["code"] == "deadline_exceeded"


async def test_a_client_can_shorten_the_limit_but_not_lengthen_it(client):
    left = []

    async def app(scope, receive, send):
        left.append(time_left())

    for said in ("1H", "1S", "junk"):
        await client(SeawallMiddleware(app, timeout=5.0), headers=[("grpc-timeout", said)]).finish()
    await client(SeawallMiddleware(app, timeout=5.0)).finish()
    mistrusting = SeawallMiddleware(app, timeout=5.0, trust_deadlines=False)
    await client(mistrusting, headers=[("grpc-timeout", "1S")]).finish()
    assert left == [pytest.approx(seconds) for seconds in (5.0, 1.0, 5.0, 5.0, 5.0)]


async def test_no_work_is_done_for_a_client_that_waits_no_more(client):
    worked = []

    async def app(scope, receive, send):
        worked.append(scope)

    late = await client(SeawallMiddleware(app), headers=[("x-request-deadline", str(int(time.time()) - 5))]).finish()
    assert late.status == 504
    assert late.headers["x-should-retry"] == "false"
    assert worked == []


async def test_the_application_tells_the_priority_of_a_request(client):
    seen = []

    async def app(scope, receive, send):
        seen.append(current_priority.get())

    by_path = lambda scope: Priority.CRITICAL if scope["path"] == "/" else Priority.LOW
    await client(SeawallMiddleware(app, priority=by_path)).finish()
    assert seen == [Priority.CRITICAL]
    assert current_priority.get() is Priority.NORMAL


# The client leaves.


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_client_that_leaves_cancels_its_request_which_counts_as_neither(client, method):
    cancelled = []
    front = CircuitBreaker("front")
    places = Bulkhead("places", max_concurrent=1)

    async def app(scope, receive, send):
        if method == "POST":
            await receive()
        try:
            await forever(scope, receive, send)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    body = b"hello" if method == "POST" else b""
    left = client(SeawallMiddleware(app, policies=[front, places]), method=method, body=body).begin()
    await asyncio.sleep(0.03)
    assert places.snapshot().active == 1
    left.leave()
    await asyncio.wait_for(left.finish(), 5)
    assert cancelled == [True]
    assert left.messages == []
    assert places.snapshot().active == 0
    assert front.snapshot().failures == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_application_that_listens_is_told_and_not_cancelled(client):
    heard = []

    async def app(scope, receive, send):
        await receive()
        heard.append(await receive())

    left = client(SeawallMiddleware(app)).begin()
    await asyncio.sleep(0.03)
    left.leave()
    await asyncio.wait_for(left.finish(), 5)
    assert heard == [{"type": "http.disconnect"}]


async def test_an_application_that_begins_to_listen_late_is_told_too(client):
    heard = []

    async def app(scope, receive, send):
        await receive()
        await asyncio.sleep(0.04)  # by now somebody else waits for the server's word
        heard.append(await receive())

    left = client(SeawallMiddleware(app)).begin()
    await asyncio.sleep(0.06)
    left.leave()
    await asyncio.wait_for(left.finish(), 5)
    assert heard == [{"type": "http.disconnect"}]


async def test_a_body_that_nobody_reads_stays_where_it_is(client):
    read = []

    async def app(scope, receive, send):
        await asyncio.sleep(0.04)
        read.append(await receive())
        await answering()(scope, receive, send)

    done = await client(SeawallMiddleware(app), method="POST", body=b"hello").finish()
    assert read[0]["body"] == b"hello"
    assert done.status == 200


async def test_the_empty_body_that_the_watcher_read_is_there_for_the_application(client):
    read = []

    async def app(scope, receive, send):
        await asyncio.sleep(0.04)
        read.append(await receive())
        await answering()(scope, receive, send)

    await client(SeawallMiddleware(app)).finish()
    assert read[0]["type"] == "http.request"


async def test_work_after_the_answer_goes_on_when_the_client_leaves(client):
    done = []

    async def app(scope, receive, send):
        await answering()(scope, receive, send)
        await asyncio.sleep(0.05)
        done.append(True)

    await client(SeawallMiddleware(app)).finish()
    assert done == [True]


async def test_a_cancellation_from_the_server_stays_one(client):
    stopped = client(SeawallMiddleware(forever)).begin()
    await asyncio.sleep(0.03)
    stopped.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopped.finish()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_application_that_swallows_the_cancellation_leaves_none_behind(client):
    async def app(scope, receive, send):
        with contextlib.suppress(asyncio.CancelledError):
            await forever(scope, receive, send)

    left = client(SeawallMiddleware(app))

    async def request():
        await left.app(left.scope, left.receive, left.send)
        return asyncio.current_task().cancelling()

    task = asyncio.create_task(request())
    await asyncio.sleep(0.03)
    left.leave()
    assert await asyncio.wait_for(task, 5) == 0


async def test_web_sockets_and_the_lifespan_pass(client):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    guarded = SeawallMiddleware(app, policies=[Bulkhead("none", max_concurrent=1)])
    for kind in ("lifespan", "websocket"):
        await guarded({"type": kind}, None, None)
    assert seen == ["lifespan", "websocket"]


async def test_a_quick_request_starts_no_task(client):
    tasks = []

    async def app(scope, receive, send):
        tasks.append(len(asyncio.all_tasks()))
        await answering()(scope, receive, send)

    for _ in range(3):
        guarded = client(SeawallMiddleware(app, policies=[LoadShedder("front")], timeout=5.0))
        await guarded.app(guarded.scope, guarded.receive, guarded.send)
    assert tasks == [1, 1, 1]
