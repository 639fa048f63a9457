"""Exporters that read the policies. Nothing is registered until `install` is called."""

from seawall.telemetry.gen_ai import embeddings
from seawall.telemetry.install import TelemetryConflictError, install
from seawall.telemetry.logs import JSONFormatter
from seawall.telemetry.spans import batch_span

__all__ = ["JSONFormatter", "TelemetryConflictError", "batch_span", "embeddings", "install"]
