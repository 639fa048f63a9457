"""What seeing a call costs it, in CPU time beyond the bare await, for five guards around `async def f(): return 1`.

off             nothing installed
counters        durations are counted, nobody reads them
prometheus      install(registry=...)
otel_metrics    install(meter_provider=...): observable instruments
otel_histogram  the same with duration_histogram=True, which records each call
unsampled_span  install(tracer_provider=...) with a sampler that drops all
sampled_span    ... that keeps all, in a processor that throws them away
everything      Prometheus, OpenTelemetry's metrics, sampled spans, events as log records
hand_*          the same seen by hand, around a bare call: labels().inc() and observe(); add(), record() and a span
scrape_ms       one scrape of 100 policies and 20 functions

With --peers also "assembly": aiobreaker + asyncio.Semaphore + aiolimiter + tenacity + asyncio.timeout, seen by hand
with OpenTelemetry (counter, histogram, sampled span), and assembly_prometheus, seen by hand with prometheus-client.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from _harness import Call, arguments, compare, print_figures, write_results
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from seawall import SLO, Bulkhead, CircuitBreaker, Pipeline, RateLimiter, Timeout
from seawall.core import watching
from seawall.telemetry import install

DISTRIBUTIONS = ("opentelemetry-api", "opentelemetry-sdk", "prometheus_client", "aiobreaker", "aiolimiter", "tenacity")
Switch = Callable[[], AbstractContextManager[object]]


async def bare() -> int:
    return 1


def five_guards(function: Call) -> Call:
    stack = Pipeline(
        SLO("answers", target=0.999, latency=0.5),
        CircuitBreaker("b", failure_rate=0.5, minimum_calls=20, reset_timeout=30.0),
        Bulkhead("k", max_concurrent=8, max_queued=32, max_wait=0.2),
        RateLimiter("r", rate=1e6, burst=1e6),
        Timeout("t", 2.0),
    )
    guarded: Call = stack(function)
    return guarded


def providers(sampler: Any = ALWAYS_ON) -> TracerProvider:
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(SpanProcessor())
    return provider


def meters() -> MeterProvider:
    return MeterProvider([InMemoryMetricReader()])


@contextmanager
def counting() -> Iterator[None]:
    stop = watching.read_durations()
    try:
        yield
    finally:
        stop()


def installed(make: Callable[[], dict[str, Any]]) -> Switch:
    """Telemetry while a case runs, with providers of its own: instruments can't be taken off one."""

    @contextmanager
    def switch() -> Iterator[None]:
        uninstall = install(**make())
        try:
            yield
        finally:
            uninstall()

    return switch


def switches() -> dict[str, Switch]:
    quiet = logging.Logger("benchmark")  # noqa: LOG001 - of nobody else
    quiet.addHandler(logging.NullHandler())
    return {
        "counters": counting,
        "prometheus": installed(lambda: {"registry": CollectorRegistry()}),
        "otel_metrics": installed(lambda: {"meter_provider": meters()}),
        "otel_histogram": installed(lambda: {"meter_provider": meters(), "duration_histogram": True}),
        "unsampled_span": installed(lambda: {"tracer_provider": providers(ALWAYS_OFF)}),
        "sampled_span": installed(lambda: {"tracer_provider": providers()}),
        "everything": installed(
            lambda: {
                "registry": CollectorRegistry(),
                "meter_provider": meters(),
                "tracer_provider": providers(),
                "logger": quiet,
            }
        ),
    }


def with_prometheus(function: Call) -> Call:
    """Seen by hand, as prometheus-client's documentation shows."""
    registry = CollectorRegistry()
    calls = Counter("calls", "Calls.", ["name", "outcome"], registry=registry)
    seconds = Histogram("seconds", "Seconds.", ["name"], registry=registry)

    async def seen() -> object:
        begun = time.perf_counter()
        outcome = "failure"
        try:
            result = await function()
            outcome = "success"
        finally:
            calls.labels("f", outcome).inc()
            seconds.labels("f").observe(time.perf_counter() - begun)
        return result

    return seen


def with_opentelemetry(function: Call) -> Call:
    """Seen by hand, as OpenTelemetry's documentation shows."""
    meter, tracer = meters().get_meter("f"), providers().get_tracer("f")
    calls, seconds = meter.create_counter("calls"), meter.create_histogram("seconds")

    async def seen() -> object:
        with tracer.start_as_current_span("f"):
            begun = time.perf_counter()
            outcome = "failure"
            try:
                result = await function()
                outcome = "success"
            finally:
                attributes = {"name": "f", "outcome": outcome}
                calls.add(1, attributes)
                seconds.record(time.perf_counter() - begun, attributes)
            return result

    return seen


def peer_cases() -> dict[str, Call]:
    from _assembly import assembly

    return {
        "assembly": with_opentelemetry(assembly(bare)),
        "assembly_prometheus": with_prometheus(assembly(bare)),
        "assembly_unseen": assembly(bare),
    }


def scrape_ms(rounds: int = 20) -> list[float]:
    """Milliseconds of one scrape."""
    kept = [CircuitBreaker(f"breaker {number}") for number in range(100)]
    registry = CollectorRegistry()
    uninstall = install(registry=registry)
    for number in range(20):
        Pipeline(kept[number], name=f"function {number}").call_sync(len, "")
    found = []
    for _ in range(rounds):
        begun = time.process_time()
        generate_latest(registry)
        found.append((time.process_time() - begun) * 1e3)
    uninstall()
    return found


async def measure(*, peers: bool) -> tuple[dict[str, float], dict[str, Any]]:
    during = switches()
    cases = {"off": five_guards(bare), **{name: five_guards(bare) for name in during}}
    cases |= {"hand_prometheus": with_prometheus(bare), "hand_opentelemetry": with_opentelemetry(bare)}
    cases |= peer_cases() if peers else {}
    found = await compare(bare, cases, during=during)
    figures = {"bare_ns": found.bare.median} | {f"{name}_ns": times.median for name, times in found.added.items()}
    for name in ("counters", "prometheus", "otel_metrics", "unsampled_span", "sampled_span"):
        differences = [on - off for on, off in zip(found.added[name].cpu, found.added["off"].cpu, strict=True)]
        figures[f"{name}_over_off_ns"] = sorted(differences)[len(differences) // 2]
    if peers:
        figures["prometheus_over_assembly"] = figures["prometheus_ns"] / figures["assembly_ns"]
        figures["prometheus_over_assembly_prometheus"] = figures["prometheus_ns"] / figures["assembly_prometheus_ns"]
    scrapes = scrape_ms()
    figures["scrape_ms"] = sorted(scrapes)[len(scrapes) // 2]
    samples: dict[str, Any] = {"bare": found.bare.as_samples(), "scrape_ms": scrapes}
    samples["added"] = {name: times.as_samples() for name, times in found.added.items()}
    return {name: round(value, 4) for name, value in figures.items()}, samples


def main() -> None:
    options = arguments(__doc__)
    figures, samples = asyncio.run(measure(peers=options.peers))
    print_figures("telemetry: CPU time added to a bare await", figures)
    if options.json:
        write_results(options.json, figures, samples, DISTRIBUTIONS)


if __name__ == "__main__":
    main()
