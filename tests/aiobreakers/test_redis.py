"""aiobreaker's Redis storage on a real server, started for these tests where one is installed."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from datetime import timedelta

import aiobreaker
import pytest
from aiobreaker.storage import CircuitRedisStorage

from seawall import CircuitBreaker, State
from seawall.aiobreakers import BridgedBreaker, CircuitBreakerError, from_aiobreaker
from seawall.testing import AsyncScript, Script

redis = pytest.importorskip("redis")
SERVER = shutil.which("redis-server")
pytestmark = pytest.mark.skipif(SERVER is None, reason="needs redis-server (Debian: apt install redis-server)")
CLOSED, OPEN = aiobreaker.CircuitBreakerState.CLOSED, aiobreaker.CircuitBreakerState.OPEN


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("redis")
    path = folder / "socket"
    options = ["--port", "0", "--unixsocket", str(path), "--dir", str(folder), "--save", "", "--appendonly", "no"]
    server = subprocess.Popen([SERVER, *options], stdout=subprocess.DEVNULL)
    client = redis.Redis(unix_socket_path=str(path))
    try:
        for _ in range(100):  # until it listens
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert server.poll() is None
                time.sleep(0.05)
        yield client
    finally:
        client.close()
        server.terminate()
        server.wait(30)


@pytest.fixture
def storage(client):
    client.flushall()
    return lambda: CircuitRedisStorage(CLOSED, client, namespace="bank")


def bridge(storage, **settings):
    return BridgedBreaker(
        CircuitBreaker("bank", **{"consecutive_failures": 3, "reset_timeout": 30, **settings}), storage=storage
    )


def fail(policy):
    with pytest.raises(ConnectionError):
        policy(Script(ConnectionError("down")))()


def test_two_processes_and_an_old_one_share_one_circuit(storage):
    old = aiobreaker.CircuitBreaker(fail_max=3, timeout_duration=timedelta(seconds=30), state_storage=storage())
    one, other = bridge(storage()), bridge(storage())
    fail(one)
    fail(from_aiobreaker(old))
    fail(other)  # the third in a row, of three
    assert storage().state is OPEN
    for policy in (one, other, from_aiobreaker(old)):
        with pytest.raises(CircuitBreakerError) as caught:
            policy(Script())()
        assert 28 < caught.value.retry_after <= 30  # Redis keeps whole seconds
    old.close()
    for policy in (one, other, from_aiobreaker(old)):
        assert policy(Script("ok"))() == "ok"
    assert (one.breaker.state, storage().counter) == (State.CLOSED, 0)


def test_coroutines_share_it_too(storage):
    one, other = bridge(storage(), consecutive_failures=1), bridge(storage())

    async def main():
        with pytest.raises(ConnectionError):
            await one(AsyncScript(ConnectionError("down")))()
        with pytest.raises(CircuitBreakerError):
            await other(AsyncScript())()

    asyncio.run(main())


def test_without_the_server_each_goes_on_alone(client, storage, caplog):
    impatient = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    lost = redis.Redis(unix_socket_path="/nowhere/redis", retry=impatient)
    policy = bridge(CircuitRedisStorage.__new__(CircuitRedisStorage), consecutive_failures=1)
    policy.storage.__init__(CLOSED, client)
    policy.storage._redis = lost
    assert policy(Script("ok"))() == "ok"
    fail(policy)
    assert policy.breaker.state is State.OPEN
    assert "RedisError" in caplog.text
    lost.close()
