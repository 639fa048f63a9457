"""Exporters that read the policies. Nothing is registered until `install` is called."""

from seawall.telemetry.install import install

__all__ = ["install"]
