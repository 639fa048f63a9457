"""The `seawall` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from seawall.cli import models, quality, slo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed with a message, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="seawall", description="Hardened calls and embedded inference.")
    commands = parser.add_subparsers(dest="command", required=True)
    models.add_parser(commands)
    quality.add_parsers(commands)
    slo.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (OSError, ImportError) as error:
        return _fail(error)
    except Exception as error:
        if type(error).__module__.startswith("seawall."):
            return _fail(error)
        raise


def _fail(error: Exception) -> int:
    sys.stderr.write(f"seawall: {error}\n")
    return 1
