"""The transports of httpx, against a real server that fails on purpose."""

from __future__ import annotations

import asyncio
import gc

import httpx
import pytest

from seawall import (
    BulkheadFullError,
    CircuitOpenError,
    Deadline,
    DeadlineExceededError,
    DeadlinePassedError,
    Hedge,
    RateLimitedError,
    RateLimiter,
    Retry,
    Timeout,
    use_clock,
)
from seawall.web.outgoing import HostPolicies, host_policies
from seawall.web.outgoing.httpx import AsyncSeawallTransport, SeawallTransport
from tests.cancelling import CancelAt
from tests.web.outgoing.faulty import serving


class Sync:
    """A client whose calls are awaited, so that one test serves both kinds."""

    def __init__(self, policies, **transport):
        self.transport = httpx.HTTPTransport(**transport)
        self.client = httpx.Client(transport=SeawallTransport(self.transport, policies=policies), timeout=10)

    async def request(self, method, url, **options):
        return await asyncio.to_thread(self.client.request, method, url, **options)

    async def open(self, url):
        return self.client.send(self.client.build_request("GET", url), stream=True)

    async def first(self, response):
        return next(response.iter_raw())

    async def close(self, response):
        response.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.client.close()


class Async:
    def __init__(self, policies, **transport):
        self.transport = httpx.AsyncHTTPTransport(**transport)
        self.client = httpx.AsyncClient(transport=AsyncSeawallTransport(self.transport, policies=policies), timeout=10)

    async def request(self, method, url, **options):
        return await self.client.request(method, url, **options)

    async def open(self, url):
        return await self.client.send(self.client.build_request("GET", url), stream=True)

    async def first(self, response):
        return await anext(response.aiter_raw())

    async def close(self, response):
        await response.aclose()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.client.aclose()


@pytest.fixture(params=[Async, Sync])
def client(request):
    return request.param


pytestmark = pytest.mark.asyncio


def at(policies, host, kind):
    """The policy of a host."""
    keyed = {guard.name.rpartition(".")[2]: guard for guard in policies.guards.members}[kind]
    return keyed[host].policy


async def emptied(places):
    """Those who lost a race or were cancelled end in the background."""
    while places.snapshot().active:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0)


def quick(**settings):
    """Policies whose pauses no test has to wait for."""
    policies = host_policies(**settings)
    make = policies.retry.factory

    def retry(host):
        found = make(host)
        found.wait_initial, found.wait_max = 0.0001, 0.001
        return found

    policies.retry.factory = retry
    return policies


@pytest.mark.parametrize("fault", ["status 503", "status 429", "status 502", "status 504", "reset"])
async def test_a_call_that_may_be_repeated_is_until_it_is_served(client, fault):
    async with client(quick()) as calls:
        with serving(fault, fault) as server:
            response = await calls.request("GET", server.url)
            assert (response.status_code, response.content) == (200, b"ok")
            assert len(server.seen) == 3


async def test_a_call_that_changes_something_is_made_once_unless_it_has_a_key(client):
    async with client(quick()) as calls:
        with serving("status 503", "status 503", "ok") as server:
            assert (await calls.request("POST", server.url, content=b"x")).status_code == 503
            keyed = await calls.request("POST", server.url, content=b"pay", headers={"Idempotency-Key": "1"})
            assert keyed.status_code == 200
            assert [body for *_, body in server.seen] == [b"x", b"pay", b"pay"]


async def test_a_body_that_can_not_be_sent_again_is_sent_once():
    async def pieces():
        yield b"piece"

    async with Async(quick()) as calls:
        with serving("status 503") as server:
            assert (await calls.request("PUT", server.url, content=pieces())).status_code == 503
            assert len(server.seen) == 1


async def test_the_last_answer_is_the_callers_with_its_body(client):
    async with client(quick(attempts=2)) as calls:
        with serving("status 503", "status 503") as server:
            response = await calls.request("GET", server.url)
            assert (response.status_code, response.content) == (503, b"not now")


async def test_nothing_comes_before_a_host_said_to_come_back(client):
    async with client(quick()) as calls:
        with serving("status 503 1000") as server:  # longer than the deadline allows
            assert (await calls.request("GET", server.url)).status_code == 503
            assert len(server.seen) == 1


async def test_what_is_retried_costs_no_second_connection(client):
    async with client(quick()) as calls:
        with serving("status 503", "status 429") as server:
            await calls.request("GET", server.url)
            assert (len(server.seen), server.connections) == (3, 1)


async def test_a_dead_hosts_breaker_opens_and_no_other(client):
    policies = quick(attempts=1)
    async with client(policies) as calls:
        with serving() as alive, serving(*["reset"] * 30) as dead:
            failures = 0
            with pytest.raises(CircuitOpenError):
                while True:
                    with pytest.raises(httpx.TransportError):
                        await calls.request("GET", dead.url)
                    failures += 1
            assert (await calls.request("GET", alive.url)).status_code == 200
            assert failures == at(policies, dead.host, "breaker").minimum_calls


async def test_server_errors_count_against_a_host_and_client_errors_do_not(client):
    policies = quick(attempts=1)
    async with client(policies) as calls:
        with serving("status 500", "status 404", "status 429") as server:
            for _ in range(3):
                await calls.request("GET", server.url)
            breaker = at(policies, server.host, "breaker").snapshot()
            assert (breaker.failures, breaker.successes) == (1, 2)


async def test_an_answer_that_breaks_off_counts_against_a_host(client):
    policies = quick()
    async with client(policies) as calls:
        with serving("half") as server:
            with pytest.raises(httpx.RemoteProtocolError):
                await calls.request("GET", server.url)
            assert at(policies, server.host, "breaker").snapshot().failures == 1
            assert at(policies, server.host, "bulkhead").snapshot().active == 0


async def test_a_place_is_held_until_the_body_is_closed(client):
    policies = quick(max_concurrent=1, max_queued=0)
    async with client(policies) as calls:
        with serving("stream") as server:
            response = await calls.open(server.url)
            assert await calls.first(response) == b"first"
            assert at(policies, server.host, "bulkhead").snapshot().active == 1
            with pytest.raises(BulkheadFullError):
                await calls.request("GET", server.url)
            await calls.close(response)
            server.go_on.set()
            assert at(policies, server.host, "bulkhead").snapshot().active == 0
            assert (await calls.request("GET", server.url)).status_code == 200


async def test_a_retried_answer_of_unknown_length_gives_its_place_to_the_next_attempt(client):
    policies = quick(max_concurrent=1, max_queued=0)
    async with client(policies) as calls:
        with serving("stream 503", "ok") as server:
            assert (await calls.request("GET", server.url)).content == b"ok"
            assert at(policies, server.host, "bulkhead").snapshot().active == 0


async def test_a_response_that_is_dropped_unread_gives_its_place_back(client):
    policies = quick(max_concurrent=1)
    async with client(policies) as calls:
        with serving("stream") as server:
            response = await calls.open(server.url)
            places = at(policies, server.host, "bulkhead")
            assert places.snapshot().active == 1
            server.go_on.set()
            del response
            gc.collect()
            assert places.snapshot().active == 0


async def test_hosts_hear_how_long_their_caller_waits(client):
    async with client(quick(deadline=8.0)) as calls:
        with serving() as server:
            await calls.request("GET", server.url)
            await calls.request("GET", server.url, headers={"grpc-timeout": "1S"})
            heard = [headers for _, _, headers, _ in server.seen]
            assert 7000 < int(heard[0]["x-envoy-expected-rq-timeout-ms"]) <= 8000
            assert heard[0]["grpc-timeout"] == heard[0]["x-envoy-expected-rq-timeout-ms"] + "m"
            assert heard[1]["grpc-timeout"] == "1S"  # the application's own word stays


async def test_hosts_hear_nothing_where_nobody_waits_or_where_it_is_not_their_business(client):
    for policies in (HostPolicies(), HostPolicies(deadline=5.0, hand_on=False)):
        async with client(policies) as calls:
            with serving() as server:
                await calls.request("GET", server.url)
                assert "grpc-timeout" not in server.seen[0][2]


async def test_a_deadline_around_a_call_holds_for_it(client):
    async with client(HostPolicies()) as calls:
        with serving("wait") as server, pytest.raises((DeadlineExceededError, httpx.ReadTimeout)):
            async with Deadline("outer", 0.05).scope():
                await calls.request("GET", server.url)


async def test_a_call_whose_deadline_has_passed_is_not_made():
    async with Sync(HostPolicies()) as calls:
        with serving() as server:
            now = [0.0]
            with use_clock(lambda: now[0]), Deadline("outer", 5.0).scope():
                now[0] = 6.0
                with pytest.raises(DeadlinePassedError):
                    calls.client.get(server.url)
            assert server.seen == []


async def test_an_attempt_that_takes_too_long_is_made_again():
    policies = quick(timeout=0.1)
    async with Async(policies) as calls:
        with serving("wait") as server:
            response = await calls.request("GET", server.url)
            assert response.content == b"ok"
            assert at(policies, server.host, "breaker").snapshot().failures == 1
            assert len(calls.transport._pool.connections) == 1


async def test_a_hosts_sockets_get_no_more_than_the_attempts_time():
    async with Sync(quick(timeout=0.1)) as calls:
        with serving("wait") as server:
            assert (await calls.request("GET", server.url)).content == b"ok"
            assert len(server.seen) == 2


async def test_a_slow_host_is_asked_twice_and_the_quicker_answer_taken():
    policies = quick(hedge_after=0.02)
    async with Async(policies) as calls:
        with serving("wait") as server:
            assert (await calls.request("GET", server.url)).content == b"ok"
            assert len(server.seen) == 2
            places = at(policies, server.host, "bulkhead")
            await emptied(places)
            assert at(policies, server.host, "breaker").snapshot().failures == 0
            assert [c.is_idle() for c in calls.transport._pool.connections] == [True]


async def test_a_call_that_changes_something_is_not_hedged():
    async with Async(quick(hedge_after=0.0)) as calls:
        with serving() as server:
            await calls.request("PUT", server.url, content=b"x")
            assert len(server.seen) == 1


async def test_a_hedges_loser_that_answers_all_the_same_is_closed():
    policies = quick(hedge_after=0.0, attempts=1)
    async with Async(policies) as calls:
        with serving(*["ok"] * 20) as server:
            for _ in range(10):
                assert (await calls.request("GET", server.url)).content == b"ok"
            places = at(policies, server.host, "bulkhead")
            await emptied(places)
            connections = calls.transport._pool.connections
            assert all(one.is_idle() or one.is_closed() for one in connections)  # closed ones go at the next request


async def test_a_request_that_is_cancelled_at_any_await_leaves_no_connection_busy():
    reached, step = True, 0
    while reached:
        policies = quick(attempts=1)
        async with Async(policies) as calls:
            with serving("ok") as server:
                request = CancelAt(calls.request("GET", server.url), step)
                await asyncio.wait([task := asyncio.ensure_future(request)])
                assert task.cancelled() or not request.reached
                await emptied(at(policies, server.host, "bulkhead"))
                assert all(one.is_idle() or one.is_closed() for one in calls.transport._pool.connections), step
                reached, step = request.reached, step + 1
    assert step > 5


async def test_memory_for_hosts_has_an_end(client):
    policies = quick(max_hosts=3, attempts=1)
    async with client(policies) as calls:
        for port in range(10):
            with pytest.raises(httpx.HTTPError):
                await calls.request("GET", f"http://127.0.0.1:{port + 1}/")
    gc.collect()  # on Python 3.13 httpcore's errors are cycles, and who is in one is in use
    assert all(len(guard) <= 3 for guard in policies.guards.members)
    assert len(policies.retry) <= 3


async def test_redirects_are_calls_of_their_own(client):
    policies = quick()
    async with client(policies) as calls:
        with serving() as target, serving("status 302") as server:
            calls.client.follow_redirects = True
            server.script = [f"redirect {target.url}/"]
            assert (await calls.request("GET", server.url)).content == b"ok"
            assert at(policies, server.host, "breaker").snapshot().successes == 1
            assert at(policies, target.host, "breaker").snapshot().successes == 1


async def test_a_limit_for_all_hosts_together(client):
    policies = HostPolicies(guards=[RateLimiter("partners", rate=1, per=1000, burst=1)])
    async with client(policies) as calls:
        with serving() as server:
            await calls.request("GET", server.url)
            with pytest.raises(RateLimitedError):
                await calls.request("GET", server.url)


async def test_what_can_not_work_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match="event loop"):
        SeawallTransport(policies=host_policies(hedge_after=0.1))
    with pytest.raises(TypeError, match="give a timeout"):
        HostPolicies(guards=[Timeout("t", 1.0)])
    with pytest.raises(TypeError, match="put it on the function"):
        HostPolicies(guards=[Retry("r", on=OSError)])
    with pytest.raises(TypeError, match="retry must be a Retry"):
        HostPolicies(retry=Hedge("h", delay=1.0))
    with pytest.raises(ValueError, match="after"):
        HostPolicies(deadline=0)
