"""Prometheus, OpenTelemetry and the policies' own snapshots tell the same numbers, whatever happened."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry

from seawall import SLO, Bulkhead, CircuitBreaker, Pipeline, RateLimiter, Retry, use_clock
from seawall.engine import Usage
from seawall.engine.metering import EngineMeter
from seawall.telemetry import install
from seawall.telemetry.names import prometheus_name
from seawall.telemetry.otel import PIPELINE_CALLS
from seawall.telemetry.readings import TOKENS
from seawall.testing import VirtualClock

CALLS = st.lists(st.tuples(st.sampled_from(["well", "fail", "again", "leave"]), st.floats(0.0, 12.0)), max_size=40)


class Traffic:
    """A pipeline and what its calls were told to do."""

    def __init__(self, name: str) -> None:
        self.clock = VirtualClock()
        self.slo = SLO(name, target=0.9, latency=0.3)
        self.breaker = CircuitBreaker(name, consecutive_failures=3, reset_timeout=5.0)
        self.places = Bulkhead(name, max_concurrent=2)
        self.limiter = RateLimiter(name, rate=1.0, burst=5)
        self.retry = Retry(name, on=ConnectionError, wait=0)
        self.guarded = Pipeline(self.slo, self.retry, self.breaker, self.places, self.limiter, name=name)(self.work)
        self.ended = {"success": 0, "failure": 0, "rejected": 0, "cancelled": 0}

    async def work(self, does, seconds):
        self.clock.advance(seconds)
        if does == "fail" or (does == "again" and self.again.pop()):
            raise LookupError if does == "fail" else ConnectionError
        if does == "leave":
            raise asyncio.CancelledError

    async def call(self, does, seconds):
        self.again = [False, True]
        try:
            await self.guarded(does, seconds)
        except asyncio.CancelledError:
            self.ended["cancelled"] += 1
        except Exception as error:
            self.ended["rejected" if hasattr(error, "retry_after") else "failure"] += 1
        else:
            self.ended["success"] += 1


def providing(reader):
    """A provider that goes with its test: one that waits for the exit of the process keeps all its instruments."""
    return MeterProvider([reader], shutdown_on_exit=False)


def of_prometheus(registry):
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def of_opentelemetry(reader):
    data = reader.get_metrics_data()
    return {
        (metric.name, frozenset(point.attributes.items())): getattr(point, "value", None) or getattr(point, "sum", 0)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }


@given(calls=CALLS)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("histogram", [False, True])
def test_all_agree_with_the_counters(histogram, calls):
    traffic = Traffic("agreeing")
    reader, registry = InMemoryMetricReader(), CollectorRegistry()
    meters = providing(reader)
    uninstall = install(meter_provider=meters, registry=registry, duration_histogram=histogram)
    earlier = _pipeline(registry)
    with use_clock(traffic.clock):
        for does, seconds in calls:
            asyncio.run(traffic.call(does, seconds))
        theirs, ours = of_opentelemetry(reader), of_prometheus(registry)
        for policy in (traffic.slo, traffic.retry, traffic.breaker, traffic.places, traffic.limiter):
            family = "events" if policy.kind == "slo" else "calls"
            metric = f"seawall.{policy.kind}.{family}"
            for outcome, count in policy.counters().items():
                total = (
                    f"{prometheus_name(metric)}_total",
                    frozenset({("policy_name", "agreeing"), ("outcome", outcome)}),
                )
                key = metric, frozenset({("policy.name", "agreeing"), ("outcome", outcome)})
                assert ours[total] == theirs[key] >= count, (metric, outcome)
        now = _pipeline(registry)
    uninstall()
    for outcome, count in traffic.ended.items():
        grown = sum(now[key] - earlier.get(key, 0) for key in now if key[0] == outcome)
        assert grown == count, outcome
        for key in now:
            attributes = {("pipeline.name", "agreeing"), ("outcome", key[0])}
            attributes |= {("error.type", key[1])} if key[1] else set()
            assert theirs[PIPELINE_CALLS, frozenset(attributes)] == now[key]


def _pipeline(registry):
    """How many calls of the pipeline ended how, by outcome and type of error."""
    return {
        (sample.labels["outcome"], sample.labels["error_type"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "seawall_pipeline_duration_seconds_count" and sample.labels["pipeline_name"] == "agreeing"
    }


def test_gauges_agree_and_what_is_no_number_is_left_out(fresh, caplog):
    reader, registry = InMemoryMetricReader(), CollectorRegistry()
    uninstall = install(meter_provider=providing(reader), registry=registry)
    traffic = Traffic("agreeing")
    with use_clock(traffic.clock):
        theirs = of_opentelemetry(reader)
        ours = {
            (sample.name, sample.labels.get("policy_name"), sample.labels.get("state")): sample.value
            for family in registry.collect()
            for sample in family.samples
        }
    uninstall()
    for (metric, attributes), number in theirs.items():
        given = dict(attributes)
        if metric in ("seawall.bulkhead.limit", "seawall.breaker.state", "seawall.limiter.available"):
            assert ours[prometheus_name(metric), given["policy.name"], given.get("state")] == number
    assert not caplog.records
    assert not [key for key in theirs if key[0] == "seawall.breaker.failure_rate"]
    assert reader.get_metrics_data() is None  # taken back


def test_a_pushed_histogram_has_the_same_calls_and_seconds(fresh):
    reader, registry = InMemoryMetricReader(), CollectorRegistry()
    uninstall = install(meter_provider=providing(reader), registry=registry, duration_histogram=True)
    traffic = Traffic("agreeing")
    with use_clock(traffic.clock):
        for seconds in (0.1, 0.2, 30.0):
            asyncio.run(traffic.call("well", seconds))
        data = reader.get_metrics_data()
    uninstall()
    (metric,) = [
        metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "seawall.pipeline.duration"
    ]
    (point,) = metric.data.data_points
    assert metric.unit == "s"
    assert (point.count, round(point.sum, 6)) == (3, 30.3)
    assert point.explicit_bounds[:3] == (0.005, 0.01, 0.025)
    assert dict(point.attributes) == {"pipeline.name": "agreeing", "outcome": "success"}


@given(answers=st.lists(st.tuples(*[st.integers(0, 1000)] * 5), max_size=20))
@settings(max_examples=20, deadline=None)
def test_tokens_of_an_engine_have_metrics_of_their_own_that_agree(answers):
    meter = EngineMeter("agreeing")
    reader, registry = InMemoryMetricReader(), CollectorRegistry()
    uninstall = install(meter_provider=providing(reader), registry=registry)
    earlier = _tokens(registry)
    for answer in answers:
        meter.finished(Usage(*answer))
    theirs, now = of_opentelemetry(reader), _tokens(registry)
    uninstall()
    for index, name in enumerate(TOKENS[:5]):
        assert now[name] - earlier[name] == sum(answer[index] for answer in answers)
        assert theirs[f"seawall.engine.{name}", frozenset({("policy.name", "agreeing")})] == now[name]


def _tokens(registry):
    labels = {"policy_name": "agreeing"}
    return {name: registry.get_sample_value(f"seawall_engine_{name}_total", labels) for name in TOKENS}
