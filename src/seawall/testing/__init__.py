"""Help for testing code behind policies."""

from seawall.testing.capture import capture_events
from seawall.testing.leaks import LeakError, no_leaks
from seawall.testing.script import AsyncScript, Script, ScriptRanOut, after
from seawall.testing.virtual_clock import VirtualClock
from seawall.testing.virtual_time import VirtualTimeLoop, run

__all__ = [
    "AsyncScript",
    "LeakError",
    "Script",
    "ScriptRanOut",
    "VirtualClock",
    "VirtualTimeLoop",
    "after",
    "capture_events",
    "no_leaks",
    "run",
]
