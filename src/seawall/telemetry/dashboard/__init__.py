"""A Grafana dashboard of what is exported to Prometheus, made from the exporter's own names."""

from seawall.telemetry.dashboard.grafana import grafana_dashboard

__all__ = ["grafana_dashboard"]
