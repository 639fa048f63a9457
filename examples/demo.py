"""The main job: a real language model in this process, behind five policies, with faults thrown at it.

Run it with `python3 dev.py demo`. On a terminal it shows the policies live; in a pipe it prints plain lines.
"""

from __future__ import annotations

import asyncio
import collections
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

import seawall
from seawall import SLO, Bulkhead, CircuitBreaker, Engine, RateLimiter, Rejected, Timeout
from seawall.inference.errors import PromptError, RuntimeFailure
from seawall.inference.generate.decoder import Decoder

MODEL = "smollm2-135m"
QUESTION = "Why is the sea salty? Answer in two sentences."


class Faults:
    """A decoder that fails or crawls on demand; everything else is the real model's."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.failing = False
        self.crawling = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def start(self, *args: Any, **kwargs: Any) -> Any:
        if self.failing:
            raise RuntimeFailure("decoding", "injected fault")
        sequence = self._decoder.start(*args, **kwargs)
        return _Crawling(sequence) if self.crawling else sequence


class _Crawling:
    """A sequence whose every step takes five seconds, unless it is cancelled."""

    def __init__(self, sequence: Any) -> None:
        self._sequence = sequence
        self._cancelled = threading.Event()
        self.close = sequence.close

    def step(self) -> Any:
        self._cancelled.wait(5.0)
        return self._sequence.step()

    def cancel(self) -> None:
        self._cancelled.set()
        self._sequence.cancel()


class Guards:
    """The five policies, outermost first. The numbers are small so that one demo shows them all at work."""

    def __init__(self) -> None:
        self.slo = SLO("answers", target=0.5, latency=20.0, window=6.0, ignore=PromptError)
        self.limiter = RateLimiter("answers", rate=20, burst=12)
        self.bulkhead = Bulkhead("answers", max_concurrent=2, max_queued=4, max_wait=10.0)
        self.breaker = CircuitBreaker("model", consecutive_failures=3, reset_timeout=1.5, ignore=PromptError)
        self.timeout = Timeout("piece", 2.0)

    def outermost_first(self) -> tuple[SLO, RateLimiter, Bulkhead, CircuitBreaker, Timeout]:
        return self.slo, self.limiter, self.bulkhead, self.breaker, self.timeout

    def table(self) -> Table:
        """What they all say now."""
        table = Table(title="policies", title_justify="left", min_width=72)
        for column in ("policy", "now", "since the start"):
            table.add_column(column)
        slo, limiter = self.slo.snapshot(), self.limiter.snapshot()
        bulkhead, breaker = self.bulkhead.snapshot(), self.breaker.snapshot()
        timed_out = self.timeout.counters()["timed_out"]
        budget = f"error budget {slo.error_budget:+.0%}"
        table.add_row("SLO 50 % in 6 s", budget, f"{slo.good} good, {slo.bad} bad")
        table.add_row("rate limiter", f"{limiter.available} free", f"{limiter.rejections} refused")
        places = f"{bulkhead.active} of {bulkhead.limit} busy, {bulkhead.waiting} waiting"
        table.add_row("bulkhead", places, f"{bulkhead.rejections} refused")
        colour = {"closed": "green", "open": "red", "half_open": "yellow"}[breaker.state.value]
        counts = f"opened {breaker.opened}x, {breaker.rejections} refused"
        table.add_row("circuit breaker", Text(breaker.state.value, style=colour), counts)
        table.add_row("timeout 2 s", "", f"{timed_out} pieces cut off")
        return table


class View:
    """A live screen on a terminal, plain lines elsewhere."""

    def __init__(self, guards: Guards) -> None:
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
        self._guards = guards
        self._live: Live | None = None

    def title(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    def say(self, text: str) -> None:
        self.console.print(f"  {text}", markup=False)

    def policies(self) -> None:
        """The policies' table, where no live view shows it anyway."""
        if self._live is None:
            self.console.print(self._guards.table())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show the policies live below what is printed."""
        if not self.console.is_terminal:
            yield
            return
        screen = Live(console=self.console, get_renderable=lambda: Group("", self._guards.table()))
        with screen as self._live:
            yield
        self._live = None


async def ask(engine: Engine, prompt: str = "Say hello.", tokens: int = 8) -> str:
    """One answer, or what was in its way."""
    try:
        await engine.generate(prompt, max_tokens=tokens)
    except Rejected as error:
        return type(error).__name__
    except TimeoutError as error:
        return type(error).__name__
    except RuntimeFailure as error:
        return type(error).__name__
    return "answered"


def tally(results: Iterable[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in collections.Counter(results).most_common())


async def answer(engine: Engine, view: View) -> None:
    view.title(f"1. A real model answers: {QUESTION}")
    began = time.monotonic()
    first, tokens, text = 0.0, 0, ""
    async for piece in engine.stream(QUESTION, max_tokens=80):
        first = first or time.monotonic() - began
        tokens += piece.token is not None
        text += piece.text
        if view.console.is_terminal:
            view.console.print(piece.text, end="", markup=False)
    rate = (tokens - 1) / (time.monotonic() - began - first)
    view.console.print("" if view.console.is_terminal else text, markup=False)
    view.say(f"first token after {first * 1000:.0f} ms, then {rate:.0f} tokens/s, {tokens} tokens")


async def failing(engine: Engine, faults: Faults, guards: Guards, view: View) -> None:
    view.title("2. The model fails: three faults open the breaker, which then refuses at once")
    faults.failing = True
    view.say("8 calls: " + tally([await ask(engine) for _ in range(8)]))
    began = time.monotonic()
    await ask(engine)
    view.say(f"a refusal takes {(time.monotonic() - began) * 1e3:.2f} ms and costs the model nothing")
    view.policies()
    faults.failing = False
    retry_after = guards.breaker.snapshot().retry_after or 0.0
    view.say(f"the fault is gone; the breaker probes in {retry_after:.1f} s")
    await asyncio.sleep(retry_after)
    view.say(f"the probe: {await ask(engine)}; the breaker is {guards.breaker.state.value}")


async def crawling(engine: Engine, faults: Faults, guards: Guards, view: View) -> None:
    view.title("3. The model crawls: a piece that takes over 2 s is cut off, and its slot comes back")
    faults.crawling = True
    view.say("2 calls: " + tally(await asyncio.gather(ask(engine), ask(engine))))
    faults.crawling = False
    view.say(f"places in use now: {guards.bulkhead.snapshot().active}; next call: {await ask(engine)}")
    view.policies()


async def burst(engine: Engine, guards: Guards, view: View) -> None:
    view.title("4. A burst: 40 calls at once on 2 places, a queue of 4, and 12 starts at a time")
    view.say("40 calls: " + tally(await asyncio.gather(*(ask(engine) for _ in range(40)))))
    view.policies()
    await asyncio.sleep(0.7)
    view.say("a moment later: " + tally(await asyncio.gather(ask(engine), ask(engine))))


async def recovery(engine: Engine, guards: Guards, view: View) -> None:
    view.title("5. Recovery: good calls until the error budget is back")
    began, calls = time.monotonic(), 0
    while guards.slo.error_budget <= 0 and time.monotonic() - began < 30:
        calls += await ask(engine) == "answered"
    spent = time.monotonic() - began
    view.say(f"{calls} answers in {spent:.1f} s; error budget {guards.slo.error_budget:+.0%}")
    view.policies()


def report(registry: CollectorRegistry, spans: InMemorySpanExporter, view: View) -> None:
    view.title("6. What the operator saw")
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    counters = [line for line in lines if line.startswith("seawall_") and "_total{" in line]
    counted = [line for line in counters if not line.endswith(" 0.0")]
    for line in counted:
        view.say(line)
    view.say(f"... and {len(lines) - len(counted)} lines more: gauges, histograms, gen_ai")
    errors = collections.Counter(
        str((span.attributes or {}).get("error.type", "ok")) for span in spans.get_finished_spans()
    )
    view.say(f"{sum(errors.values())} spans: " + ", ".join(f"{n} {what}" for what, n in errors.most_common()))


async def main() -> None:
    guards = Guards()
    view = View(guards)
    registry, spans, provider = CollectorRegistry(), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    from seawall.telemetry import install

    uninstall = install(tracer_provider=provider, registry=registry)
    injected: list[Faults] = []

    def load() -> Any:
        injected.append(Faults(Decoder.load(MODEL)))
        return injected[0]

    view.console.print(f"seawall {seawall.__version__}: loading {MODEL} (4 bits, converted on first use) ...")
    began = time.monotonic()
    async with Engine(load, name=MODEL, policies=guards.outermost_first()) as engine:
        view.say(f"ready after {time.monotonic() - began:.1f} s")
        await answer(engine, view)
        with view.watching():
            await failing(engine, injected[0], guards, view)
            await crawling(engine, injected[0], guards, view)
            await burst(engine, guards, view)
            await recovery(engine, guards, view)
    report(registry, spans, view)
    uninstall()


if __name__ == "__main__":
    asyncio.run(main())
