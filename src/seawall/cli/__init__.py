"""The `seawall` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from seawall.cli import bench_model, generate, models, quality, serve, slo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed with a message, 2 wrong usage, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog="seawall", description="Hardened calls and embedded inference.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate.add_parser(commands)
    bench_model.add_parser(commands)
    models.add_parser(commands)
    quality.add_parsers(commands)
    serve.add_parser(commands)
    slo.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()  # a reader that has left is noticed here, and not at exit
        return status
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 128 + 13  # as if by SIGPIPE
    except (OSError, ImportError) as error:
        return _fail(error)
    except Exception as error:
        if type(error).__module__.startswith("seawall."):
            return _fail(error)
        raise


def _fail(error: Exception) -> int:
    sys.stderr.write(f"seawall: {error}\n")
    return 1
