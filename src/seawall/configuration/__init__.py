"""Pipelines from a configuration file: validated as a whole, and changed while in use.

Nothing in a file is ever imported or run: exceptions are Python's own by name, everything else that is code
comes from the app, by the names it gives.
"""

from seawall.configuration.building import TYPES
from seawall.configuration.errors import ConfigurationError
from seawall.configuration.pipelines import Pipelines

__all__ = ["TYPES", "ConfigurationError", "Pipelines"]
