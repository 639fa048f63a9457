"""Whether a process lives, and whether it should get requests."""

from __future__ import annotations

import json
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from seawall import Bulkhead, CircuitBreaker
from seawall.web import Health, SeawallMiddleware


def test_a_process_is_ready_when_everything_holds():
    assert Health(checks={"model": lambda: True}, critical=[CircuitBreaker("db")]).ready()[0] == 200


@pytest.mark.parametrize("shut", ["force_open", "isolate"])
def test_an_open_critical_breaker_fails_readiness_and_never_liveness(shut):
    breaker = CircuitBreaker("db")
    health = Health(critical=[breaker])
    getattr(breaker, shut)()
    assert health.ready() == (503, {"status": "not ready", "failed": ["breaker db"]})
    assert health.live()[0] == 200
    breaker.reset()
    assert health.ready()[0] == 200


def test_a_check_that_raises_does_not_hold():
    def broken():
        raise OSError

    assert Health(checks={"disk": broken, "model": lambda: False}).ready()[1]["failed"] == ["disk", "model"]


def test_a_draining_process_lives_and_is_not_ready():
    health = Health()
    health.drain()
    assert health.draining
    assert health.ready() == (503, {"status": "not ready", "failed": ["draining"]})
    assert health.live()[0] == 200


@pytest.mark.parametrize(("path", "status"), [("/livez", 200), ("/health/readyz/", 200), ("/", 404), ("/livez/x", 404)])
@pytest.mark.asyncio
async def test_it_is_an_application_of_both_kinds(path, status, client):
    health = Health()
    request = client(health.asgi)
    request.scope["path"] = path
    done = await request.finish()
    assert done.status == status
    environ = {"PATH_INFO": path, "QUERY_STRING": "", "SCRIPT_NAME": ""}
    setup_testing_defaults(environ)
    said = []
    body = validator(health.wsgi)(environ, lambda line, headers, exc=None: said.append(line) or (lambda data: None))
    assert json.loads(b"".join(body)) == json.loads(done.body)
    body.close()
    assert said[0].startswith(str(status))


@pytest.mark.asyncio
async def test_probes_beside_a_full_application_are_answered(client):
    full = Bulkhead("front", max_concurrent=1)
    health = Health()
    guarded = SeawallMiddleware(health.asgi, policies=[full])

    async def routed(scope, receive, send):
        probe = scope["path"].endswith("z")
        await (health.asgi if probe else guarded)(scope, receive, send)

    with full.scope():
        request = client(routed)
        request.scope["path"] = "/livez"
        assert (await request.finish()).status == 200
        assert (await client(routed).finish()).status == 503


def test_what_it_is_given_is_checked():
    with pytest.raises(TypeError, match="circuit breakers"):
        Health(critical=[Bulkhead("b", max_concurrent=1)])
    with pytest.raises(TypeError, match="plain function"):
        Health(checks={"model": True})

    async def ready():
        return True

    with pytest.raises(TypeError, match="never be awaited"):
        Health(checks={"model": ready})


@pytest.mark.asyncio
async def test_a_socket_is_refused(client):
    with pytest.raises(ValueError, match="over HTTP"):
        await Health().asgi({"type": "websocket"}, None, None)
