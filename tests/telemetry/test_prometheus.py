"""The collector: names, buckets, exemplars, bounded labels, and counters that never go back."""

from __future__ import annotations

import asyncio
import gc
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from seawall import (
    SLO,
    AdaptiveBulkhead,
    Bulkhead,
    Cache,
    CircuitBreaker,
    CircuitOpenError,
    Fallback,
    Hedge,
    Keyed,
    KeyedRateLimiter,
    LoadShedder,
    Pipeline,
    RateLimiter,
    Retry,
    Timeout,
    use_clock,
)
from seawall.core import watching
from seawall.core.policy import GuardPolicy
from seawall.engine.deployment import Deployment
from seawall.engine.downgrade import Downgrade
from seawall.engine.metering import EngineMeter
from seawall.engine.replicas import Replicas
from seawall.engine.stepping import Memory
from seawall.engine.supervision import Supervised
from seawall.slo.brownout import BrownOut, Refuse
from seawall.telemetry import TelemetryConflictError, install
from seawall.telemetry.names import prometheus_name
from seawall.telemetry.prometheus import PoliciesCollector
from seawall.telemetry.readings import DESCRIPTIONS
from seawall.testing import VirtualClock

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def registry():
    registry = CollectorRegistry()
    uninstall = install(registry=registry)
    yield registry
    uninstall()
    assert generate_latest(registry) == b""


def value(registry, name, **labels):
    return registry.get_sample_value(name, labels)


def takes(clock, *seconds, policies=(), name="work"):
    """Calls that take so long each."""

    @Pipeline(*(policies or (Timeout("t", 1e6),)), name=name)
    async def work(duration):
        clock.advance(duration)

    async def main():
        for duration in seconds:
            await work(duration)

    with use_clock(clock):
        asyncio.run(main())


def buckets(registry, **labels):
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name == "seawall_pipeline_duration_seconds_bucket" and labels.items() <= sample.labels.items():
                found[float(sample.labels["le"])] = sample.value
    return found


def test_durations_fall_into_buckets_and_a_bound_belongs_to_the_one_below(registry):
    takes(VirtualClock(), 0.25, 0.3, 20.0)
    found = buckets(registry, pipeline_name="work", outcome="success")
    assert (found[0.1], found[0.25], found[0.5], found[10.0], found[float("inf")]) == (0, 1, 2, 2, 3)
    labels = {"pipeline_name": "work", "outcome": "success", "error_type": ""}
    assert value(registry, "seawall_pipeline_duration_seconds_sum", **labels) == pytest.approx(20.55)


def test_plain_functions_and_failures_fall_into_the_same_buckets(registry):
    clock = VirtualClock()

    @Pipeline(CircuitBreaker("b"), name="plain")
    def plain(fails):
        clock.advance(0.25)
        if fails:
            raise ConnectionError

    with use_clock(clock):
        plain(fails=False)
        with pytest.raises(ConnectionError):
            plain(fails=True)
    for outcome in ("success", "failure"):
        found = buckets(registry, pipeline_name="plain", outcome=outcome)
        assert (found[0.1], found[0.25], found[float("inf")]) == (0, 1, 1)


def test_the_latency_of_an_objective_is_a_bound_also_after_it_changes(registry):
    slo, clock = SLO("s", target=0.9, latency=0.3), VirtualClock()
    takes(clock, 0.29, 0.31, policies=(slo,))
    assert buckets(registry, pipeline_name="work")[0.3] == 1
    slo.update(latency=0.42)
    generate_latest(registry)
    takes(clock, 0.41, policies=(slo,))
    assert buckets(registry, pipeline_name="work")[0.42] == 2  # what took 0.31 is told with those above: nobody knows
    assert buckets(registry, pipeline_name="work")[float("inf")] == 3


def test_every_kind_of_function_and_stack_is_timed_once_a_call(registry):
    clock = VirtualClock()

    def guarded(fn, *policies):
        return Pipeline(*policies, name=fn.__name__)(fn)

    async def coroutine():
        clock.advance(1.0)

    def plain():
        clock.advance(1.0)

    def generator():
        yield clock.advance(1.0)

    async def stream():
        yield clock.advance(1.0)

    async def around():
        clock.advance(1.0)

    async def cached():
        clock.advance(1.0)

    async def judged():
        clock.advance(1.0)

    async def keyed():
        clock.advance(1.0)

    async def opened():
        yield clock.advance(1.0)

    breaker, retry = CircuitBreaker("b"), Retry("r", on=KeyError)

    async def main():
        await guarded(coroutine, breaker)()
        await guarded(around, retry, breaker)()
        await guarded(cached, Cache("c", ttl=9.0), breaker)()
        await guarded(judged, CircuitBreaker("j", on_result=bool))()
        await guarded(keyed, Keyed("k", CircuitBreaker, key=lambda: "one"))()
        async for _ in guarded(stream, breaker)():
            pass
        async for _ in guarded(opened, Fallback("f", value=0), breaker)():
            pass

    with use_clock(clock):
        guarded(plain, retry, breaker)()
        list(guarded(generator, breaker)())
        asyncio.run(main())
    for fn in (coroutine, plain, generator, stream, around, cached, judged, keyed, opened):
        labels = {"pipeline_name": fn.__name__, "outcome": "success", "error_type": ""}
        assert value(registry, "seawall_pipeline_duration_seconds_count", **labels) == 1, fn
        assert value(registry, "seawall_pipeline_duration_seconds_sum", **labels) == 1.0, fn


def test_failures_refusals_and_cancellations_are_told_apart(registry):
    @Pipeline(CircuitBreaker("b", consecutive_failures=1), name="work")
    async def work():
        raise ConnectionError

    async def main():
        for error in (ConnectionError, CircuitOpenError):
            with pytest.raises(error):
                await work()
        task = asyncio.create_task(Pipeline(Timeout("t", 9.0), name="work")(asyncio.Event().wait)())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    for outcome, error in (("failure", "ConnectionError"), ("rejected", "CircuitOpenError"), ("cancelled", "")):
        labels = {"pipeline_name": "work", "outcome": outcome, "error_type": error}
        assert value(registry, "seawall_pipeline_duration_seconds_count", **labels) == 1, outcome


def test_nothing_is_timed_while_nobody_reads(registry):
    takes(VirtualClock(), 1.0, name="seen")
    uninstalled = CollectorRegistry()
    assert watching.timing
    install(registry=uninstalled)()
    takes(VirtualClock(), 1.0, name="seen")  # the first exporter still reads
    assert buckets(registry, pipeline_name="seen")[float("inf")] == 2


def test_calls_that_are_kept_as_spans_are_exemplars(provider):
    registry = CollectorRegistry()
    uninstall = install(registry=registry, tracer_provider=provider)
    takes(VirtualClock(), 0.3)
    (span,) = provider.finished()
    text = generate_openmetrics(registry).decode()
    uninstall()
    line = next(line for line in text.splitlines() if 'le="0.5"' in line and 'pipeline_name="work"' in line)
    assert f'trace_id="{span.context.trace_id:032x}"' in line
    assert f'span_id="{span.context.span_id:016x}"' in line


def test_names_beyond_the_first_two_hundred_share_one_and_no_count_is_lost(registry):
    kept = [Bulkhead(f"tenant {number}", max_concurrent=1) for number in range(250)]
    for places in kept:
        with places.scope():
            pass
    rows = [
        sample
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "seawall_bulkhead_calls_total" and sample.labels["outcome"] == "finished"
    ]
    assert len(rows) == 201
    assert sum(sample.value for sample in rows) == 250
    assert next(sample.value for sample in rows if sample.labels["policy_name"] == "_other") == 50


def test_a_policy_per_key_has_no_metric_per_key(registry):
    hosts = Keyed("hosts", CircuitBreaker, key=str)
    guarded = hosts(lambda host: host)
    for number in range(300):
        guarded(number)
    assert value(registry, "seawall_keyed_calls_total", policy_name="hosts", outcome="success") == 300
    assert 'seawall_breaker_calls_total{outcome="success",policy_name="299"}' not in generate_latest(registry).decode()


def test_functions_and_errors_beyond_some_hundred_share_a_name_too(registry):
    for number in range(250):
        Pipeline(Fallback("f", value=0), name=f"function {number}").call_sync(len, "")
        assert watching.error_type(type(f"Error{number}", (Exception,), {})())
    assert len(watching._sites) == 201
    assert watching.error_type(type("Another", (Exception,), {})()) == "_OTHER"


def test_what_a_dropped_policy_counted_stays_counted(registry):
    def finished():
        return value(registry, "seawall_bulkhead_calls_total", policy_name="short lived", outcome="finished")

    places = Bulkhead("short lived", max_concurrent=1)
    with places.scope():
        pass
    assert finished() == 1
    del places
    gc.collect()
    assert finished() == 1
    places = Bulkhead("short lived", max_concurrent=1)
    with places.scope():
        pass
    assert finished() == 2


def test_policies_of_one_name_add_up_and_of_states_the_worst_is_told(registry):
    kept = [CircuitBreaker("pair"), CircuitBreaker("pair", consecutive_failures=1)]
    with pytest.raises(KeyError), kept[1].scope():
        raise KeyError
    assert value(registry, "seawall_breaker_state", policy_name="pair", state="open") == 1
    assert value(registry, "seawall_breaker_calls_total", policy_name="pair", outcome="failure") == 1


def test_a_second_exporter_in_one_registry_is_refused(registry):
    with pytest.raises(TelemetryConflictError, match="already"):
        install(registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(PoliciesCollector())
    with pytest.raises(ValueError, match="Duplicated"):
        Counter("seawall_breaker_calls", "The application's own.", registry=registry)


def test_every_reading_has_a_description_and_its_name_a_unit(registry):
    kept = everything()
    names = {family.name for family in registry.collect()}
    del kept
    assert names <= {prometheus_name(metric) for metric in DESCRIPTIONS}


def test_a_policy_of_the_users_own_kind_is_exported_too(registry):
    class Gate(GuardPolicy):
        kind = "gate"

        def counters(self):
            return {"opened": 2}

        def gauges(self):
            return {"height": 3.0}

    gate = Gate("front")
    gate._register()
    assert registry.get_sample_value("seawall_gate_calls_total", {"policy_name": "front", "outcome": "opened"}) == 2
    assert registry.get_sample_value("seawall_gate_height", {"policy_name": gate.name}) == 3


def test_what_an_engine_counted_stays_when_it_is_opened_again_and_never_goes_back_meanwhile():
    meter = EngineMeter("tiny")
    meanwhile = []

    def look():
        if meanwhile:
            meanwhile.pop()()
        return meter.as_of(memory=Memory(prefix_queries=10, prefix_hits=4))

    for before in (0, 10):
        meanwhile.append(meter.close)  # the engine is closed in another thread while somebody reads
        meter.open(look)
        seen = [meter.counters() for _ in range(3)]
        assert [one["prefix_queries."] for one in seen] == 3 * [before + 10]
    assert seen[-1]["prefix_hits."] == 8


def everything():
    nothing = SimpleNamespace(close=lambda: None)
    return [
        SLO("n", target=0.9, latency=0.3),
        CircuitBreaker("n"),
        Bulkhead("n", max_concurrent=1),
        AdaptiveBulkhead("n"),
        RateLimiter("n", rate=1.0),
        KeyedRateLimiter("n", rate=1.0, key=str),
        Timeout("n", 1.0),
        Retry("n", on=KeyError),
        Hedge("n", delay=1.0),
        Fallback("n", value=0),
        Cache("n", ttl=1.0),
        LoadShedder("n"),
        Keyed("n", CircuitBreaker, key=str),
        EngineMeter("n"),
        Deployment("n", nothing),
        Supervised("n", lambda: nothing),
        Replicas("n", {"a": nothing}),
        Downgrade("n", nothing, nothing),
        BrownOut("n", [Refuse()]),
    ]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian: apt install prometheus)")
def test_promtool_finds_nothing_wrong_with_the_metrics(registry):
    kept = everything()
    takes(VirtualClock(), 0.1)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )
    del kept
    assert (done.returncode, done.stderr.decode(), done.stdout.decode()) == (0, "", "")


def test_hostile_names_are_escaped(registry):
    kept = Bulkhead('say "hi" {} \\', max_concurrent=3)
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    labels = [sample.labels["policy_name"] for sample in families["seawall_bulkhead_limit"].samples]
    assert labels == [kept.name]
