"""The presets, against a real server over real sockets and against scripted models in virtual time."""

from __future__ import annotations

import asyncio
import http.server
import math
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate
from types import SimpleNamespace

import pytest

from seawall import CallTimeoutError, CircuitOpenError, DeadlineExceededError, presets, use_clock
from seawall.policies.retry_budget import RetryBudget
from seawall.testing import VirtualClock, run


class Service(http.server.BaseHTTPRequestHandler):
    """Answers with the next status of its script."""

    script = ()

    def do_GET(self):
        status, headers = self.script.pop(0) if self.script else (200, {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def service():
    handler = type("Scripted", (Service,), {"script": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/", script=handler.script)
    server.shutdown()
    thread.join()
    server.server_close()


def fetching(service, **settings):
    @presets.http_client("bank", on=ConnectionError, **settings)
    async def fetch():
        def get():
            with urllib.request.urlopen(service.url) as response:
                return response.status

        return await asyncio.to_thread(get)

    return fetch


def test_a_service_that_asks_for_a_moment_gets_it(service):
    service.script += [(503, {"Retry-After": "0"}), (429, {"Retry-After": "0"})]
    assert asyncio.run(fetching(service)()) == 200
    assert service.script == []


def test_a_mistake_of_ours_is_not_repeated(service):
    service.script += [(404, {})]
    with pytest.raises(urllib.error.HTTPError) as caught:
        asyncio.run(fetching(service)())
    caught.value.close()
    assert service.script == []


def test_a_service_that_names_a_time_past_the_deadline_is_not_asked_again(service):
    service.script += [(503, {"Retry-After": "3600"}), (500, {})]
    with pytest.raises(urllib.error.HTTPError) as caught:
        asyncio.run(fetching(service)())
    caught.value.close()
    assert len(service.script) == 1


def responses(*statuses):
    answers = iter(statuses)

    async def fetch():
        return SimpleNamespace(status_code=next(answers), headers={})

    return fetch


def test_clients_that_return_errors_are_understood_too():
    fetch = presets.http_client("bank")(responses(503, 502, 200))

    async def main():
        return (await fetch()).status_code

    assert run(main()) == 200


def test_server_errors_open_the_breaker_and_client_errors_do_not():
    fetch = presets.http_client("bank", attempts=1)(responses(*[404] * 30, *[500] * 60))

    async def main():
        statuses = []
        while True:
            try:
                statuses.append((await fetch()).status_code)
            except CircuitOpenError:
                return statuses

    statuses = run(main())
    assert statuses[:30] == [404] * 30
    assert 30 <= len(statuses) <= 61


def test_each_attempt_and_all_of_them_are_bounded():
    called = []

    @presets.http_client("bank", timeout=2.0, deadline=3.0, attempts=5)
    async def fetch():
        called.append(asyncio.get_running_loop().time())
        await asyncio.Event().wait()

    async def main():
        with pytest.raises((DeadlineExceededError, CallTimeoutError)):
            await fetch()
        return asyncio.get_running_loop().time()

    assert run(main()) <= 3.0
    assert len(called) == 2


def test_one_budget_serves_several_callers():
    budget = RetryBudget("bank", floor=1, window=10.0)
    fetches = [presets.http_client(name, budget=budget)(responses(*[503] * 9)) for name in ("a", "b")]

    async def main():
        for fetch in fetches * 3:
            assert (await fetch()).status_code == 503

    run(main())
    assert budget.snapshot().calls == 6
    assert budget.snapshot().refused > 0


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (SimpleNamespace(status_code=200), 200),
        (SimpleNamespace(status=503), 503),
        (SimpleNamespace(response=SimpleNamespace(status_code=429)), 429),
        (SimpleNamespace(status="running"), None),
        (SimpleNamespace(status=True), None),
        (None, None),
        (OSError(), None),
    ],
)
def test_a_status_is_found_where_clients_keep_it(outcome, status):
    assert presets.status_of(outcome) == status


def with_header(value):
    return SimpleNamespace(headers={"retry-after": value})


@pytest.mark.parametrize("value", ["", "soon", "-1", "1e3", "0x10", "٣", None, 7])
def test_an_unreadable_retry_after_is_none(value):
    assert presets.retry_after_of(with_header(value)) is None


def test_a_retry_after_is_seconds_or_a_date_and_a_past_one_is_now():
    assert presets.retry_after_of(with_header(" 120 ")) == 120.0
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 80 < presets.retry_after_of(with_header(later)) <= 90
    assert presets.retry_after_of(with_header("Wed, 21 Oct 2015 07:28:00 GMT")) == 0.0
    assert presets.retry_after_of(SimpleNamespace()) is None


def test_a_retry_after_of_more_digits_than_make_sense_is_not_taken_for_none():
    assert presets.retry_after_of(with_header("99999999999")) == 99999999999.0
    assert presets.retry_after_of(with_header("9" * 400)) == math.inf


@pytest.fixture
def new_york(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_retry_after_date_without_a_zone_is_universal_time_wherever_we_are(new_york):
    soon = time.time() + 90
    for date in (formatdate(soon), time.asctime(time.gmtime(soon))):
        assert 80 < presets.retry_after_of(with_header(date)) <= 90


def test_without_a_timeout_of_its_own_the_http_client_guards_plain_functions():
    answers = [503, 429, 200]

    @presets.http_client("bank", timeout=None)
    def fetch():
        return SimpleNamespace(status_code=answers.pop(0), headers={"Retry-After": "1"})

    clock = VirtualClock()
    with use_clock(clock):
        assert fetch().status_code == 200
    assert clock.slept == pytest.approx([1, 1], abs=0.2)


def test_a_model_is_guarded_as_a_stream_and_its_users_mistakes_say_nothing_about_it():
    guard = presets.model("smollm2", timeout=2.0)
    slo, places, breaker, _ = guard.policies

    @guard
    async def pieces(prompt):
        if not prompt:
            raise ValueError("empty")
        yield prompt
        await asyncio.sleep(1.5)
        yield "and"
        await asyncio.sleep(1.5)
        yield "so on"

    async def main():
        for _ in range(10):
            with pytest.raises(ValueError, match="empty"):
                await anext(pieces(""))
        return [piece async for piece in pieces("salt")]

    assert run(main()) == ["salt", "and", "so on"]
    assert (slo.snapshot().good, slo.snapshot().bad) == (1, 0)
    assert breaker.snapshot().failures == 0
    assert places.snapshot().active == 0


def test_a_model_that_hangs_is_given_up_and_then_left_alone():
    @presets.model("smollm2", timeout=1.0)
    async def answer():
        await asyncio.Event().wait()

    async def main():
        for _ in range(5):
            with pytest.raises(CallTimeoutError):
                await answer()
        with pytest.raises(CircuitOpenError):
            await answer()

    run(main())
