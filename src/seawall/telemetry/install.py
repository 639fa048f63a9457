"""Switch telemetry on, and off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider

from seawall.core import gate
from seawall.telemetry import otel

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def install(
    *,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
    registry: CollectorRegistry | None = None,
) -> Callable[[], None]:
    """Export to what is given, and to nothing else; returns a function that takes it all back.

    With a tracer provider each guarded call becomes one span. With a meter provider the policies' counters
    become observable instruments, and with a Prometheus registry a collector reads them at each scrape: either
    way the calls themselves pay nothing for metrics. Instruments cannot be unregistered from a meter provider,
    so after the undo they report nothing more.

    Examples:
        >>> from prometheus_client import CollectorRegistry, generate_latest
        >>> from seawall import Bulkhead
        >>> reports, registry = Bulkhead("reports", max_concurrent=2), CollectorRegistry()
        >>> uninstall = install(registry=registry)
        >>> "seawall_bulkhead_limit" in generate_latest(registry).decode()
        True
        >>> uninstall()
    """
    undo: list[Callable[[], None]] = []
    if tracer_provider is not None:
        if gate.tracer is not None:
            raise RuntimeError("spans are exported already; call what install() returned first")
        gate.tracer = otel.tracer(trace.get_tracer("seawall", tracer_provider=tracer_provider))
        undo.append(_stop_tracing)
    if meter_provider is not None:
        undo.append(otel.observe(meter_provider.get_meter("seawall")))
    if registry is not None:
        from seawall.telemetry.prometheus import PoliciesCollector

        collector = PoliciesCollector()
        registry.register(collector)
        undo.append(lambda: registry.unregister(collector))

    def uninstall() -> None:
        while undo:
            undo.pop()()

    return uninstall


def _stop_tracing() -> None:
    gate.tracer = None
