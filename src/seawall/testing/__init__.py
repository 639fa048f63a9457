"""Help for testing code behind policies."""

from seawall.testing.virtual_time import VirtualTimeLoop, run

__all__ = ["VirtualTimeLoop", "run"]
